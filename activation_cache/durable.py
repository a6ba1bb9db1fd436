"""Files that exist whole or not at all.

`written` makes a file aside, reserves its space first, fsyncs and renames; `locked` lets one
process write a folder at a time. Readers never see half a file; a full disk fails before data is
written.
"""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from .errors import CacheBusy, CacheError, DiskFull

PARTIAL_SUFFIX = ".partial"
LOCK = ".lock"


class DurableFile:
    """A file that is being made; its faults are told as errors of the cache."""

    def __init__(self, file: FileIO, path: Path):
        self._file, self._path = file, path
        self.n_bytes = 0

    def write(self, data: bytes | memoryview, *, at: int | None = None) -> None:
        """Append `data`, or set it in the place of what stands at byte `at`."""
        start = self.n_bytes if at is None else at
        done = 0
        with faults_told(self._path, len(data)):
            while done < len(data):  # a disk that fills up takes a part
                done += os.pwrite(self._file.fileno(), data[done:], start + done)
        self.n_bytes = max(self.n_bytes, start + len(data))

    def trim(self) -> None:
        """Give back the space that was claimed and not used."""
        with faults_told(self._path, 0):
            self._file.truncate(self.n_bytes)


@contextmanager
def written(path: Path, *, reserve_bytes: int = 0) -> Iterator[DurableFile]:
    """A binary file that appears at `path` when the context closes without an error.

    reserve_bytes: space that is claimed first; what is not used is given back.
    Raises: DiskFull, CacheError (can't write there). The file at `path`, if any, stays as it was.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        with faults_told(path, reserve_bytes):
            file = partial.open("wb", buffering=0)
        with file:
            with faults_told(path, reserve_bytes):
                _reserve(file.fileno(), reserve_bytes)
            yield (made := DurableFile(file, path))
            with faults_told(path, reserve_bytes):
                file.truncate(made.n_bytes)
                os.fsync(file.fileno())
        with faults_told(path, reserve_bytes):
            partial.replace(path)
            fsync_folder(path.parent)
    finally:
        with suppress(OSError):
            partial.unlink()


@contextmanager
def scratch(path: Path, *, reserve_bytes: int = 0) -> Iterator[DurableFile]:
    """A binary file that is there, and locked, while the context is open.

    reserve_bytes: see `written`. Raises: DiskFull, CacheError (can't write there).
    """
    try:
        with faults_told(path, reserve_bytes):
            file = path.open("xb", buffering=0)
        with file:
            with faults_told(path, reserve_bytes):
                fcntl.flock(file, fcntl.LOCK_EX)
                _reserve(file.fileno(), reserve_bytes)
            yield DurableFile(file, path)
    finally:
        with suppress(OSError):
            path.unlink()


def fsync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(folder: Path, *, shown_as: str | None = None) -> Iterator[None]:
    """Hold `folder` for writing. Raises: CacheBusy that names the process which holds it.

    shown_as: what messages call what is held.
    """
    held = shown_as or folder
    path = folder / LOCK
    with faults_told(path, 0):
        file = path.open("a+")
    with file:
        try:
            with faults_told(path, 0):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except CacheError as error:
            if not isinstance(error.__cause__, BlockingIOError):
                raise
            raise CacheBusy(
                f"{held} is being written by {_holder(path)}: wait for it, or choose another folder"
            ) from error
        with faults_told(path, 0):
            if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                raise CacheBusy(f"{held} was being written a moment ago: try again")
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}")
            file.flush()
        yield


def _holder(path: Path) -> str:
    """Who holds a lock. It may have got it this moment, and not have said so yet."""
    for _ in range(50):
        words = path.read_text().split() if path.exists() else []
        if len(words) == 4:
            is_here = words[3] == os.uname().nodename and Path("/proc/self").exists()
            if not is_here or Path(f"/proc/{words[1]}").exists():
                return " ".join(words)
        time.sleep(0.01)
    return "another process"


def _reserve(handle: int, n_bytes: int) -> None:
    """Claim space, where the system can."""
    if not n_bytes or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(handle, 0, n_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise


@contextmanager
def faults_told(path: Path, needed: int) -> Iterator[None]:
    """Turns a fault of the system into an error of the cache that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise CacheError(f"can't write {path}: {error.strerror or error}") from error
        stat = os.statvfs(next(folder for folder in path.absolute().parents if folder.exists()))
        free = stat.f_bavail * stat.f_frsize / 1e6
        raise DiskFull(
            f"disk full: no room for {path} ({needed / 1e6:,.1f} MB at once, {free:,.1f} MB free). "
            "What was committed is safe: free some space and run it again"
        ) from error
