"""Rows of a database -> the Parquet files of its buckets, one after another.

In: a database's tables. Out: each file as it lies in memory (tens of megabytes), and what is to be
known of it. Rows of a thousand features, or of a thousandth of the words, are read at a time.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..bucketed.datasets import BucketFile
from ..bucketed.layout import (
    DOCUMENT_ROWS,
    DOCUMENTS,
    FEATURES_A_FILE,
    FEATURES_A_GROUP,
    WORD_ROWS,
    WORDS,
)
from ..errors import ExportError

if TYPE_CHECKING:
    from ..database import FeatureDB

_FEATURES_AT_ONCE = 1024
# The table whose rows others name by their number.
_NUMBERED = "contexts"


class Encoded(NamedTuple):
    """A file and its content."""

    file: BucketFile
    data: pa.Buffer


def encoded_files(db: "FeatureDB", table: str) -> Iterator[Encoded]:
    """The files of one table, in its rows' order. Raises: ExportError for rows in disorder."""
    if table == WORDS:
        return _word_files(db)
    return _document_files(db) if table == DOCUMENTS else _feature_files(db, table)


def _feature_files(db: "FeatureDB", table: str) -> Iterator[Encoded]:
    n_before = 0
    for sae_id, d_sae in db.sql("SELECT sae_id, d_sae FROM saes ORDER BY sae_id"):
        for first in range(0, d_sae, FEATURES_A_FILE):
            last = min(first + FEATURES_A_FILE, d_sae) - 1
            slices = _slices(db, table, sae_id, first, last, n_before)
            writer = _Writer(["sae_id", "feature_id"])
            for rows in slices:
                ids = rows.column("feature_id").to_numpy()
                groups = np.arange(
                    first, last + 2 * FEATURES_A_GROUP[table], FEATURES_A_GROUP[table]
                )
                writer.write(rows, np.searchsorted(ids, groups).tolist())
            if writer.n_rows:
                name = f"{table}/{sae_id}-{first:09}.parquet"
                n_before += writer.n_rows
                yield writer.encoded(BucketFile(table, name, 0, 0, 0, sae_id, first, last))


def _slices(
    db: "FeatureDB", table: str, sae_id: int, first: int, last: int, n_before: int
) -> Iterator[pa.Table]:
    """Rows of features first to last, some features at a time. n_before: rows before them all."""
    sql = (
        f"SELECT rowid AS row_number, t.* FROM {table} AS t WHERE sae_id = ? AND feature_id >= ? "
        "AND feature_id <= ? ORDER BY feature_id, rowid"
    )
    for begin in range(first, last + 1, _FEATURES_AT_ONCE):
        end = min(begin + _FEATURES_AT_ONCE - 1, last)
        rows = db.sql(sql, [sae_id, begin, end]).arrow()
        if table == _NUMBERED:
            _require_order(db, rows.column("row_number").to_numpy(), n_before)
            n_before += rows.num_rows
        yield rows.drop_columns("row_number")


def _require_order(db: "FeatureDB", numbers: np.ndarray, first: int) -> None:
    """Words name contexts by row number, which in files is counted."""
    expected = np.arange(first, first + len(numbers))
    if not np.array_equal(numbers, expected):
        row = int(expected[np.argmax(numbers != expected)])
        raise ExportError(
            f"{db.path}: the rows of contexts aren't in the order of their features (row {row:,}), "
            "which buckets need: build the index again, then export"
        )


def _document_files(db: "FeatureDB") -> Iterator[Encoded]:
    ids = [doc_id for (doc_id,) in db.sql("SELECT doc_id FROM documents ORDER BY doc_id")]
    sql = "SELECT * FROM documents WHERE doc_id >= ? AND doc_id <= ? ORDER BY doc_id"
    for start in range(0, len(ids), DOCUMENT_ROWS.a_file):
        some = ids[start : start + DOCUMENT_ROWS.a_file]
        writer = _Writer(["doc_id"])
        rows = db.sql(sql, [some[0], some[-1]]).arrow()
        writer.write(rows, _every(rows.num_rows, DOCUMENT_ROWS.a_group))
        name = f"{DOCUMENTS}/{start:09}.parquet"
        yield writer.encoded(BucketFile(DOCUMENTS, name, 0, 0, 0, None, some[0], some[-1]))


def _word_files(db: "FeatureDB") -> Iterator[Encoded]:
    for i, rows in enumerate(_in_tables(_sorted_words(db), WORD_ROWS.a_file)):
        writer = _Writer(["word"])
        writer.write(rows, _every(rows.num_rows, WORD_ROWS.a_group))
        words = rows.column("word")
        bounds = {"first_word": words[0].as_py(), "last_word": words[-1].as_py()}
        yield writer.encoded(BucketFile(WORDS, f"{WORDS}/{i:06}.parquet", 0, 0, 0, **bounds))


def _sorted_words(db: "FeatureDB") -> Iterator[pa.Table]:
    """All rows in order: a range of words at a time, because those of new labels lie at the end."""
    ((last,),) = db.sql(f"SELECT coalesce(max(rowid), 0) FROM {WORDS}").fetchall()
    at = list(range(WORD_ROWS.a_file, last, WORD_ROWS.a_file))
    cuts = db.sql(
        f"SELECT DISTINCT word FROM {WORDS} WHERE rowid IN (SELECT unnest(?::BIGINT[])) "
        "ORDER BY word",
        [at],
    )
    for begin, end in pairwise(["", *(word for (word,) in cuts), None]):
        below, params = ("AND word < ?", [begin, end]) if end is not None else ("", [begin])
        yield from db.batches(
            f"SELECT * FROM {WORDS} WHERE word >= ? {below} "
            "ORDER BY word, field, sae_id, feature_id",
            params,
        )


def _in_tables(parts: Iterable[pa.Table], n_rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of n_rows; the last one may have fewer."""
    waiting, n_waiting = list[pa.Table](), 0
    for part in parts:
        waiting.append(part)
        n_waiting += part.num_rows
        while n_waiting >= n_rows:
            whole = pa.concat_tables(waiting)
            yield whole.slice(0, n_rows)
            waiting, n_waiting = [whole.slice(n_rows)], n_waiting - n_rows
    if n_waiting:
        yield pa.concat_tables(waiting)


def _every(n_rows: int, n: int) -> list[int]:
    return [*range(0, n_rows, n), n_rows]


class _Writer:
    """One Parquet file in memory. by: the columns whose bounds each group is to have."""

    def __init__(self, by: list[str]) -> None:
        self._by, self._sink = by, pa.BufferOutputStream()
        self._parquet: pq.ParquetWriter | None = None
        self.n_rows = 0

    def write(self, rows: pa.Table, cuts: Sequence[int]) -> None:
        """Append rows, a group between each two cuts that differ."""
        if self._parquet is None:
            self._parquet = pq.ParquetWriter(
                self._sink,
                rows.schema,
                compression="zstd",
                write_statistics=self._by,
                write_page_checksum=True,
            )
        for begin, end in pairwise(cuts):
            if end > begin:
                self._parquet.write_table(rows.slice(begin, end - begin))
        self.n_rows += rows.num_rows

    def encoded(self, file: BucketFile) -> Encoded:
        """The whole file. file: what it is to be called, and its bounds."""
        assert self._parquet is not None
        self._parquet.close()
        data = self._sink.getvalue()
        # Length of the footer, then the magic number.
        footer_bytes = int.from_bytes(data[-8:-4].to_pybytes(), "little") + 8
        sizes = {"n_rows": self.n_rows, "n_bytes": data.size, "footer_bytes": footer_bytes}
        return Encoded(file._replace(**sizes), data)
