"""A cache at a URL: read through blocks on this machine, written file by whole file.

In: a URL (`s3://bucket/acts`). Out: a `Store`. Byte ranges of shards are kept on this machine by
the version of the object that they are of; records and manifests are read anew each time. A file
that is written lies on this machine until it is whole, then it is uploaded, if its writer still
holds the lease.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.request import url2pathname

from .block_cache import BlockCache, block_cache
from .durable import DurableFile
from .lease import Lease
from .read_ahead import in_parallel
from .remote_files import RemoteFile, RemoteFiles
from .store import ByteRange, LocalStore, Store

READS_AT_ONCE = 16


class RemoteStore(Store):
    """Files below a URL."""

    is_remote = True

    def __init__(self, files: RemoteFiles):
        self._files, self.root = files, files.root
        self._listings: dict[str, dict[str, RemoteFile]] = {}
        self._lease: Lease | None = None

    @classmethod
    def open(cls, url: str) -> Store:
        """The store at a URL; `file://` is a folder of this machine.

        Raises: CacheError (unknown protocol, missing package, no credentials, no such bucket).
        """
        protocol, _, path = url.partition("://")
        if protocol in ("file", "local"):
            return LocalStore(Path(url2pathname(path)))
        return cls(RemoteFiles.open(url))

    def child(self, folder: str) -> "RemoteStore":
        return RemoteStore(self._files.child(folder))

    def exists(self) -> bool:
        return bool(self._files.listed())

    def has(self, name: str) -> bool:
        return self._files.has(name)

    def names(self, folder: str = "") -> list[str]:
        return sorted(self._files.listed(folder))

    def read(self, name: str) -> bytes:
        return self._files.read(name)

    def read_all(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        names = list(names)
        with ThreadPoolExecutor(READS_AT_ONCE, thread_name_prefix="remote") as threads:
            yield from zip(names, threads.map(self.read, names), strict=True)

    def size(self, name: str) -> int:
        if (found := self._listed(name)) is None:
            raise FileNotFoundError(f"{self.path(name)} is missing")
        return found.n_bytes

    def read_into(self, place: ByteRange, out: memoryview, *, again: bool = False) -> bool:
        found = self._listed(place.name, again=again)
        if found is None or found.n_bytes < place.end:
            return False
        key, blocks = self._key(place.name, found), block_cache()
        if not again and blocks.read_into(key, place.begin, place.end, out):
            return True
        data = self._bring(place, key)
        if len(data) != len(out):
            return False
        out[:] = data
        return True

    def fetch(self, wanted: list[ByteRange]) -> None:
        missing = []
        for place in dict.fromkeys(wanted):
            found = self._listed(place.name)
            if found is None or found.n_bytes < place.end:
                continue  # `read_into` will say so
            key = self._key(place.name, found)
            if not block_cache().has(key, place.begin, place.end):
                missing.append((place, key))
        if sum(place.end - place.begin for place, _ in missing) > block_cache().max_bytes:
            return  # they would push each other out, and be fetched twice
        in_parallel(self._keep, missing, READS_AT_ONCE)

    def forget(self, name: str) -> None:
        if found := self._listed(name, again=True):
            block_cache().forget(self._key(name, found))

    @contextmanager
    def written(self, name: str, *, reserve_bytes: int = 0) -> Iterator[DurableFile]:
        with block_cache().outgoing(name, reserve_bytes=reserve_bytes) as (file, local):
            yield file
            file.trim()
            if self._lease is not None:
                self._lease.require()
            self._listings.clear()
            self._files.upload(local, name)

    def remove(self, name: str) -> None:
        self._listings.clear()
        self._files.remove(name)

    @contextmanager
    def begin(self) -> Iterator[None]:
        lease = Lease(self._files, block_cache().machine())
        with block_cache().locked(self.root), lease.held():
            self._lease = lease
            try:
                yield
            finally:
                self._lease = None

    def _keep(self, place: ByteRange, key: str) -> None:
        self._bring(place, key)

    def _bring(self, place: ByteRange, key: str) -> bytes:
        """Bytes of a file, which are kept on this machine; fewer if it ends too early."""
        try:
            data = self._files.read(*place)
        except FileNotFoundError:
            return b""
        if len(data) == place.end - place.begin:
            block_cache().put(key, place.begin, data)
        return data

    def _listed(self, name: str, *, again: bool = False) -> RemoteFile | None:
        """What is known of a file. Its folder is listed whole, once: shards are never replaced
        while they are read, but by a repair."""
        folder, _, base = name.rpartition("/")
        listing = self._listings.get(folder, {})
        if again or base not in listing:
            listing = self._listings[folder] = self._files.listed(folder)
        return listing.get(base)

    def _key(self, name: str, found: RemoteFile) -> str:
        return BlockCache.key(self.path(name), found.version)
