"""Rows of pages out of buckets: the tables read side by side, features and labels from the small
file meanwhile."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pyarrow as pa

from ..pages import SHOWN, SHOWN_MEANWHILE, Ask, Pages, Rows, add_labels
from .reader import BucketReader

_TABLES_AT_ONCE = 8


class BucketPages(Pages):
    """Reads the rows of pages. ask: runs one query of the small file."""

    def __init__(self, ask: Ask, reader: BucketReader) -> None:
        self._ask, self._reader = ask, reader
        self._threads = ThreadPoolExecutor(_TABLES_AT_ONCE, "feature-db")

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()

    def rows(self, sae_id: int, feature_ids: Sequence[int]) -> dict[str, Rows]:
        """As `Pages.rows`. Raises: OpenError for a file that is missing or damaged."""
        ids = list(feature_ids)
        shown: dict[str, str] = {**SHOWN, **SHOWN_MEANWHILE}
        features = shown.pop("features")
        read = {
            table: self._threads.submit(self._read, table, names.split(", "), sae_id, ids)
            for table, names in shown.items()
        }
        rows = {"features": self._in("features", features, sae_id, ids)}
        rows |= {table: future.result() for table, future in read.items()}
        add_labels(rows, self._ask, sae_id)
        return rows

    def texts_at(self, row_numbers: Sequence[int]) -> dict[int, str]:
        """The text of contexts, by their row number. Raises: OpenError."""
        wanted = list(dict.fromkeys(row_numbers))

        def text(number: int) -> str:
            return self._reader.at("contexts", [number], "text")[0]

        return dict(zip(wanted, self._threads.map(text, wanted), strict=True))

    def tables(
        self, tables: Sequence[str], pairs: Sequence[tuple[int, int]]
    ) -> Mapping[str, pa.Table | None]:
        """All rows of features, (sae_id, feature_id), of some tables. Raises: OpenError."""
        ids: dict[int, list[int]] = {}
        for sae_id, feature_id in pairs:
            ids.setdefault(sae_id, []).append(feature_id)
        read = {
            table: [
                self._threads.submit(self._reader.rows, table, sae_id, ids[sae_id])
                for sae_id in sorted(ids)
            ]
            for table in tables
        }
        return {
            table: _joined([each.result() for each in futures]) for table, futures in read.items()
        }

    def _read(self, table: str, names: list[str], sae_id: int, ids: list[int]) -> Rows:
        found = self._reader.rows(table, sae_id, ids, ["feature_id", *names])
        return [] if found is None else _dicts(found)


def _joined(tables: Sequence[pa.Table | None]) -> pa.Table | None:
    some = [table for table in tables if table is not None]
    return pa.concat_tables(some) if some else None


def _dicts(table: pa.Table) -> Rows:
    """Rows as dicts; lists by way of numpy, which is many times faster than value by value."""
    columns: list[list[Any]] = [_values(column) for column in table.columns]
    names = table.column_names
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _values(column: pa.ChunkedArray) -> list[Any]:
    if not pa.types.is_list(column.type):
        return list(column.to_pylist())
    whole = column.combine_chunks()
    ends = whole.offsets.to_numpy().tolist()
    flat = whole.values.to_numpy(zero_copy_only=False).tolist()
    return [flat[begin:end] for begin, end in pairwise(ends)]
