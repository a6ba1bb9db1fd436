"""What is said of features, and which of it a feature shows as its label.

    a person's label, else the best scored explanation, else the offline label

In: rows of `explanations`. Out: `features.label` and `features.label_method`. Everything said of a
feature is a row, and nothing is lost when another is shown. The index writes its offline label
into `features` alone; it becomes a row (method `tokens`) when another first takes its place, and
that row is made anew wherever `features` shows an offline label again.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import duckdb
import pyarrow as pa

from .errors import LabelError
from .transactions import registered
from .words import label_words

HUMAN, LLM, OFFLINE = "human", "llm", "tokens"
MAX_LABEL_CHARACTERS = 1000
# The order in which a feature's rows are preferred: the first one is shown.
BEST_FIRST = f"""
    CASE method WHEN '{HUMAN}' THEN 0 WHEN '{OFFLINE}' THEN 2 ELSE 1 END,
    (coalesce(detection_score, fuzzing_score) + coalesce(fuzzing_score, detection_score))
        DESC NULLS LAST,
    explanation_id DESC"""


class FeatureLabel(NamedTuple):
    """A label that a person or a file gives a feature. method: `human` where a person said it."""

    sae_id: int
    feature_id: int
    text: str
    method: str = HUMAN


def label_text(text: str) -> str:
    """A label as it is kept: one line, no space around it.

    Raises: LabelError if nothing is left, or more than 1,000 characters.
    """
    line = " ".join(text.split())
    if not line:
        raise LabelError(f"the label {text!r} is empty: give it a word, or remove the label")
    if len(line) > MAX_LABEL_CHARACTERS:
        raise LabelError(
            f"the label {line[:40]!r}... has {len(line)} characters: expected "
            f"{MAX_LABEL_CHARACTERS} at most"
        )
    return line


def put_labels(connection: duckdb.DuckDBPyConnection, labels: Sequence[FeatureLabel]) -> None:
    """Keep labels that people or files give, in place of those of the same method, and show them.

    Inside the caller's transaction. The SAEs and features exist.
    """
    rows = pa.table(
        {
            "sae_id": pa.array([each.sae_id for each in labels], pa.int32()),
            "feature_id": pa.array([each.feature_id for each in labels], pa.int32()),
            "method": [each.method for each in labels],
            "text": [each.text for each in labels],
        }
    )
    with registered(connection, rows):
        _run(connection, "DELETE FROM explanations WHERE " + _SAME_METHOD_COMES)
        _run(connection, _ADD)
    show_best(connection, [(each.sae_id, each.feature_id) for each in labels])


def drop_label(
    connection: duckdb.DuckDBPyConnection, sae_id: int, feature_id: int, method: str = HUMAN
) -> bool:
    """Forget a person's label and show what stands without it. Returns: whether there was one."""
    removed = connection.execute(
        "DELETE FROM explanations WHERE sae_id = ? AND feature_id = ? AND method = ? "
        "RETURNING explanation_id",
        [sae_id, feature_id, method],
    ).fetchall()
    show_best(connection, [(sae_id, feature_id)])
    return bool(removed)


def add_explanations(connection: duckdb.DuckDBPyConnection, rows: pa.Table) -> None:
    """Append explanations and show the best of their features. Inside the caller's transaction.

    rows: columns of `explanations` by name, without explanation_id and created_at.
    """
    with registered(connection, rows):
        _run(connection, _ADD)
    ids = zip(rows.column("sae_id").to_pylist(), rows.column("feature_id").to_pylist(), strict=True)
    show_best(connection, ids)


def carry_explanations(source: duckdb.DuckDBPyConnection, target: duckdb.DuckDBPyConnection) -> int:
    """Copy what people, files and language models said from one database to another one.

    Features are those of the same number of an SAE with the same weights_hash; offline labels are
    left behind, because the target's index has made its own. An explanation of the same method,
    model and recipe that the target has already stays as it is, so that calling it twice changes
    nothing. Inside the caller's transaction on the target.
    Returns: the number of explanations copied.
    """
    tables = source.execute("SELECT table_name FROM duckdb_tables()").fetchall()
    if ("explanations",) not in tables:
        return 0
    said = source.sql(
        "SELECT weights_hash, explanations.* EXCLUDE (sae_id) FROM explanations "
        "JOIN saes USING (sae_id) WHERE method <> ? ORDER BY explanation_id",
        params=[OFFLINE],
    ).to_arrow_table()
    with registered(target, said):
        copied = target.execute(_CARRY).fetchall()
    show_best(target, copied)
    return len(copied)


def show_best(connection: duckdb.DuckDBPyConnection, features: Iterable[tuple[int, int]]) -> None:
    """Write into `features` what each of them shows now. features: (sae_id, feature_id)."""
    pairs = sorted(set(features))
    rows = pa.table(
        {
            "sae_id": pa.array([sae_id for sae_id, _ in pairs], pa.int32()),
            "feature_id": pa.array([feature_id for _, feature_id in pairs], pa.int32()),
        }
    )
    with registered(connection, rows):
        _run(connection, _DROP_OLD_OFFLINE)
        _run(connection, _KEEP_OFFLINE)
        _run(connection, _SHOW)
        _run(connection, _FORGET_WORDS)
        _run(connection, _ADD_WORDS)


def _run(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    connection.execute(sql).fetchall()


_SAME_METHOD_COMES = (
    "(sae_id, feature_id, method) IN (SELECT (sae_id, feature_id, method) FROM incoming)"
)
_ADD = (
    "INSERT INTO explanations BY NAME "
    "SELECT *, now() AT TIME ZONE 'UTC' AS created_at FROM incoming ORDER BY sae_id, feature_id"
)
_DROP_OLD_OFFLINE = f"""
DELETE FROM explanations WHERE method = '{OFFLINE}' AND (sae_id, feature_id) IN (
    SELECT (sae_id, feature_id) FROM features SEMI JOIN incoming USING (sae_id, feature_id)
    WHERE label_method = '{OFFLINE}')
"""
_KEEP_OFFLINE = f"""
INSERT INTO explanations BY NAME
SELECT sae_id, feature_id, '{OFFLINE}' AS method, label AS text, saes.created_at AS created_at
FROM features SEMI JOIN incoming USING (sae_id, feature_id) JOIN saes USING (sae_id)
WHERE label_method = '{OFFLINE}' AND label IS NOT NULL ORDER BY sae_id, feature_id
"""
_SHOW = f"""
UPDATE features SET label = best.text, label_method = best.method
FROM (
    SELECT incoming.sae_id, incoming.feature_id, text, method
    FROM incoming LEFT JOIN explanations USING (sae_id, feature_id)
    QUALIFY row_number() OVER (
        PARTITION BY incoming.sae_id, incoming.feature_id ORDER BY {BEST_FIRST}) = 1
) AS best
WHERE features.sae_id = best.sae_id AND features.feature_id = best.feature_id
    AND (label IS DISTINCT FROM best.text OR label_method IS DISTINCT FROM best.method)
"""
_FORGET_WORDS = """
DELETE FROM words WHERE field = 'label' AND (sae_id, feature_id) IN (
    SELECT (sae_id, feature_id) FROM incoming)
"""
_ADD_WORDS = f"""
INSERT INTO words {label_words("features SEMI JOIN incoming USING (sae_id, feature_id)")}
"""
_CARRY = """
INSERT INTO explanations BY NAME
SELECT saes.sae_id, incoming.* EXCLUDE (weights_hash, explanation_id)
FROM incoming JOIN saes USING (weights_hash)
SEMI JOIN features ON features.sae_id = saes.sae_id AND features.feature_id = incoming.feature_id
ANTI JOIN explanations AS here ON here.sae_id = saes.sae_id
    AND here.feature_id = incoming.feature_id AND here.method = incoming.method
    AND here.model IS NOT DISTINCT FROM incoming.model
    AND here.recipe IS NOT DISTINCT FROM incoming.recipe
ORDER BY incoming.explanation_id
RETURNING sae_id, feature_id
"""
