"""Rows of pages out of buckets: the tables read side by side; `features` is in the small file."""

from collections.abc import Sequence
from concurrent.futures import Executor
from itertools import pairwise
from typing import Any

import pyarrow as pa

from ..feature_rows import FeatureRows
from ..pages import SHOWN, SHOWN_MEANWHILE, Ask, Pages, Rows
from .reader import BucketReader


class BucketPages(Pages):
    """Reads the rows of pages. ask: runs one query of the small file. threads: read the tables."""

    def __init__(
        self, ask: Ask, features: FeatureRows, reader: BucketReader, threads: Executor
    ) -> None:
        super().__init__(ask, features, threads)
        self._reader = reader

    def rows(self, sae_id: int, feature_ids: Sequence[int]) -> dict[str, Rows]:
        """As `Pages.rows`. Raises: OpenError for a file that is missing or damaged."""
        ids = list(feature_ids)
        shown: dict[str, str] = {**SHOWN, **SHOWN_MEANWHILE}
        read = {
            table: self._threads.submit(self._read, table, names.split(", "), sae_id, ids)
            for table, names in shown.items()
        }
        rows = {table: future.result() for table, future in read.items()}
        self._add_features(rows, sae_id, ids)
        return rows

    def _read(self, table: str, names: list[str], sae_id: int, ids: list[int]) -> Rows:
        found = self._reader.rows(table, sae_id, ids, ["feature_id", *names])
        return [] if found is None else _dicts(found)


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
