"""Index: SAEs and the cache they belong to -> one DuckDB file with everything about every feature.

    saebase index --cache acts --sae runs/l6 --out l6.duckdb

The file is built in a folder beside its place, made durable, and renamed: at `out` there is the
whole database or what was there before.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb

from sae import SAE
from sae.atomic_files import commit

from .collect import SAEState, TokenSpool, collect
from .config import IndexConfig, IndexProgress, OnProgress
from .errors import DatabaseExistsError, IndexingError
from .inputs import IndexedSAE, check_fit, identity_hash, resolve_saes
from .schema import get_meta, migrate, set_meta
from .write import Writer

if TYPE_CHECKING:
    from activation_cache import ActivationCache, LanguageModel

BUILDING_SUFFIX = ".building"


def build_index(
    lm: "LanguageModel",
    saes: "Sequence[SAE | str | Path]",
    cache: "ActivationCache",
    *,
    out: str | Path,
    config: IndexConfig | None = None,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> Path:
    """Index every feature of `saes` over the whole cache, in one pass for each hookpoint.

    lm: the model that the cache was made with. saes: SAEs, or folders of trained ones; sae_id is
        the place in this list.
    out: the database. One that was made from exactly the same things is left as it is and returned
        at once; another one is replaced only with overwrite=True.
    on_progress: told as the work goes on.
    Rows that are not indexed: BOS, rows of massive norm, rows outside an SAE's domain; they are
    counted in saes.n_tokens_skipped.
    Returns: `out`, for FeatureDB.open.
    Raises: IndexingError if the parts don't fit together; DatabaseExistsError. Whatever goes
        wrong, `out` is as it was, and nothing else is left behind.
    """
    path, config = Path(out), config or IndexConfig()
    indexed = resolve_saes(saes, cache)
    check_fit(lm, indexed, cache)
    identity = identity_hash(lm, indexed, cache, config)
    if path.exists():
        if _identity_of(path) == identity:
            return path
        if not overwrite:
            raise DatabaseExistsError(
                f"{path} exists and was made from something else: pass overwrite=True to replace "
                "it, or another out"
            )
    with _building_folder(path) as folder:
        made = folder / "features.duckdb"
        connection = duckdb.connect(str(made))
        try:
            migrate(connection)
            spool = TokenSpool(folder / "tokens.bin")
            writer = Writer(connection, lm, cache, spool, config, on_progress or _ignore)
            _write_all(writer, indexed, cache, spool, config, folder, on_progress or _ignore)
            _write_meta(connection, identity, cache, config)
        finally:
            connection.close()
        commit(made, path)
    return path


def _write_all(
    writer: Writer,
    saes: Sequence[IndexedSAE],
    cache: "ActivationCache",
    spool: TokenSpool,
    config: IndexConfig,
    folder: Path,
    on_progress: OnProgress,
) -> None:
    """One pass for each hookpoint, whose SAEs are written before the next pass begins."""

    def on_rows(n_rows: int) -> None:
        on_progress(IndexProgress("activations", n_rows, cache.n_tokens))

    vocab_size = len(writer.words.texts)
    for hookpoint, group in groupby(_by_hookpoint(saes), key=lambda each: each.hookpoint):
        states = [SAEState(each, config, vocab_size, folder) for each in group]
        collect(cache, hookpoint, states, spool, config, on_rows)
        for state in states:
            writer.write_sae(state)
    if config.keep_documents:
        writer.write_documents()


def _write_meta(
    connection: duckdb.DuckDBPyConnection,
    identity: str,
    cache: "ActivationCache",
    config: IndexConfig,
) -> None:
    set_meta(connection, "identity", identity)
    set_meta(connection, "config", config.model_dump_json())
    set_meta(connection, "cache_fingerprint", cache.fingerprint_hash)
    connection.execute("CHECKPOINT").fetchall()


def _by_hookpoint(saes: Sequence[IndexedSAE]) -> list[IndexedSAE]:
    """SAEs of one hookpoint beside each other, so that they share one pass."""
    first = {each.hookpoint: i for i, each in reversed(list(enumerate(saes)))}
    return sorted(saes, key=lambda each: (first[each.hookpoint], each.sae_id))


def _identity_of(path: Path) -> str | None:
    """The identity that a database was made with; None for a file that is no such database."""
    try:
        with duckdb.connect(str(path), read_only=True) as connection:
            return get_meta(connection, "identity")
    except duckdb.Error:
        return None


@contextmanager
def _building_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` that one process holds, removed when the context closes.

    Raises: IndexingError if the place can't be written, or another process is building there.
    """
    folder = path.with_name(path.name + BUILDING_SUFFIX)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("a+")
    except OSError as error:
        raise IndexingError(f"can't write {folder}: {error.strerror}; choose another out") from None
    with lock:
        _take(lock.fileno(), path)
        try:
            _sweep(folder)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _take(lock: int, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.pread(lock, 64, 0).decode() or "another process"
        raise IndexingError(
            f"{path} is being built by {holder}: wait for it, or choose another out"
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"process {os.getpid()}".encode(), 0)


def _sweep(folder: Path) -> None:
    """Remove what a build that was killed has left."""
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != "lock":
            entry.unlink()


def _ignore(progress: IndexProgress) -> None:
    del progress
