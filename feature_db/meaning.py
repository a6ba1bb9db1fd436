"""Search by meaning: what an embedding model makes of labels and contexts, and of a text.

Vectors lie in the table `meanings`: of each feature's label, and the mean of those of its strongest
contexts, each cut to the words around its active token. A text finds the features for which the
larger of the two cosines is largest.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa

from .embedders import Embedder
from .errors import MeaningError
from .indexing.sorting import Float32, Int64
from .transactions import insert

_AT_ONCE = 1024
_N_CONTEXTS = 5
# Tokens on either side of the active one that say what it is about.
_BEFORE, _AFTER = 12, 4
LABEL, CONTEXTS = "label", "contexts"

OnEmbedded = Callable[[int, int], None]


class Meanings(NamedTuple):
    """All vectors of one model. vectors: float32 [n, dim], of norm 1. fields: of each, LABEL or
    CONTEXTS; sae_ids, feature_ids: int64 [n]."""

    sae_ids: Int64
    feature_ids: Int64
    fields: list[str]
    vectors: Float32

    @classmethod
    def of(cls, table: pa.Table) -> "Meanings":
        """Rows of `meanings`."""
        vectors = table.column("vector").combine_chunks()
        return cls(
            table.column("sae_id").to_numpy().astype(np.int64),
            table.column("feature_id").to_numpy().astype(np.int64),
            table.column("field").to_pylist(),
            vectors.flatten().to_numpy().reshape(len(table), -1),
        )


class Meant(NamedTuple):
    """A feature that a text found. cosine: to its field, LABEL or CONTEXTS, whichever is nearer."""

    sae_id: int
    feature_id: int
    cosine: float
    field: str


def nearest(meanings: Meanings, vector: Float32, limit: int) -> list[Meant]:
    """The features nearest to a text, at most `limit`; of equal ones the smaller ids.

    vector: [dim], of norm 1. Raises: MeaningError for vectors of another width.
    """
    if meanings.vectors.shape[1] != len(vector):
        raise MeaningError(
            f"the model gives vectors of {len(vector)} numbers, and those kept have "
            f"{meanings.vectors.shape[1]}: make them anew with `saebase embed`"
        )
    cosines = meanings.vectors @ vector
    order = np.lexsort((meanings.feature_ids, meanings.sae_ids, -cosines))
    found: dict[tuple[int, int], Meant] = {}
    for place in order.tolist():
        pair = int(meanings.sae_ids[place]), int(meanings.feature_ids[place])
        if pair not in found:
            found[pair] = Meant(*pair, float(cosines[place]), meanings.fields[place])
            if len(found) == limit:
                break
    return list(found.values())


def write_meanings(
    connection: duckdb.DuckDBPyConnection,
    embedder: Embedder,
    vocabulary: Sequence[str],
    on_embedded: OnEmbedded | None,
) -> int:
    """Fill `meanings` with a model's vectors, in place of those of the same model.

    Inside the caller's transaction. vocabulary: each token's text. on_embedded: told how many of
    how many features are done. Returns: the number of features.
    """
    connection.execute("DELETE FROM meanings WHERE model = ?", [embedder.name]).fetchall()
    pairs = connection.execute(
        "SELECT sae_id, feature_id FROM features WHERE NOT is_dead ORDER BY ALL"
    ).fetchall()
    for first in range(0, len(pairs), _AT_ONCE):
        some = pairs[first : first + _AT_ONCE]
        insert(connection, "meanings", _rows_of(connection, embedder, vocabulary, some))
        if on_embedded:
            on_embedded(first + len(some), len(pairs))
    return len(pairs)


def _rows_of(
    connection: duckdb.DuckDBPyConnection,
    embedder: Embedder,
    vocabulary: Sequence[str],
    pairs: Sequence[tuple[int, int]],
) -> pa.Table:
    asked = [[pair[0] for pair in pairs], [pair[1] for pair in pairs]]
    labels = connection.execute(_LABELS, asked).fetchall()
    contexts = connection.execute(_CONTEXTS, asked).fetchall()
    texts = [_around(row[2], row[3], vocabulary) for row in contexts]
    vectors = embedder([*(row[2] for row in labels), *texts])
    means: dict[tuple[int, int], Float32] = {}
    for row, vector in zip(contexts, vectors[len(labels) :], strict=True):
        pair = (row[0], row[1])
        means[pair] = means[pair] + vector if pair in means else vector
    rows = [
        _row(row[:2], embedder.name, LABEL, vector)
        for row, vector in zip(labels, vectors[: len(labels)], strict=True)
    ]
    rows += [
        _row(pair, embedder.name, CONTEXTS, mean / max(float(np.linalg.norm(mean)), 1e-12))
        for pair, mean in means.items()
    ]
    return pa.Table.from_pylist(rows, _SCHEMA)


def _around(token_ids: Sequence[int], peak: int, vocabulary: Sequence[str]) -> str:
    shown = token_ids[max(peak - _BEFORE, 0) : peak + 1 + _AFTER]
    return "".join(vocabulary[token_id] for token_id in shown).strip()


def _row(pair: tuple[int, int], model: str, field: str, vector: Float32) -> dict[str, Any]:
    keys = {"sae_id": pair[0], "feature_id": pair[1], "model": model, "field": field}
    return {**keys, "vector": vector.tolist()}


def require_meanings(table: pa.Table, model: str, known: Sequence[str], path: str) -> Meanings:
    """The vectors of a model. Raises: MeaningError that says how to make them."""
    if not len(table):
        has = f"it has those of {', '.join(known)}" if known else "it has none"
        raise MeaningError(
            f"{path} holds no vectors of {model} ({has}): make them with "
            f"`saebase embed {model} --db {path}`"
        )
    return Meanings.of(table)


_SCHEMA = pa.schema(
    {
        "sae_id": pa.int32(),
        "feature_id": pa.int32(),
        "model": pa.string(),
        "field": pa.string(),
        "vector": pa.list_(pa.float32()),
    }
)

_WANTED = """
WITH wanted AS (SELECT unnest(?::INTEGER[]) AS sae_id, unnest(?::INTEGER[]) AS feature_id)
"""
_LABELS = f"""
{_WANTED} SELECT sae_id, feature_id, label FROM features JOIN wanted USING (sae_id, feature_id)
WHERE label IS NOT NULL ORDER BY ALL
"""
_CONTEXTS = f"""
{_WANTED} SELECT sae_id, feature_id, token_ids, peak
FROM contexts JOIN wanted USING (sae_id, feature_id)
WHERE kind = 'top' AND rank <= {_N_CONTEXTS} ORDER BY sae_id, feature_id, rank
"""
