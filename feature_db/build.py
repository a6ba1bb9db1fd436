"""Index: SAEs and the cache they belong to -> one DuckDB file with everything about every feature.

    saebase index --cache acts --sae runs/l6 --out l6.duckdb

The file is built in a folder beside its place, made durable, and renamed: at `out` there is the
whole database or what was there before.
"""

import datetime
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import duckdb

from sae import SAE
from sae.atomic_files import commit

from .config import IndexConfig, IndexProgress, OnProgress
from .errors import DatabaseExistsError, IndexingError
from .explanations import carry_explanations
from .indexing.collect import Collector
from .indexing.directions import NearestFeatures
from .indexing.parts import PartRange, PartsFolder, part_settings, parts_folder, take_lock
from .indexing.text_rows import TextRows
from .indexing.write import SAERows, Writer, sae_row
from .inputs import IndexedSAE, check_fit, identity_hash, resolve_saes
from .schema import get_meta, new_database, set_meta
from .transactions import transaction
from .words import write_words

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
    parts: Sequence[str | Path] = (),
    created_at: datetime.datetime | None = None,
) -> Path:
    """Index every feature of `saes` over the whole cache, in one pass for each hookpoint.

    lm: the model that the cache was made with. saes: SAEs, or folders of trained ones; sae_id is
        the place in this list.
    out: the database. One that was made from exactly the same things is left as it is and returned
        at once. One of fewer SAEs, or of the same text as far as it went, is extended: what its
        parts (`out`.parts) hold isn't counted again. Another one is replaced only with
        overwrite=True. Labels by people, files and language models are carried over to SAEs of
        the same weights.
    parts: folders with parts that `index_parts` counted elsewhere.
    created_at: UTC, for `saes`; now, if left out. With it equal the same things give the same
        rows in the same order (`FeatureDB.content_hash`), wherever parts were counted.
    on_progress: told as the work goes on.
    Rows that are not indexed: BOS, rows of massive norm, rows outside an SAE's domain; they are
    counted in saes.n_tokens_skipped.
    Returns: `out`, for FeatureDB.open.
    Raises: IndexingError if the parts don't fit together; DatabaseExistsError. Whatever goes
        wrong, `out` is as it was; finished parts stay, and the next build goes on from them.
    """
    path, config, told = Path(out), config or IndexConfig(), on_progress or _ignore
    indexed = resolve_saes(saes, cache)
    check_fit(lm, indexed, cache)
    identity = identity_hash(lm, indexed, cache, config)
    folder = parts_folder(path)
    found = _MadeFrom.read(path)
    is_extended = found is not None and found.is_part_of(indexed, config)
    if path.exists():
        if found is not None and found.identity == identity:
            return path
        if not overwrite and not (folder.is_dir() and is_extended):
            raise DatabaseExistsError(
                f"{path} exists and was made from something else: pass overwrite=True to replace "
                "it, or another out"
            )
    with _building_folder(path) as building:
        if overwrite and not is_extended:
            shutil.rmtree(folder, ignore_errors=True)
        text = _Text(
            lm, cache, indexed, PartsFolder(folder, [Path(each) for each in parts]), config
        )
        text.count(told)
        made = building / "features.duckdb"
        now = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
        with new_database(made) as connection:
            text.write(
                Writer(connection, lm, text.rows(), text.nearest, config, told), created_at or now
            )
            _carry(path, connection)
            write_words(connection)
            _write_meta(connection, identity, cache, config)
        commit(made, path)
    return path


def index_parts(
    lm: "LanguageModel",
    saes: "Sequence[SAE | str | Path]",
    cache: "ActivationCache",
    *,
    out: str | Path,
    config: IndexConfig | None = None,
    rank: int = 0,
    world_size: int = 1,
    on_progress: OnProgress | None = None,
) -> Path:
    """Count every world_size-th part of the text, from the rank-th on, for a later `build_index`.

    out: the folder for parts: that of the database to be (`NAME.duckdb.parts`), or one for its
        `parts`. Processes may share it. Other arguments are those of build_index.
    Returns: `out`.
    Raises: IndexingError.
    """
    folder, config = Path(out), config or IndexConfig()
    indexed = resolve_saes(saes, cache)
    check_fit(lm, indexed, cache)
    _Text(lm, cache, indexed, PartsFolder(folder), config).count(
        on_progress or _ignore, rank, world_size
    )
    return folder


class _Text:
    """The text of a cache in parts, and what was counted on them."""

    def __init__(
        self,
        lm: "LanguageModel",
        cache: "ActivationCache",
        saes: Sequence[IndexedSAE],
        parts: PartsFolder,
        config: IndexConfig,
    ) -> None:
        self._saes, self._parts, self._config = saes, parts, config
        self._vocab_size = lm.vocab_size
        self.nearest = NearestFeatures(config.n_neighbors)
        norms = {each.hookpoint: cache.max_norm(each.hookpoint) for each in saes}
        found = parts.require(part_settings(config, lm.vocab_size, norms))["found"]["max_norms"]
        self._norms = norms | {name: float(norm) for name, norm in found.items()}
        self._cache = cache.with_max_norms(self._norms)
        self._ranges = parts.ranges(cache, config.part_rows)
        self._sources: dict[tuple[PartRange, str], str] = {}

    def count(self, on_progress: OnProgress, rank: int = 0, world_size: int = 1) -> None:
        """Count the parts that aren't there yet; of several processes, this one's share."""
        mine = self._ranges[rank::world_size]
        n_rows, n_done = sum(part.stop - part.first for part in mine), 0

        def on_rows(n: int) -> None:
            nonlocal n_done
            n_done += n
            on_progress(IndexProgress("activations", n_done, n_rows))

        collector = Collector(
            self._cache, self._parts, self._config, self._vocab_size, self.nearest, on_rows
        )
        for hookpoint, group in groupby(_by_hookpoint(self._saes), key=lambda each: each.hookpoint):
            saes, n_done = list(group), 0
            for part in mine:
                missing = [each for each in saes if self._counted(part, each) is None]
                if missing:
                    collector.make(part, self._source(part, hookpoint), hookpoint, missing)
                else:
                    on_rows(part.stop - part.first)

    def rows(self) -> TextRows:
        """The tokens of all rows."""
        return TextRows(self._parts.rows_folder(part) for part in self._ranges)

    def write(self, writer: Writer, created_at: datetime.datetime) -> None:
        """Write the tables of all SAEs, the tokens and the documents."""
        writer.write_vocabulary()
        for each in self._saes:
            folders = [self._counted(part, each) for part in self._ranges]
            found = SAERows.of(each, [f for f in folders if f], self._norms[each.hookpoint])
            provenance = self._cache.provenance(each.hookpoint)
            about = sae_row(found, provenance, self._cache.fingerprint_hash, created_at)
            writer.write_sae(found, about)
        writer.write_similar(self._saes)
        if self._config.keep_documents:
            writer.write_documents(self._cache.sources)

    def _counted(self, part: PartRange, sae: IndexedSAE) -> Path | None:
        return self._parts.of(part, sae.weights_hash, self._source(part, sae.hookpoint))

    def _source(self, part: PartRange, hookpoint: str) -> str:
        """The hash of a part's rows, computed once."""
        if (part, hookpoint) not in self._sources:
            self._sources[part, hookpoint] = self._cache.rows_hash(hookpoint, part.shards)
        return self._sources[part, hookpoint]


def _carry(path: Path, connection: duckdb.DuckDBPyConnection) -> None:
    """What was said of features in the database that this one takes the place of."""
    if path.exists():
        with duckdb.connect(str(path), read_only=True) as old, transaction(connection):
            carry_explanations(old, connection)


class _MadeFrom(NamedTuple):
    """What a database was made from. config: as JSON. saes: (sae_id, weights_hash) of each."""

    identity: str | None
    config: str | None
    saes: set[tuple[int, str]]

    @classmethod
    def read(cls, path: Path) -> "_MadeFrom | None":
        """None for a file that is no such database, and where there is none."""
        try:
            with duckdb.connect(str(path), read_only=True) as connection:
                rows = connection.execute("SELECT sae_id, weights_hash FROM saes").fetchall()
                saes = {(int(number), digest) for number, digest in rows}
                identity, options = (get_meta(connection, name) for name in ("identity", "config"))
                return cls(identity, options, saes)
        except duckdb.Error:
            return None

    def is_part_of(self, saes: Sequence[IndexedSAE], config: IndexConfig) -> bool:
        """Whether it holds some of these SAEs, at the same places, with the same options."""
        wanted = {(each.sae_id, each.weights_hash) for each in saes}
        return self.config == json.dumps(config.identity()) and self.saes <= wanted


def _write_meta(
    connection: duckdb.DuckDBPyConnection,
    identity: str,
    cache: "ActivationCache",
    config: IndexConfig,
) -> None:
    set_meta(connection, "identity", identity)
    set_meta(connection, "config", json.dumps(config.identity()))
    set_meta(connection, "cache_fingerprint", cache.fingerprint_hash)


def _by_hookpoint(saes: Sequence[IndexedSAE]) -> list[IndexedSAE]:
    """SAEs of one hookpoint beside each other, so that they share one pass."""
    first = {each.hookpoint: i for i, each in reversed(list(enumerate(saes)))}
    return sorted(saes, key=lambda each: (first[each.hookpoint], each.sae_id))


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
        take_lock(lock.fileno(), path)
        try:
            _sweep(folder)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what a build that was killed has left."""
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != "lock":
            entry.unlink()


def _ignore(progress: IndexProgress) -> None:
    del progress
