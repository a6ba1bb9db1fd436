"""A bucketed database, opened: its small file on this machine, the rest where it lies.

In: a folder or a URL. Out: what `FeatureDB` needs beside the small file: pages, and the buckets as
tables of a cursor.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.dataset import Dataset

from ..errors import OpenError
from ..feature_rows import FeatureRows, Pair
from ..pages import Ask
from .datasets import BucketFile, dataset, files_by_table, make_empty, tables_of
from .layout import BUCKETED, FEATURES_A_GROUP, FILES, MANIFEST, read_manifest
from .pages import BucketPages
from .places import COPY_AGAIN, LocalPlace, Place, PlacedFile, RemotePlace
from .reader import BucketReader

# Of one table, as they lie in files; parsed they take a few times as much.
_KEPT_FOOTERS_BYTES = 8 << 20
_READS_AT_ONCE = 8
_FEATURES_AT_ONCE = 64
_MACROS = (
    "SELECT function_name, macro_definition FROM duckdb_functions() "
    "WHERE NOT internal AND macro_definition IS NOT NULL"
)


def is_bucketed(path: str | Path) -> bool:
    """Whether a path is to be opened as buckets: a URL, or a folder with a manifest."""
    return is_url(path) or (Path(path) / MANIFEST).is_file()


def is_url(path: str | Path) -> bool:
    """Whether a place is no path of this machine."""
    return "://" in str(path)


class Some(NamedTuple):
    """Which rows a query is about: of features, (sae_id, feature_id), or by their row numbers.

    is_numbered: whether each is to have its number as `rowid`.
    """

    features: Sequence[Pair] = ()
    numbers: Sequence[int] | None = None
    is_numbered: bool = False

    @classmethod
    def of(cls, params: object) -> "Some | None":
        """What a search's query is about, by its parameters; None for any other query."""
        if isinstance(params, dict) and "feature_ids" in params:
            return cls(list(zip(params["sae_ids"], params["feature_ids"], strict=True)), None, True)
        if isinstance(params, dict) and "ids" in params:
            return cls((), params["ids"], True)
        return None


def unwritable(path: str | Path) -> OpenError:
    """What to say to somebody who would write."""
    return OpenError(
        f"{path} is in buckets, which can't be written: write to the database that it was "
        "exported from, and export again"
    )


class Buckets:
    """The buckets beside a small file. small: that file, on this machine. threads: read tables side
    by side; whoever opened the buckets ends them."""

    def __init__(self, place: Place) -> None:
        """Raises: OpenError, SchemaVersionError."""
        self.place, self.root = place, place.root
        manifest = read_manifest(place.manifest(), place.root)
        try:
            listed = pq.read_table(pa.BufferReader(place.checked(FILES, manifest.files)))
            self.files = files_by_table(listed)
        except (pa.ArrowException, KeyError) as error:
            raise place.damaged(FILES, " ".join(str(error).split())) from None
        self.small = place.small(manifest.small)
        self.reader = BucketReader(place, self.files)
        self.threads = ThreadPoolExecutor(_READS_AT_ONCE, "feature-db")
        self._datasets = dict[str, Dataset]()
        self._macros: Mapping[str, str] | None = None

    @classmethod
    def open(cls, path: str | Path, *, read_only: bool = True) -> "Buckets":
        """Raises: OpenError for a place that isn't one, or is to be written; SchemaVersionError."""
        if not read_only:
            raise unwritable(path)
        return cls(RemotePlace(str(path)) if is_url(path) else LocalPlace(Path(path)))

    @property
    def folder(self) -> Path | None:
        """Where they lie on this machine; None of a URL."""
        return self.place.folder if isinstance(self.place, LocalPlace) else None

    def pages(self, ask: Ask, features: FeatureRows) -> BucketPages:
        """What reads pages. ask: runs one query of the small file, which holds features."""
        return BucketPages(ask, features, self.reader, self.threads)

    def attach(
        self, cursor: duckdb.DuckDBPyConnection, query: str, some: "Some | None" = None
    ) -> None:
        """Make the tables that a query names tables of a cursor.

        some: tables about features are to hold these rows alone, copied to memory.
        Raises: OpenError.
        """
        for table in self._named(cursor, query):
            if some is not None and table in FEATURES_A_GROUP:
                make_empty(cursor, table, is_numbered=some.is_numbered)
                for rows in self._some(table, some, self._columns(table, query, some)):
                    _fill(cursor, table, rows)
            elif schema := self.reader.schema(table):
                cursor.register(table, self._dataset(table, schema))
            else:
                make_empty(cursor, table)

    def _columns(self, table: str, query: str, some: "Some") -> list[str] | None:
        """Those of a table that a search names; None for all, where the query isn't a search's."""
        schema = self.reader.schema(table)
        if schema is None or not some.is_numbered:
            return None
        said = set(re.findall(r"\w+", query)) | {"sae_id", "feature_id"}
        return [name for name in schema.names if name in said]

    def _some(self, table: str, some: "Some", columns: list[str] | None) -> Iterator[pa.Table]:
        """Rows of a table, read side by side."""
        if some.numbers is not None:
            groups = self.reader.by_group(table, some.numbers)
            yield from self.threads.map(
                partial(self.reader.numbered, table, columns=columns), groups
            )
            return
        work = partial(self.reader.rows, table, columns=columns, is_numbered=some.is_numbered)
        ids: dict[int, list[int]] = {}
        for sae_id, feature_id in some.features:
            ids.setdefault(sae_id, []).append(feature_id)
        parts = [
            (sae_id, of[start : start + _FEATURES_AT_ONCE])
            for sae_id, of in sorted((sae_id, sorted(of)) for sae_id, of in ids.items())
            for start in range(0, len(of), _FEATURES_AT_ONCE)
        ]
        found = self.threads.map(work, *zip(*parts, strict=True)) if parts else ()
        yield from (rows for rows in found if rows is not None)

    def for_strangers(self, connection: duckdb.DuckDBPyConnection, query: str) -> list[str]:
        """The tables that untrusted SQL may name, in files here. Raises: OpenError of a URL."""
        if self.folder is None:
            raise OpenError(
                f"untrusted SQL reads no network, and {self.root} is a URL: copy it to a folder of "
                "this machine, and open that"
            )
        with connection.cursor() as cursor:
            return self._named(cursor, query)

    def explained(self, message: str) -> str:
        """DuckDB's message, in the words of whoever failed where that was no part of DuckDB."""
        found = re.search(
            r"(?:stream registered as .*? failed|buckets can't be read): (.*)", message
        )
        if not found:
            return message
        said = found[1].partition(" Detail: Python exception")[0].removeprefix("IOError: ")
        return said if "export again" in said else f"{self.root}: {said}: {COPY_AGAIN}"

    def _named(self, cursor: duckdb.DuckDBPyConnection, query: str) -> list[str]:
        if self._macros is None:
            self._macros = dict(cursor.execute(_MACROS).fetchall())
        return tables_of(query, BUCKETED, self._macros)

    def _dataset(self, table: str, schema: pa.Schema) -> Dataset:
        """A table's dataset. It keeps the footers that were read, so that a large one isn't kept
        itself."""
        if table in self._datasets:
            return self._datasets[table]
        files = self.files[table]
        made = dataset(files, self._source, schema)
        if sum(file.footer_bytes for file in files) <= _KEPT_FOOTERS_BYTES:
            self._datasets[table] = made
        return made

    def _source(self, file: BucketFile) -> str | pa.NativeFile:
        if self.folder is not None:
            return str(self.folder / file.name)
        opened = PlacedFile(self.place, file.name, file.n_bytes, file.footer_bytes)
        return pa.PythonFile(opened, mode="r")


def _fill(cursor: duckdb.DuckDBPyConnection, table: str, rows: pa.Table) -> None:
    cursor.register("incoming", rows)
    cursor.execute(f"INSERT INTO temp.{table} BY NAME FROM incoming").fetchall()
    cursor.unregister("incoming")
