"""Real processes that write and read, to be killed and awaited."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from .outcome import Broken

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 60.0


class Result(NamedTuple):
    """How a process ended. kinds: names of its error's class and base classes, if it raised one.
    value: what its function returned. was_killed: it told neither."""

    was_killed: bool = False
    kinds: tuple[str, ...] = ()
    message: str = ""
    traceback: str = ""
    value: Any = None

    @property
    def is_done(self) -> bool:
        return not self.was_killed and not self.kinds


class Process:
    """A child of the host, at work."""

    def __init__(self, connection: socket.socket, task: dict[str, Any]):
        connection.settimeout(TIMEOUT_S)
        self._connection = connection
        self._stream = connection.makefile("rw")
        print(json.dumps(task), file=self._stream, flush=True)
        self.pid = int(json.loads(self._stream.readline())["pid"])
        self._result: Result | None = None

    def kill(self) -> Result:
        """SIGKILL. Returns: its result, which says whether it had ended before."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def wait(self) -> Result:
        """Wait until the process is gone, and all that it held with it. Raises: Broken (hangs)."""
        if self._result is None:
            try:
                line = self._stream.readline()
            except TimeoutError:
                os.kill(self.pid, signal.SIGKILL)
                raise Broken(f"the process still hung after {TIMEOUT_S:.0f} s") from None
            except ConnectionError:
                line = ""
            self._result = Result(**json.loads(line)) if line else Result(was_killed=True)
            self._stream.close()
            self._connection.close()
            _await_end(self.pid)
        return self._result


class Host:
    """The warm process. model: where it makes its model. library: what is loaded into it before
    everything else, if anything."""

    def __init__(self, model: Path, library: Path | None):
        self._control, theirs = socket.socketpair()
        self._lock = threading.Lock()
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "TQDM_DISABLE": "1",
            **({"LD_PRELOAD": str(library)} if library else {}),
        }
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.host", str(theirs.fileno()), str(model)],
                cwd=ROOT,
                env=environment,
                pass_fds=[theirs.fileno()],
            )
        with self._control.makefile("r") as stream:
            hello = json.loads(stream.readline() or "{}")
        if not hello:
            raise RuntimeError(f"the warm process ended with {self._process.wait()}")
        self.way: str = hello["way"]

    def start(
        self, function: Callable[..., Any], *, start_at: float = 0.0, **arguments: Any
    ) -> Process:
        """Call `function(lm, **arguments)` in a new process, at `start_at` (time.monotonic)."""
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            socket.send_fds(self._control, [b"x"], [theirs.fileno()])
        named = [function.__module__, function.__name__]
        task = {"function": named, "start_at": start_at, "arguments": arguments}
        return Process(ours, task)

    def close(self) -> None:
        self._control.close()
        self._process.wait(TIMEOUT_S)


def _await_end(pid: int) -> None:
    """Wait for a process that ends; its files are closed, and its locks free, after that."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.001)
    raise Broken(f"process {pid} did not end")
