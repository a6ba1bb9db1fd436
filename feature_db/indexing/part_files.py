"""What was counted on one part of a text for one SAE: Parquet files, a row group a bucket.

Bucket i of every file holds the features `i * BUCKET` to `(i + 1) * BUCKET - 1`, so that parts are
added bucket by bucket in little memory. A part's folder is renamed into place whole; its pages have
checksums, which are verified as they are read.
"""

import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import IndexingError

BUCKET = 1024

_FEATURE = ("feature_id", pa.int32())
_SCHEMAS: dict[str, list[tuple[str, pa.DataType]]] = {
    "totals": [
        _FEATURE,
        ("n_active", pa.int64()),
        ("act_sum", pa.int64()),
        ("square_sum", pa.int64()),
        ("max_act", pa.float32()),
        ("position_sum", pa.int64()),
        ("n_documents", pa.int64()),
        ("first_document", pa.int64()),
        ("last_document", pa.int64()),
    ],
    "histogram": [_FEATURE, ("bin", pa.int16()), ("n", pa.int64())],
    "positions": [_FEATURE, ("bin", pa.int16()), ("n", pa.int64())],
    "contexts": [
        _FEATURE,
        ("kind", pa.int8()),
        ("row", pa.int64()),
        ("act", pa.float32()),
        ("before", pa.int32()),
        ("after", pa.int32()),
        ("steps", pa.list_(pa.int16())),
        ("acts", pa.list_(pa.float32())),
    ],
    "tokens": [
        _FEATURE,
        ("place", pa.int8()),
        ("token_id", pa.int32()),
        ("n_active", pa.int64()),
        ("act_sum", pa.int64()),
    ],
    "documents": [
        _FEATURE,
        ("doc_id", pa.int64()),
        ("n_active", pa.int64()),
        ("act_sum", pa.int64()),
        ("max_act", pa.float32()),
    ],
    "companions": [_FEATURE, ("other_id", pa.int32()), ("n_both", pa.int64())],
    "near_misses": [
        _FEATURE,
        ("row", pa.int64()),
        ("neighbor_id", pa.int32()),
        ("act", pa.float32()),
        ("before", pa.int32()),
        ("after", pa.int32()),
    ],
    "activations": [
        _FEATURE,
        ("doc_id", pa.int64()),
        ("position", pa.int32()),
        ("act", pa.float32()),
    ],
}
SCHEMAS = {name: pa.schema(fields) for name, fields in _SCHEMAS.items()}

Columns = Mapping[str, "np.ndarray | pa.Array"]


def buckets(d_sae: int) -> list[tuple[int, int]]:
    """Ranges of features, a bucket each: (first, stop)."""
    return list(pairwise([*range(0, d_sae, BUCKET), d_sae]))


class PartWriter:
    """Writes the files of one part; use it as a context. folder: there already."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writers: dict[str, pq.ParquetWriter] = {}
        self._bucket: dict[str, list[pa.Table]] = {}

    def write(self, table: str, columns: Columns) -> None:
        """Append rows of this bucket to a table, sorted by feature."""
        self._bucket.setdefault(table, []).append(pa.table(dict(columns), SCHEMAS[table]))

    def end_bucket(self) -> None:
        """Write what was appended: a row group of each table."""
        for table, parts in self._bucket.items():
            rows = pa.concat_tables(parts)
            self._writer(table).write_table(rows, row_group_size=max(len(rows), 1))
        self._bucket.clear()

    def _writer(self, table: str) -> pq.ParquetWriter:
        if table not in self._writers:
            self._writers[table] = pq.ParquetWriter(
                self._folder / f"{table}.parquet",
                SCHEMAS[table],
                compression="lz4",
                use_dictionary=False,
                column_encoding=_differences(SCHEMAS[table]),
                write_page_checksum=True,
            )
        return self._writers[table]

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for table, writer in self._writers.items():
            writer.close()
            if error is None:
                with (self._folder / f"{table}.parquet").open("rb") as file:
                    os.fsync(file.fileno())


def _differences(schema: pa.Schema) -> dict[str, str]:
    """Integers are stored as differences: with lz4 as small as by zstd, in half the time."""
    return {
        field.name: "DELTA_BINARY_PACKED" for field in schema if pa.types.is_integer(field.type)
    }


class PartReader:
    """Reads the files of one part, bucket by bucket."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, pq.ParquetFile] = {}

    def read(self, table: str, bucket: int) -> pa.Table:
        """One bucket of a table. Raises: IndexingError for a damaged file."""
        path = self._folder / f"{table}.parquet"
        try:
            if table not in self._files:
                self._files[table] = pq.ParquetFile(path, page_checksum_verification=True)
            return self._files[table].read_row_group(bucket, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise IndexingError(
                f"{path} is damaged ({reason}): remove {self._folder} and index again"
            ) from None
