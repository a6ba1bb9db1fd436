"""Byte ranges of remote files on this machine, a file each; the least recently used go first.

In: a key (which content of which file) and a range. Out: its bytes. A range is written aside and
renamed, so that it is there whole or not at all; several processes may share the folder. What is
being uploaded lies beside them, and the locks by which writers on one machine know of each other.
"""

import fcntl
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import xxhash
from huggingface_hub import constants

from .durable import DurableFile, faults_told, locked, scratch
from .errors import CacheError

log = logging.getLogger(__name__)

MAX_BYTES = 20_000_000_000
_OUTGOING, _LOCKS = ".outgoing", ".locks"
_JUST_MADE_S = 60


class _StoredRange(NamedTuple):
    used_at: int
    n_bytes: int
    path: str


class BlockCache:
    """A folder of ranges, `KEY/BEGIN-END`, with a bound on their bytes."""

    def __init__(self, folder: Path, max_bytes: int):
        self.folder, self.max_bytes = folder, max_bytes
        self._room = -1  # that may be used before it is looked again; unknown at first
        self._guard = threading.Lock()
        self._is_told = False

    @staticmethod
    def key(url: str, version: str) -> str:
        """The name of one content of a file."""
        return xxhash.xxh3_128_hexdigest(f"{url}\n{version}".encode())

    def has(self, key: str, begin: int, end: int) -> bool:
        """Whether a range is here; it is then among the last to go."""
        path = self._path(key, begin, end)
        try:
            os.utime(path)
            return path.stat().st_size == end - begin
        except OSError:
            return False

    def read_into(self, key: str, begin: int, end: int, out: memoryview) -> bool:
        """Fill `out` with a range. False if it is not here, whole."""
        if not self.has(key, begin, end):
            return False
        try:
            with self._path(key, begin, end).open("rb", buffering=0) as file:
                return file.readinto(out) == end - begin
        except OSError:  # another process made room
            return False

    def put(self, key: str, begin: int, data: bytes) -> None:
        """Keep a range, if there is room for it on the disk: reading goes on without."""
        path = self._path(key, begin, begin + len(data))
        if len(data) > self.max_bytes:
            return
        try:
            self._make_room(len(data))
            for _ in range(2):  # the folder may go while another process makes room
                path.parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):
                    _write_aside(path, data)
                    return
        except OSError as error:
            if not self._is_told:
                log.warning("can't keep blocks in %s: %s", self.folder, error.strerror)
            self._is_told = True

    def forget(self, key: str) -> None:
        """Remove all ranges of a key."""
        shutil.rmtree(self.folder / key, ignore_errors=True)

    @contextmanager
    def outgoing(self, name: str, *, reserve_bytes: int) -> Iterator[tuple[DurableFile, Path]]:
        """A file to fill, and then to upload; removed at the end. Raises: DiskFull, CacheError."""
        folder = self._made(_OUTGOING)
        path = folder / f"{uuid.uuid4().hex}-{Path(name).name}"
        with scratch(path, reserve_bytes=reserve_bytes) as file:
            yield file, path

    @contextmanager
    def locked(self, url: str) -> Iterator[None]:
        """Be the one process of this machine that writes to a URL. Raises: CacheBusy."""
        self._sweep()
        folder = self._made(_LOCKS) / self.key(url, "")
        with faults_told(folder, 0):
            folder.mkdir(exist_ok=True)
        with locked(folder, shown_as=url):
            yield

    def machine(self) -> str:
        """What tells this folder from those of other machines and containers of the same name."""
        path = self._made(_LOCKS) / "machine"
        with faults_told(path, 0):
            with suppress(FileExistsError), path.open("x") as file:
                file.write(uuid.uuid4().hex)
            return path.read_text()

    def _path(self, key: str, begin: int, end: int) -> Path:
        return self.folder / key / f"{begin}-{end}"

    def _made(self, inside: str) -> Path:
        folder = self.folder / inside
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(f"can't make the folder {folder}: {error.strerror}") from error
        return folder

    def _make_room(self, n_bytes: int) -> None:
        """Before `n_bytes` are written: remove what was not used for longest, if need be."""
        with self._guard:
            self._room -= n_bytes
            if self._room >= 0:
                return
            stored = self._stored()
            total = n_bytes + sum(each.n_bytes for each in stored)
            if total > self.max_bytes:
                for each in sorted(stored):
                    if total <= self.max_bytes - self.max_bytes // 10:
                        break
                    with suppress(OSError):
                        Path(each.path).unlink()
                    total -= each.n_bytes
            self._room = min(self.max_bytes - total, self.max_bytes // 20)

    def _stored(self) -> list[_StoredRange]:
        """All ranges; folders that have become empty are removed."""
        found = []
        for folder in _entries(self.folder):
            if folder.name.startswith(".") or not folder.is_dir():
                continue
            inside = _entries(Path(folder.path))
            if not inside:
                with suppress(OSError):
                    Path(folder.path).rmdir()
            for entry in inside:
                with suppress(OSError):
                    stat = entry.stat()
                    found.append(_StoredRange(stat.st_mtime_ns, stat.st_size, entry.path))
        return found

    def _sweep(self) -> None:
        """Remove outgoing files of processes that are no more: nobody holds their lock."""
        for entry in _entries(self.folder / _OUTGOING):
            with suppress(OSError), Path(entry.path).open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - entry.stat().st_mtime > _JUST_MADE_S:  # not locked yet
                    Path(entry.path).unlink()


_current: BlockCache | None = None


def configure_block_cache(folder: str | Path | None = None, max_bytes: int | None = None) -> None:
    """Where blocks of remote caches are kept, and how many bytes of them.

    folder: left out, `saebase/blocks` in the Hugging Face cache. max_bytes: left out, 20 GB. What
    is being uploaded needs room there too. Raises: CacheError.
    """
    global _current
    if max_bytes is not None and max_bytes < 0:
        raise CacheError(f"max_bytes={max_bytes}: expected 0 or more")
    home = Path(folder).expanduser() if folder else Path(constants.HF_HOME) / "saebase" / "blocks"
    _current = BlockCache(home, MAX_BYTES if max_bytes is None else max_bytes)


def block_cache() -> BlockCache:
    """The block cache that is in use."""
    if _current is None:
        configure_block_cache()
    assert _current is not None
    return _current


def _write_aside(path: Path, data: bytes) -> None:
    aside = path.with_name(f"{uuid.uuid4().hex}.partial")
    try:
        aside.write_bytes(data)
        aside.replace(path)
    finally:
        with suppress(OSError):
            aside.unlink()


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []
