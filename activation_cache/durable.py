"""Files that exist whole or not at all.

`written` makes a file aside, reserves its space first, fsyncs and renames; `locked` lets one
process write a folder at a time. Readers never see half a file; a full disk fails before data is
written.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import CacheBusy, CacheError, DiskFull

PARTIAL_SUFFIX = ".partial"


@contextmanager
def written(path: Path, *, reserve_bytes: int = 0) -> Iterator[BinaryIO]:
    """A binary file that appears at `path` when the context closes without an error.

    reserve_bytes: space that is claimed first; what is not used is given back.
    Raises: DiskFull, CacheError (can't write there). The file at `path`, if any, stays as it was.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        with partial.open("wb") as file:
            if reserve_bytes:
                os.posix_fallocate(file.fileno(), 0, reserve_bytes)
            yield file
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        raise _as_cache_error(error, path, reserve_bytes) from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file durably."""
    with written(path) as file:
        file.write(text.encode())


def fsync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Remove what an interrupted writer left. Only for the holder of the lock."""
    for partial in folder.glob(f"*{PARTIAL_SUFFIX}"):
        partial.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for writing. Raises: CacheBusy that names the process which holds it."""
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise CacheBusy(
                f"{folder} is being written by {holder}: wait for it, or choose another folder"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


def _as_cache_error(error: OSError, path: Path, needed: int) -> CacheError:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return CacheError(f"can't write {path}: {error.strerror}")
    stat = os.statvfs(path.parent)
    free = stat.f_bavail * stat.f_frsize
    return DiskFull(
        f"disk full: {path.name} needs {needed / 1e6:,.1f} MB and {path.parent} has "
        f"{free / 1e6:,.1f} MB free. What was committed is safe: free some space and run it again"
    )
