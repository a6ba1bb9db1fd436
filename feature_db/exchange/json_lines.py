"""JSONL: one feature a line with everything of its page; or labels, as `saebase label` reads them.

The names in a page are those of the database's tables and columns. DuckDB makes the JSON.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import NotFoundError
from ..explanations import LLM, OFFLINE
from .chosen import CHOSEN, DERIVED, SPELLED, Chosen, table_columns
from .destination import new_file

if TYPE_CHECKING:
    from ..database import FeatureDB

_BLOCK = 256
_IDS = ("sae_id", "feature_id")
# Columns that say where in its list a row stands.
_ORDER = ("kind", "sign", "place", "other_sae_id", "rank", "bin", "explanation_id")


def write_jsonl(chosen: Chosen, out: Path, overwrite: bool) -> None:
    """One line for each feature: its row of `features`, and for each table a list of its rows."""
    sql = _page_sql(chosen.db)
    with new_file(out, overwrite=overwrite) as file:
        for block in chosen.blocks(_BLOCK):
            for (line,) in chosen.ask(sql, block):
                file.write(f"{line}\n".encode())
            chosen.tell(block.n_after)


def write_labels(chosen: Chosen, out: Path, overwrite: bool) -> None:
    """What people and files said of the features, in lines that `saebase label --import` takes.

    Raises: NotFoundError if nobody said anything.
    """
    n_lines = 0
    with new_file(out, overwrite=overwrite) as file:
        for block in chosen.blocks(_BLOCK):
            for (line,) in chosen.ask(_LABELS, block):
                file.write(f"{line}\n".encode())
                n_lines += 1
            chosen.tell(block.n_after)
        if not n_lines:
            raise NotFoundError(
                "none of these features has a label by a person or a file: offline labels are made "
                "by the index; those of a language model go with jsonl, or carry_explanations"
            )


def _finite(column: str, kind: str) -> str:
    """SQL of a column's value; NULL where it isn't finite, which JSON has no word for."""
    if kind in ("FLOAT", "DOUBLE"):
        return f'CASE WHEN isfinite("{column}") THEN "{column}" END'
    return f'"{column}"'


def _page_sql(db: "FeatureDB") -> str:
    tables = table_columns(db)
    lists = {
        table: columns
        for table, columns in tables.items()
        if set(_IDS) <= set(columns) and table != "features" and table not in DERIVED
    }
    values = [f"'{name}': {_finite(name, kind)}" for name, kind in tables["features"].items()]
    values += ["'sae_name': saes.name", "'model': saes.model", "'hookpoint': saes.hookpoint"]
    values += [f"'{table}': coalesce(of_{table}.rows, [])" for table in lists]
    joins = [
        f"LEFT JOIN ({_rows_sql(table, columns)}) AS of_{table} USING (sae_id, feature_id)"
        for table, columns in lists.items()
    ]
    return (
        f"WITH {CHOSEN}, {SPELLED} SELECT to_json({{{', '.join(values)}}})::VARCHAR FROM chosen "
        f"JOIN features USING (sae_id, feature_id) JOIN saes USING (sae_id) {' '.join(joins)} "
        "ORDER BY place"
    )


def _rows_sql(table: str, columns: dict[str, str]) -> str:
    """A table's rows of each feature, as a list in order."""
    names = [name for name in columns if name not in _IDS]
    values = [f"'{name}': {_finite(name, columns[name])}" for name in names]
    source = table
    if table == "contexts":
        values, source = [*values, "'tokens': tokens"], "spelled"
    order = [f't."{name}"' for name in _ORDER if name in columns] or [f't."{n}"' for n in names]
    rows = f"list({{{', '.join(values)}}} ORDER BY {', '.join(order)}) AS rows"
    return (
        f"SELECT t.sae_id, t.feature_id, {rows} FROM {source} AS t "
        "SEMI JOIN chosen USING (sae_id, feature_id) GROUP BY ALL"
    )


_LABELS = f"""
WITH {CHOSEN}
SELECT to_json(
    {{'sae_id': sae_id, 'feature_id': feature_id, 'label': text, 'method': method}}
)::VARCHAR
FROM chosen JOIN explanations USING (sae_id, feature_id)
WHERE method NOT IN ('{LLM}', '{OFFLINE}') ORDER BY place, method
"""
