"""Rows of single features out of buckets: a footer, which is kept, then the groups they lie in.

In: a table, an SAE and feature ids. Out: their rows as Arrow. DuckDB isn't asked: it would open
every file, and read a megabyte of one.
"""

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from .datasets import BucketFile, Files
from .places import Place
from .ranged_file import RangedFile

# As they lie in files; parsed they take a few times as much.
_FOOTERS_BYTES = 32 << 20
# Groups that lie behind each other are read at once, up to so many.
_GROUPS_AT_ONCE = 64
_MAGIC = b"PAR1"

Ints = npt.NDArray[np.int64]
T = TypeVar("T")


class Footer(NamedTuple):
    """What is known of a file. first, last, rows_before: of each group, its feature ids and the
    number of rows before it."""

    metadata: pq.FileMetaData
    first: Ints
    last: Ints
    rows_before: Ints


class BucketReader:
    """Reads rows of features. Threads may call it at once."""

    def __init__(self, place: Place, files: Files) -> None:
        self._place, self._files = place, files
        self._footers = OrderedDict[str, Footer]()
        self._footers_bytes, self._guard = 0, threading.Lock()
        self._places = {
            table: [(file.sae_id or 0, file.first or 0) for file in of]
            for table, of in files.items()
        }
        self._rows_before = {
            table: [0, *accumulate(file.n_rows for file in of)] for table, of in files.items()
        }

    def schema(self, table: str) -> pa.Schema | None:
        """A table's columns; None where it has no row. Raises: OpenError."""
        files = self._files.get(table)
        return self.footer(files[0]).metadata.schema.to_arrow_schema() if files else None

    def rows(
        self,
        table: str,
        sae_id: int,
        feature_ids: Sequence[int],
        columns: list[str] | None = None,
        *,
        is_numbered: bool = False,
    ) -> pa.Table | None:
        """Rows of features of one SAE, by feature in the order of their numbers.

        columns: those that are read, feature_id among them; None for all. is_numbered: with
            another one, `rowid`: their numbers, which count from 0 over the table's files.
        Returns: None where no file holds such features. Raises: OpenError.
        """
        found = []
        for file, ids in self._where(table, sae_id, feature_ids):
            for run in _runs(self._groups(file, ids)):
                rows = self._read(file, run, columns)
                if is_numbered:
                    rows = self._with_numbers(rows, file, int(run[0]))
                found.append(_of_features(rows, ids))
        return pa.concat_tables(found) if found else None

    def by_group(self, table: str, numbers: Sequence[int]) -> list[Ints]:
        """Row numbers, each once, those that lie in one group together. Raises: OpenError."""
        found = dict[tuple[str, int], list[int]]()
        for number in sorted(set(numbers)):
            file, group, _ = self._place_of(table, number)
            found.setdefault((file.name, group), []).append(number)
        return [np.array(of, np.int64) for of in found.values()]

    def numbered(self, table: str, numbers: Ints, columns: list[str] | None = None) -> pa.Table:
        """The rows of these numbers, all of one group, with them as `rowid`. Raises: OpenError."""
        file, group, first = self._place_of(table, int(numbers[0]))
        rows = self._with_numbers(self._read(file, np.array([group]), columns), file, group)
        return rows.take(pa.array(numbers - first))

    def footer(self, file: BucketFile) -> Footer:
        """A file's footer, kept in memory. Raises: OpenError."""
        with self._guard:
            if file.name in self._footers:
                self._footers.move_to_end(file.name)
                return self._footers[file.name]
        footer = self._parsed_footer(file)
        with self._guard:
            if file.name not in self._footers:
                self._footers[file.name] = footer
                self._footers_bytes += footer.metadata.serialized_size
            while self._footers_bytes > _FOOTERS_BYTES and len(self._footers) > 1:
                _, old = self._footers.popitem(last=False)
                self._footers_bytes -= old.metadata.serialized_size
        return footer

    def _where(
        self, table: str, sae_id: int, feature_ids: Sequence[int]
    ) -> Iterator[tuple[BucketFile, Ints]]:
        """Files that may hold these features, each with those of them that it would hold."""
        ids = np.unique(np.asarray(feature_ids, np.int64))
        while len(ids):
            i = bisect_right(self._places.get(table, []), (sae_id, int(ids[0]))) - 1
            file = self._files[table][i] if i >= 0 else None
            if file is None or file.sae_id != sae_id or file.last is None or file.last < ids[0]:
                ids = ids[1:]  # of no file: it has no rows
                continue
            n = int(np.searchsorted(ids, file.last, side="right"))
            yield file, ids[:n]
            ids = ids[n:]

    def _groups(self, file: BucketFile, ids: Ints) -> Ints:
        """The groups of a file that may hold these features, in order."""
        footer = self.footer(file)
        groups = np.searchsorted(footer.last, ids)
        holds = groups < len(footer.last)
        groups, ids = groups[holds], ids[holds]
        return np.unique(groups[footer.first[groups] <= ids])

    def _read(self, file: BucketFile, groups: Ints, columns: list[str] | None) -> pa.Table:
        """Groups that lie behind each other, read as one range. Raises: OpenError."""
        metadata = self.footer(file).metadata
        begin, end = _bytes_of(metadata, int(groups[0]))[0], _bytes_of(metadata, int(groups[-1]))[1]

        def decoded(data: bytes) -> pa.Table:
            window = pa.PythonFile(_Window(data, begin, file.n_bytes), mode="r")
            parquet = pq.ParquetFile(
                window, metadata=metadata, page_checksum_verification=True, pre_buffer=False
            )
            return parquet.read_row_groups(groups.tolist(), columns, use_threads=False)

        return self._understood(file, begin, end, decoded)

    def _parsed_footer(self, file: BucketFile) -> Footer:
        begin = file.n_bytes - file.footer_bytes

        def parsed(data: bytes) -> Footer:
            metadata = pq.read_metadata(pa.BufferReader(_MAGIC + data))
            return _footer(metadata, file.sae_id is not None)

        return self._understood(file, begin, file.n_bytes, parsed)

    def _understood(self, file: BucketFile, begin: int, end: int, parse: Callable[[bytes], T]) -> T:
        """What bytes of a file say; read again, once, where a copy on this machine may be damaged.

        Raises: OpenError.
        """
        while True:
            data = self._place.read(file.name, begin, end)
            try:
                return parse(data)
            except (pa.ArrowException, OSError, AttributeError) as error:
                if not self._place.forget(file.name):
                    said = " ".join(str(error).split())[:200]
                    raise self._place.damaged(file.name, said) from None

    def _place_of(self, table: str, number: int) -> tuple[BucketFile, int, int]:
        """Of a row number: its file and group, and the number of that group's first row."""
        i = bisect_right(self._rows_before[table], number) - 1
        file, before = self._files[table][i], self._rows_before[table][i]
        rows_before = self.footer(file).rows_before
        group = int(np.searchsorted(rows_before, number - before, side="right")) - 1
        return file, group, before + int(rows_before[group])

    def _with_numbers(self, rows: pa.Table, file: BucketFile, group: int) -> pa.Table:
        """Rows that begin with a group, with their numbers."""
        i = bisect_right(self._places[file.table], (file.sae_id or 0, file.first or 0)) - 1
        first = self._rows_before[file.table][i] + int(self.footer(file).rows_before[group])
        return rows.append_column("rowid", pa.array(np.arange(first, first + rows.num_rows)))


class _Window(RangedFile):
    """A file of which some bytes are in memory, and no others are asked for."""

    def __init__(self, data: bytes, begin: int, n_bytes: int) -> None:
        super().__init__(n_bytes)
        self._data, self._begin = memoryview(data), begin

    def range(self, begin: int, end: int) -> bytes:
        return bytes(self._data[begin - self._begin : end - self._begin])


def _footer(metadata: pq.FileMetaData, is_by_feature: bool) -> Footer:
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    n_rows = np.cumsum([0, *(group.num_rows for group in groups)])
    if not is_by_feature:
        return Footer(metadata, n_rows[:0], n_rows[:0], n_rows)
    at = metadata.schema.to_arrow_schema().get_field_index("feature_id")
    bounds = [group.column(at).statistics for group in groups]
    first, last = ([getattr(b, name) for b in bounds] for name in ("min", "max"))
    return Footer(metadata, np.array(first, np.int64), np.array(last, np.int64), n_rows)


def _bytes_of(metadata: pq.FileMetaData, group: int) -> tuple[int, int]:
    """Where a group's first byte lies, and where its last one is over."""
    row_group = metadata.row_group(group)
    first, last = row_group.column(0), row_group.column(row_group.num_columns - 1)
    return _begin(first), _begin(last) + last.total_compressed_size


def _begin(column: pq.ColumnChunkMetaData) -> int:
    begins = (column.dictionary_page_offset, column.data_page_offset)
    return int(min(each for each in begins if each))


def _runs(groups: Ints) -> Iterator[Ints]:
    """Groups that lie behind each other, at most `_GROUPS_AT_ONCE` together."""
    cuts = np.flatnonzero(np.diff(groups) > 1) + 1
    for run in np.split(groups, cuts):
        for start in range(0, len(run), _GROUPS_AT_ONCE):
            yield run[start : start + _GROUPS_AT_ONCE]


def _of_features(rows: pa.Table, ids: Ints) -> pa.Table:
    """Those rows that are of some features; they are sorted by feature."""
    found = rows.column("feature_id").to_numpy()
    if len(ids) == 1:
        begin, end = np.searchsorted(found, ids[0]), np.searchsorted(found, ids[0], side="right")
        return rows.slice(int(begin), int(end - begin))
    return rows.filter(pa.array(np.isin(found, ids)))
