"""Where a bucketed database lies: a folder, or a URL whose bytes are kept on this machine.

In: names and byte ranges. Out: bytes, or one line of error. Ranges of a URL go through the block
cache of `activation_cache`, under keys that hold the manifest's hash: of a database that was
replaced nothing old is read.
"""

import hashlib
import os
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from activation_cache import CacheError
from activation_cache.block_cache import BlockCache, block_cache
from activation_cache.remote_files import RemoteFiles
from sae.atomic_files import sha256

from ..errors import FeatureDBError, OpenError
from .layout import MANIFEST, SMALL, Part
from .ranged_file import RangedFile

_FETCHED_AT_ONCE = 32 << 20
# Several threads may find the same copy damaged.
_FORGOTTEN_AT_MOST = 4
COPY_AGAIN = "copy it again, or export again"
_OTHER_HASH = "its sha256 isn't the manifest's"


class Place(ABC):
    """Files below a root, which messages name them by."""

    root: str

    @abstractmethod
    def manifest(self) -> bytes:
        """The text of the manifest. Raises: OpenError without one."""

    @abstractmethod
    def read(self, name: str, begin: int, end: int) -> bytes:
        """Bytes begin..end-1 of a file. Raises: OpenError if it hasn't got them all."""

    @abstractmethod
    def small(self, part: Part) -> Path:
        """features.duckdb on this machine, its hash verified. Raises: OpenError."""

    def forget(self, name: str) -> bool:
        """Drop what is kept here of a file. Returns: whether reading it again may help."""
        del name
        return False

    def checked(self, name: str, part: Part) -> bytes:
        """A whole file, its hash verified. Raises: OpenError."""
        while True:
            data = self.read(name, 0, part.n_bytes)
            if hashlib.sha256(data).hexdigest() == part.sha256:
                return data
            if not self.forget(name):
                raise self.damaged(name, _OTHER_HASH)

    def damaged(self, name: str, how: str) -> OpenError:
        """What to say of a file."""
        return OpenError(f"{self.root}/{name} is damaged ({how}): {COPY_AGAIN}")

    def missing(self, name: str) -> OpenError:
        """What to say of a file that isn't there."""
        if name == MANIFEST:
            return OpenError(
                f"{self.root} holds no {MANIFEST}: expected a database exported with --format "
                "buckets, to its end"
            )
        return OpenError(f"{self.root}/{name} is missing: {COPY_AGAIN}")


class LocalPlace(Place):
    """A folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, str(folder)

    def manifest(self) -> bytes:
        with self._told(MANIFEST):
            return (self.folder / MANIFEST).read_bytes()

    def read(self, name: str, begin: int, end: int) -> bytes:
        with self._told(name), (self.folder / name).open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), end - begin, begin)
        if len(data) != end - begin:
            raise self.damaged(name, "its end is missing")
        return data

    def small(self, part: Part) -> Path:
        path = self.folder / SMALL
        with self._told(SMALL):
            if path.stat().st_size != part.n_bytes or sha256(path) != part.sha256:
                raise self.damaged(SMALL, _OTHER_HASH)
        return path

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError):
            raise self.missing(name) from None
        except OSError as error:
            raise OpenError(f"{self.root}/{name} can't be read: {error.strerror}") from None


class RemotePlace(Place):
    """A URL."""

    def __init__(self, url: str) -> None:
        with storage_faults_as(OpenError):
            self._files = RemoteFiles.open(url)
        self.root, self._version = self._files.root, ""
        self._forgotten, self._guard = Counter[str](), threading.Lock()

    def manifest(self) -> bytes:
        try:
            with storage_faults_as(OpenError):
                text = self._files.read(MANIFEST)
        except FileNotFoundError:
            raise self.missing(MANIFEST) from None
        self._version = hashlib.sha256(text).hexdigest()
        return text

    def read(self, name: str, begin: int, end: int) -> bytes:
        key, kept = self._key(name), bytearray(end - begin)
        if block_cache().read_into(key, begin, end, memoryview(kept)):
            return bytes(kept)
        data = self._fetched(name, begin, end)
        block_cache().put(key, begin, data)
        return data

    def forget(self, name: str) -> bool:
        with self._guard:
            self._forgotten[name] += 1
            n_times = self._forgotten[name]
        block_cache().forget(self._key(name))
        return n_times <= _FORGOTTEN_AT_MOST

    def small(self, part: Part) -> Path:
        """Fetched once; among other things of the block cache, so that it may be fetched again."""
        path = block_cache().folder / self._key(SMALL) / SMALL
        with suppress(OSError):
            os.utime(path)
            if path.stat().st_size == part.n_bytes and sha256(path) == part.sha256:
                return path
        aside = path.with_name(f"{SMALL}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fetch(aside, part)
            aside.replace(path)
        except OSError as error:
            raise OpenError(
                f"{path.parent} can't hold {self.root}/{SMALL}: {error.strerror}; make room, or "
                "choose another folder (SAEBASE_BLOCKS)"
            ) from None
        finally:
            with suppress(OSError):
                aside.unlink()
        return path

    def _fetch(self, aside: Path, part: Part) -> None:
        digest = hashlib.sha256()
        with aside.open("wb") as file:
            for begin in range(0, part.n_bytes, _FETCHED_AT_ONCE):
                end = min(begin + _FETCHED_AT_ONCE, part.n_bytes)
                data = self._fetched(SMALL, begin, end)
                digest.update(data)
                file.write(data)
        if digest.hexdigest() != part.sha256:
            raise self.damaged(SMALL, _OTHER_HASH)

    def _fetched(self, name: str, begin: int, end: int) -> bytes:
        try:
            with storage_faults_as(OpenError):
                data = self._files.read(name, begin, end)
        except FileNotFoundError:
            raise self.missing(name) from None
        if len(data) != end - begin:
            raise self.damaged(name, "its end is missing")
        return data

    def _key(self, name: str) -> str:
        return BlockCache.key(f"{self.root}/{name}", self._version)


class PlacedFile(RangedFile):
    """A file of a place."""

    def __init__(self, place: Place, name: str, n_bytes: int, footer_bytes: int) -> None:
        super().__init__(n_bytes)
        self._place, self._name = place, name
        self._footer_at, self._footer = n_bytes - footer_bytes, b""

    def range(self, begin: int, end: int) -> bytes:
        try:
            if end < self._n_bytes and begin < self._footer_at:
                return self._place.read(self._name, begin, end)
            if not self._footer:
                self._footer = self._place.read(self._name, self._footer_at, self._n_bytes)
        except OpenError as error:
            raise OSError(str(error)) from None
        # Looking for a footer pyarrow takes the last 64 KiB: what lies before it goes unused.
        padding = bytes(max(self._footer_at - begin, 0))
        return padding + self._footer[max(begin - self._footer_at, 0) : end - self._footer_at]


@contextmanager
def storage_faults_as(kind: type[FeatureDBError]) -> Iterator[None]:
    """Faults of a store, which `activation_cache` tells in one line, as this package's error."""
    try:
        yield
    except CacheError as error:
        raise kind(str(error)) from None
