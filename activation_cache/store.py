"""A folder of files that a cache lives in: on this machine, or at any place fsspec reaches.

`open_store` takes a path or a URL. What a cache asks of a store is little: small files read whole,
large ones made whole or not at all, and byte ranges of large ones, which `tensor_file` verifies.
"""

import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

from .durable import LOCK, DurableFile, faults_told, locked, written
from .errors import CacheCorrupt, CacheError


class ByteRange(NamedTuple):
    """Bytes begin..end-1 of one file of a store."""

    name: str
    begin: int
    end: int


class Store(ABC):
    """Files by name (`shards/000017.json`) under one root."""

    root: str
    """What a user calls it; messages name files by it."""
    is_remote = False

    def path(self, name: str) -> str:
        """What messages call a file."""
        return f"{self.root}/{name}"

    @abstractmethod
    def child(self, folder: str) -> "Store":
        """The store of a folder inside."""

    @abstractmethod
    def exists(self) -> bool:
        """Whether there is anything at the root."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether a file is there."""

    @abstractmethod
    def names(self, folder: str = "") -> list[str]:
        """Names of what lies directly in a folder, sorted; none if it is missing."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A small file, whole. Raises: OSError."""

    def read_all(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Small files, in order."""
        return ((name, self.read(name)) for name in names)

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a file. Raises: OSError."""

    @abstractmethod
    def read_into(self, place: ByteRange, out: memoryview, *, again: bool = False) -> bool:
        """Fill `out` with a range of a file. False if the file is missing or ends too early.

        Raises: CacheCorrupt if it is there and can't be read.
        again: not from a copy on this machine that an earlier read may have left.
        """

    def fetch(self, wanted: list[ByteRange]) -> None:
        """Bring ranges to this machine, many at once, so that `read_into` finds them here."""
        del wanted

    def forget(self, name: str) -> None:
        """Drop what of a file lies on this machine as a copy: it is read from where it is."""
        del name

    def expect(self, wanted: list[ByteRange]) -> None:
        """These ranges are read soon: a disk may begin to read them, without anyone waiting."""
        del wanted

    @abstractmethod
    def written(self, name: str, *, reserve_bytes: int = 0) -> AbstractContextManager[DurableFile]:
        """See `durable.written`."""

    def write(self, name: str, data: bytes) -> None:
        """A small file, whole or not at all. Raises: CacheError."""
        with self.written(name) as file:
            file.write(data)

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file, if it is there. Raises: CacheError."""

    @abstractmethod
    def begin(self) -> AbstractContextManager[None]:
        """Hold the folder for writing, made if it is missing. Raises: CacheBusy, CacheError.

        A folder that holds nothing but its lock at the end is taken away again.
        """

    def free_bytes(self) -> int | None:
        """Room that is left; None where nothing can be said."""
        return None


class LocalStore(Store):
    """A folder of this machine."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.root = str(folder)

    def child(self, folder: str) -> "LocalStore":
        return LocalStore(self.folder / folder)

    def exists(self) -> bool:
        return self.folder.exists()

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def names(self, folder: str = "") -> list[str]:
        try:
            return sorted(path.name for path in (self.folder / folder).iterdir())
        except FileNotFoundError:
            return []
        except NotADirectoryError as error:
            if not self.folder.is_file():
                return []
            raise CacheError(f"{self.folder} is a file: choose a folder") from error

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def size(self, name: str) -> int:
        return (self.folder / name).stat().st_size

    def read_into(self, place: ByteRange, out: memoryview, *, again: bool = False) -> bool:
        del again  # there is but this one
        try:
            handle = os.open(self.folder / place.name, os.O_RDONLY)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise CacheCorrupt(f"{self.path(place.name)} {_unread(error)}") from error
        try:
            done = 0
            while done < len(out):
                n = os.preadv(handle, [out[done:]], place.begin + done)
                if n == 0:
                    return False
                done += n
        except OSError as error:  # a bad sector
            raise CacheCorrupt(f"{self.path(place.name)} {_unread(error)}") from error
        finally:
            os.close(handle)
        return True

    def written(self, name: str, *, reserve_bytes: int = 0) -> AbstractContextManager[DurableFile]:
        path = self.folder / name
        with faults_told(path, reserve_bytes):
            path.parent.mkdir(exist_ok=True)
        return written(path, reserve_bytes=reserve_bytes)

    def expect(self, wanted: list[ByteRange]) -> None:
        if not hasattr(os, "posix_fadvise"):
            return
        for name, ranges in itertools.groupby(wanted, key=lambda place: place.name):
            try:
                handle = os.open(self.folder / name, os.O_RDONLY)
            except OSError:
                continue  # told when it is read
            try:
                for _, begin, end in ranges:
                    os.posix_fadvise(handle, begin, end - begin, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(handle)

    def remove(self, name: str) -> None:
        path = self.folder / name
        with faults_told(path, 0):
            path.unlink(missing_ok=True)

    @contextmanager
    def begin(self) -> Iterator[None]:
        made = [f for f in (self.folder, *self.folder.parents) if not f.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(f"can't make the folder {self.folder}: {error.strerror}") from error
        with locked(self.folder):
            try:
                yield
            finally:
                self._leave_nothing_empty(made)

    def _leave_nothing_empty(self, made: list[Path]) -> None:
        """Take away folders that were made and hold nothing."""
        try:
            inside = list(self.folder.iterdir())
            if all(path.is_dir() or path.name == LOCK for path in inside):
                for path in inside:
                    if path.is_dir():
                        path.rmdir()
                (self.folder / LOCK).unlink(missing_ok=True)
                for folder in made:
                    folder.rmdir()
        except OSError:  # they hold something
            return

    def free_bytes(self) -> int | None:
        home = next(f for f in (self.folder, *self.folder.absolute().parents) if f.exists())
        stat = os.statvfs(home)
        return stat.f_bavail * stat.f_frsize


def _unread(error: OSError) -> str:
    why = error.strerror or error
    return f"can't be read: {why}. Check the disk, or make it again with `saebase harvest --repair`"


def open_store(place: str | Path | Store) -> Store:
    """The store at a path, or at a URL of any file system that fsspec knows (`s3://bucket/acts`).

    Raises: CacheError (unknown protocol, a package that is missing, no credentials).
    """
    if isinstance(place, Store):
        return place
    name = str(place)
    if "://" not in name:
        return LocalStore(Path(name).expanduser())
    from .remote import RemoteStore

    return RemoteStore.open(name)
