"""CSV: one flat row for each feature, for spreadsheets and first looks.

Text in it is made safe twice: no character that drives a terminal or turns the writing direction,
and no cell that a spreadsheet takes for a formula. What has to be exact goes as JSONL or Parquet.
"""

import csv
import io
from pathlib import Path
from typing import Any

from ..token_text import visible
from .chosen import CHOSEN, Chosen
from .destination import new_file

_BLOCK = 1024
_N_TOKENS = 5
# What a cell of a formula begins with, in full width too. Source: OWASP, CSV Injection.
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")


def write_csv(chosen: Chosen, out: Path, overwrite: bool) -> None:
    """A header, then a row for each feature. Columns: docs/exchange.md; lists are JSON."""
    with new_file(out, overwrite=overwrite) as file:
        for i, block in enumerate(chosen.blocks(_BLOCK)):
            rows = chosen.ask(_FLAT, block)
            lines = ([rows.columns] if i == 0 else []) + [list(row) for row in rows]
            file.write(csv_text(lines).encode())
            chosen.tell(block.n_after)


def csv_text(rows: list[list[Any]]) -> str:
    """Rows as CSV, every text safe; what is missing is empty."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_safe(v) for v in row] for row in rows)
    return text.getvalue()


def _safe(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return value
    shown = visible(value)
    return f"'{shown}" if shown.lstrip().startswith(_FORMULA) else shown


def _tokens(table: str, where: str = "true") -> str:
    """SQL: the first tokens of a table that has them by rank, as a JSON list for each feature."""
    return f"""(
    SELECT sae_id, feature_id, to_json(list(token ORDER BY rank))::VARCHAR AS tokens
    FROM {table} SEMI JOIN chosen USING (sae_id, feature_id)
    WHERE rank <= {_N_TOKENS} AND {where} GROUP BY ALL
)"""


_FLAT = f"""
WITH {CHOSEN}
SELECT features.sae_id, features.feature_id, saes.name AS sae_name, saes.hookpoint,
    label, label_method, density, n_active, mean_act, std_act, max_act, n_documents, mean_position,
    is_dead, on_tokens.tokens AS tokens, promoted.tokens AS promoted,
    suppressed.tokens AS suppressed, near.ids AS neighbors, context.text AS example
FROM chosen JOIN features USING (sae_id, feature_id) JOIN saes USING (sae_id)
LEFT JOIN {_tokens("feature_tokens")} AS on_tokens USING (sae_id, feature_id)
LEFT JOIN {_tokens("feature_logits", "sign = 1")} AS promoted USING (sae_id, feature_id)
LEFT JOIN {_tokens("feature_logits", "sign = -1")} AS suppressed USING (sae_id, feature_id)
LEFT JOIN (
    SELECT sae_id, feature_id, to_json(list(neighbor_id ORDER BY rank))::VARCHAR AS ids
    FROM neighbors SEMI JOIN chosen USING (sae_id, feature_id)
    WHERE rank <= {_N_TOKENS} GROUP BY ALL
) AS near USING (sae_id, feature_id)
LEFT JOIN (
    SELECT sae_id, feature_id, text FROM contexts SEMI JOIN chosen USING (sae_id, feature_id)
    WHERE kind = 'top' AND rank = 1
) AS context USING (sae_id, feature_id)
ORDER BY place
"""
