"""A bucketed database, opened: its small file on this machine, the rest where it lies.

In: a folder or a URL. Out: what `FeatureDB` needs beside the small file: pages, and the buckets as
tables of a cursor.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.dataset import Dataset

from ..errors import OpenError
from ..pages import Ask
from .datasets import BucketFile, dataset, files_by_table, make_empty, tables_of
from .layout import BUCKETED, FEATURES_A_GROUP, FILES, MANIFEST, read_manifest
from .pages import BucketPages
from .places import COPY_AGAIN, LocalPlace, Place, RangeFile, RemotePlace
from .reader import BucketReader

Pair = tuple[int, int]
# Of one table, as they lie in files; parsed they take a few times as much.
_KEPT_FOOTERS_BYTES = 8 << 20
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


def unwritable(path: str | Path) -> OpenError:
    """What to say to somebody who would write."""
    return OpenError(
        f"{path} is in buckets, which can't be written: write to the database that it was "
        "exported from, and export again"
    )


class Buckets:
    """The buckets beside a small file. small: that file, on this machine."""

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
        self._pages: BucketPages | None = None
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

    def pages(self, ask: Ask) -> BucketPages:
        """What reads pages, and rows for `attach_some`."""
        self._pages = BucketPages(ask, self.reader)
        return self._pages

    def attach(self, cursor: duckdb.DuckDBPyConnection, query: str) -> None:
        """Make the tables that a query names tables of a cursor. Raises: OpenError."""
        for table in self._named(cursor, query):
            if schema := self.reader.schema(table):
                cursor.register(table, self._dataset(table, schema))
            else:
                make_empty(cursor, table)

    def attach_some(
        self, cursor: duckdb.DuckDBPyConnection, query: str, pairs: Sequence[Pair]
    ) -> None:
        """As `attach`, but tables about features hold the rows of some alone, copied to memory."""
        assert self._pages is not None
        named = self._named(cursor, query)
        some = self._pages.tables([table for table in named if table in FEATURES_A_GROUP], pairs)
        for table, rows in some.items():
            make_empty(cursor, table)
            if rows is not None:
                cursor.register("incoming", rows)
                cursor.execute(f"INSERT INTO temp.{table} FROM incoming").fetchall()
                cursor.unregister("incoming")
        for table in set(named) - set(some):
            self.attach(cursor, table)

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
        opened = RangeFile(self.place, file.name, file.n_bytes, file.footer_bytes)
        return pa.PythonFile(opened, mode="r")
