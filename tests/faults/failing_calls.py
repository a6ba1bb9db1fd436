"""System calls that fail on demand, in this process and on the files of one folder.

`failing_calls.c`, built with the machine's C compiler and loaded with LD_PRELOAD, stands between
Python (and every library) and the system. Without a compiler, the functions of `os` are replaced
instead, which misses what is written through Python's file objects.
"""

import builtins
import ctypes
import errno
import fcntl
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

SOURCE = Path(__file__).with_name("failing_calls.c")
KILL = -1
PRELOADED, PATCHED = "system calls (LD_PRELOAD)", "functions of os (no C compiler)"
_BY_PATH = {"mkdir": 0, "rmdir": 0, "unlink": 0, "remove": 0, "rename": 1, "replace": 1}
_BY_HANDLE = ("write", "pwrite", "fsync", "fdatasync", "ftruncate", "posix_fallocate")


class FailingCall(NamedTuple):
    """The `nth` call (from 1; 0 for none) on the files of `folder` fails with `error`: an errno, or
    KILL. Every call is appended to the file `trace` as a line `CALL PATH` (a rename's path is the
    new one)."""

    folder: str
    nth: int
    error: int
    trace: str


def built_library(folder: Path) -> Path | None:
    """`failing_calls.c`, compiled into `folder`; None where that can't be done."""
    compiler = shutil.which("cc")
    if not compiler or not sys.platform.startswith("linux"):
        return None
    library = folder / "failing_calls.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-U_FORTIFY_SOURCE", "-o", library, SOURCE]
    done = subprocess.run([*command, "-ldl"], capture_output=True)
    return None if done.returncode else library


def way() -> str:
    """How calls are made to fail in this process: PRELOADED, if that is seen to work."""
    if not hasattr(ctypes.CDLL(None), "faults_arm"):
        return PATCHED
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace"
        watched = os.path.realpath(f"{folder}/watched")
        handle = _arm_library(FailingCall(watched, 0, 0, str(trace)))
        Path(watched).mkdir()
        with Path(watched, "file").open("wb", buffering=0) as file:
            os.pwrite(file.fileno(), b"ab", 0)
            os.fsync(file.fileno())
        ctypes.CDLL(None).faults_arm(b"", 0, 0, -1)
        os.close(handle)
        seen = [line.split()[0] for line in trace.read_text().splitlines()]
    return PRELOADED if seen == ["mkdir", "open", "pwrite", "fsync"] else PATCHED


def arm(call: FailingCall, how: str) -> None:
    """From now on, in this process, `call` fails. There is no way back: meant for a child."""
    if how == PRELOADED:
        _arm_library(call)
    else:
        _patch(call)


def _arm_library(call: FailingCall) -> int:
    handle = _open_trace(call)
    arguments = call.folder.encode(), ctypes.c_long(call.nth), call.error, handle
    ctypes.CDLL(None).faults_arm(*arguments)
    return handle


def _open_trace(call: FailingCall) -> int:
    return os.open(call.trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def _patch(call: FailingCall) -> None:
    """Replace the functions of `os`, `fcntl` and `io` that the library stands before."""
    count = _Count(call)

    def replace(owner: Any, name: str, path_of: Callable[..., str], shown: str) -> None:
        real = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            count(shown, path_of(*args))
            return real(*args, **kwargs)

        setattr(owner, name, counted)

    for name, position in _BY_PATH.items():
        replace(os, name, lambda *args, at=position: _absolute(args[at]), name)
    for name in _BY_HANDLE:
        if hasattr(os, name):
            replace(os, name, _path_of_handle, name)
    replace(fcntl, "flock", _path_of_handle, "flock")
    for owner in (os, io, builtins):
        replace(owner, "open", lambda path, *_: _absolute(path), "open")


class _Count:
    def __init__(self, call: FailingCall):
        self._call, self._n, self._lock = call, 0, threading.Lock()
        self._trace, self._write = _open_trace(call), os.write

    def __call__(self, name: str, path: str) -> None:
        if not f"{path}/".startswith(f"{self._call.folder}/"):
            return
        with self._lock:
            self._n += 1
            is_nth = self._n == self._call.nth
            name = {"remove": "unlink", "replace": "rename"}.get(name, name)
            self._write(self._trace, f"{name} {path}\n".encode())
        if is_nth and self._call.error == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        if is_nth:
            raise OSError(self._call.error, os.strerror(self._call.error), path)


def _absolute(path: Any) -> str:
    if isinstance(path, int):
        return _path_of_handle(path)
    return os.path.abspath(os.fsdecode(path))  # noqa: PTH100  (Path opens nothing, but is slower)


def _path_of_handle(handle: Any, *_: Any) -> str:
    number = handle if isinstance(handle, int) else handle.fileno()
    with suppress(OSError):
        return os.readlink(f"/proc/self/fd/{number}")  # noqa: PTH115
    return ""


def shown(error: int) -> str:
    """EIO, ENOSPC or SIGKILL."""
    return "SIGKILL" if error == KILL else errno.errorcode[error]
