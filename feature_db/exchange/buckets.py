"""Buckets: a whole database as Parquet files by feature and a small DuckDB file, in a folder or at
a URL, where `FeatureDB.open` opens it.

Files first, the manifest last. What is killed on the way leaves no manifest, and so no database; in
a folder it leaves nothing at all.
"""

import hashlib
import tempfile
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from activation_cache.store import LocalStore, Store, open_store

from ..bucketed import is_url
from ..bucketed.datasets import FILES_SCHEMA, BucketFile
from ..bucketed.layout import BUCKETED, FILES, FORMAT, FORMAT_VERSION, MANIFEST, SMALL, Part
from ..bucketed.places import storage_faults_as
from ..errors import ExportError
from .bucket_files import encoded_files
from .chosen import Chosen
from .destination import is_export, manifest_text, new_folder
from .parquet_folder import manifest
from .small_file import write_small

_ON_THEIR_WAY = 4
_REMOVED_AT_ONCE = 16
_READ_BYTES = 4 << 20


def write_buckets(chosen: Chosen, out: str | Path, overwrite: bool) -> None:
    """Write all of a database. out: a folder, or a URL that fsspec knows.

    Raises: ExportError for a place that is taken or can't be written, for a part of a database, and
        for one that is in buckets already.
    """
    if not chosen.is_all:
        raise ExportError(
            "buckets hold whole databases: leave out --features, --feature and --sae-id, or choose "
            "parquet"
        )
    if chosen.db.is_bucketed:
        raise ExportError(f"{chosen.db.path} is in buckets already: copy its files")
    with storage_faults_as(ExportError):
        if is_url(out):
            _to_url(chosen, str(out), overwrite)
            return
        with new_folder(Path(out), overwrite=overwrite) as folder:
            _fill(chosen, LocalStore(folder))


def _to_url(chosen: Chosen, url: str, overwrite: bool) -> None:
    store = open_store(url)
    with store.begin():
        _require_free(store, overwrite)
        _clear(store)
        _fill(chosen, store)


def _fill(chosen: Chosen, store: Store) -> None:
    """All files, then the manifest."""
    files = list[BucketFile]()
    with _Sending(store) as sending:
        for i, table in enumerate(BUCKETED):
            for encoded in encoded_files(chosen.db, table):
                sending.write(encoded.file.name, encoded.data)
                files.append(encoded.file)
                chosen.tell(i, len(BUCKETED) + 1, "tables")
        small = _send_small(chosen, store)
    listed = _listed(files)
    store.write(FILES, listed)
    parts = {
        "small": small.model_dump(),
        "files": Part(n_bytes=len(listed), sha256=hashlib.sha256(listed).hexdigest()).model_dump(),
    }
    content = manifest(chosen, FORMAT, **parts) | {"format_version": FORMAT_VERSION}
    store.write(MANIFEST, manifest_text(content))
    chosen.tell(len(BUCKETED) + 1, len(BUCKETED) + 1, "tables")


def _listed(files: list[BucketFile]) -> bytes:
    sink = pa.BufferOutputStream()
    rows = pa.Table.from_pylist([file._asdict() for file in files], FILES_SCHEMA)
    pq.write_table(rows, sink, compression="zstd")
    return bytes(sink.getvalue().to_pybytes())


def _send_small(chosen: Chosen, store: Store) -> Part:
    """The small file, made on this machine."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(prefix="saebase-") as folder:
        path = Path(folder) / SMALL
        write_small(chosen.db, path)
        n_bytes = path.stat().st_size
        with path.open("rb") as made, store.written(SMALL, reserve_bytes=n_bytes) as file:
            while part := made.read(_READ_BYTES):
                digest.update(part)
                file.write(part)
    return Part(n_bytes=n_bytes, sha256=digest.hexdigest())


class _Sending:
    """Writes files on threads, a few at a time. A context: it ends with all of them there."""

    def __init__(self, store: Store) -> None:
        self._store, self._waiting = store, deque[Future[None]]()
        self._threads = ThreadPoolExecutor(_ON_THEIR_WAY, "feature-db")

    def __enter__(self) -> "_Sending":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            while self._waiting and kind is None:
                self._waiting.popleft().result()
        finally:
            self._threads.shutdown(cancel_futures=True)

    def write(self, name: str, data: pa.Buffer) -> None:
        """Write a file; waits while as many are on their way. Raises: CacheError of one of them."""
        if len(self._waiting) >= _ON_THEIR_WAY:
            self._waiting.popleft().result()
        self._waiting.append(self._threads.submit(self._store.write, name, data.to_pybytes()))


def _require_free(store: Store, overwrite: bool) -> None:
    there = [name for name in store.names() if not name.startswith(".")]
    if not there:
        return
    if not overwrite:
        raise ExportError(
            f"{store.root} holds {there[0]}: choose another place, or overwrite what an export "
            "made (--overwrite)"
        )
    foreign = set(there) - {MANIFEST, SMALL, FILES, *BUCKETED}
    if foreign or (MANIFEST in there and not is_export(store.read(MANIFEST))):
        raise ExportError(
            f"{store.root} holds {min(foreign, default=MANIFEST)}, which no export in buckets "
            "made, so it isn't overwritten: choose another place"
        )


def _clear(store: Store) -> None:
    """Remove what an earlier export left, the manifest first: from then on it is no database."""
    store.remove(MANIFEST)
    names = [f"{table}/{name}" for table in BUCKETED for name in store.names(table)]
    with ThreadPoolExecutor(_REMOVED_AT_ONCE, "feature-db") as threads:
        for _ in threads.map(store.remove, names):
            pass
