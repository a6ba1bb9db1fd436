"""Which features are exported, in what blocks they are read, and which tables there are of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from ..errors import NotFoundError
from ..feature_rows import Pair

if TYPE_CHECKING:
    from ..database import FeatureDB
    from ..result import Result

# A common table of SQL: the features of one block, in order. Its parameters are `Block.params`.
CHOSEN = """chosen AS (
    SELECT unnest($1::INTEGER[]) AS sae_id, unnest($2::INTEGER[]) AS feature_id,
        unnest(range(len($1::INTEGER[]))) AS place
)"""
# The contexts of the features of a block, with the text of each token, faster than by `tokens_of`.
SPELLED = """spelled AS (
    SELECT t.*, tokens FROM contexts AS t SEMI JOIN chosen USING (sae_id, feature_id)
    JOIN (
        SELECT context, list(coalesce(token, '') ORDER BY i) AS tokens
        FROM (
            SELECT t.rowid AS context, unnest(token_ids) AS token_id,
                unnest(range(len(token_ids))) AS i
            FROM contexts AS t SEMI JOIN chosen USING (sae_id, feature_id)
        ) LEFT JOIN vocabulary USING (token_id) GROUP BY context
    ) ON context = t.rowid
)"""
# What search looks up: made of the other tables, and full of row numbers of this database.
DERIVED = {"words"}


class ExportProgress(NamedTuple):
    """How far an export is. unit: what is counted, features or tables."""

    n_done: int
    n_total: int
    unit: str


OnProgress = Callable[[ExportProgress], None]


class Block(NamedTuple):
    """Some of the features. n_after: how many features are done with it."""

    ids: Sequence[Pair]
    n_after: int

    @property
    def params(self) -> list[list[int]]:
        """Their sae_ids and feature_ids, for SQL with `CHOSEN`."""
        return [[pair[0] for pair in self.ids], [pair[1] for pair in self.ids]]


@dataclass(frozen=True)
class Chosen:
    """The features of one export. ids: (sae_id, feature_id), each once, in order.

    is_all: whether they are all that the database has.
    """

    db: "FeatureDB"
    ids: tuple[Pair, ...]
    is_all: bool
    on_progress: OnProgress | None

    @classmethod
    def of(
        cls, db: "FeatureDB", features: Sequence[Pair] | None, on_progress: OnProgress | None
    ) -> "Chosen":
        """features: None for all. Raises: NotFoundError for none at all, or unknown ones."""
        known = db.sql("SELECT sae_id, feature_id FROM features ORDER BY ALL").fetchall()
        if features is None:
            return cls(db, tuple((s, f) for s, f in known), True, on_progress)
        ids = tuple(dict.fromkeys(features))
        if not ids:
            raise NotFoundError(f"no feature of {db.path} is chosen: there is nothing to export")
        there = set(known)
        for sae_id, feature_id in ids:
            if (sae_id, feature_id) not in there:
                raise NotFoundError(f"no feature {feature_id} in SAE {sae_id} of {db.path}")
        return cls(db, ids, False, on_progress)

    @property
    def sae_ids(self) -> list[int]:
        """The SAEs that they are of."""
        return sorted({sae_id for sae_id, _ in self.ids})

    def of_sae(self, sae_id: int) -> "Chosen":
        """Those of one SAE."""
        return replace(self, ids=tuple(pair for pair in self.ids if pair[0] == sae_id))

    def blocks(self, n_features: int) -> Iterator[Block]:
        """n_features at a time."""
        for start in range(0, len(self.ids), n_features):
            ids = self.ids[start : start + n_features]
            yield Block(ids, start + len(ids))

    def ask(self, sql: str, block: Block, *more: Any) -> "Result":
        """SQL with `CHOSEN` about the features of a block. more: its parameters from the third."""
        return self.db.sql_about(block.ids, sql, [*block.params, *more])

    def tell(self, n_done: int, n_total: int | None = None, unit: str = "features") -> None:
        """Say how far it is."""
        if self.on_progress:
            total = len(self.ids) if n_total is None else n_total
            self.on_progress(ExportProgress(n_done, total, unit))


def rows_in_order(db: "FeatureDB", table: str, n_rows: int) -> Iterator[pa.Table]:
    """All rows of a table of the file, n_rows at a time; by row numbers, so that a block doesn't
    read those before it."""
    ((last,),) = db.sql(f"SELECT coalesce(max(rowid), -1) FROM {table}").fetchall()
    sql = f"SELECT * FROM {table} WHERE rowid >= ? AND rowid < ? ORDER BY rowid"
    for start in range(0, int(last) + 1, n_rows):
        yield db.sql(sql, [start, start + n_rows]).arrow()


def table_columns(db: "FeatureDB") -> dict[str, dict[str, str]]:
    """The database's tables, each with its columns and their types."""
    tables: dict[str, dict[str, str]] = {}
    for table, column, kind in db.sql(
        "SELECT table_name, column_name, data_type FROM duckdb_columns() "
        "WHERE NOT internal AND database_name = current_database() "
        "ORDER BY table_name, column_index"
    ):
        tables.setdefault(table, {})[column] = kind
    return tables
