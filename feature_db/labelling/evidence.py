"""A database -> what it offers about some features: which to label, and their contexts.

Everything is read in few queries over short-lived connections; the order of rows is fixed.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..database import FeatureDB
from ..errors import LabelError
from ..explanations import LLM
from ..feature_rows import Pair
from .passages import NEIGHBOR, RANDOM, VERIFIED, FeatureEvidence, Passage

_CONTEXTS_A_NEIGHBOR = 4
_N_OTHERS = 1024
_QUARTERS = 4

Features = str | Sequence[int]


class Wanted(NamedTuple):
    """Features to label, as (sae_id, feature_id) in order; how many were left out, and why."""

    features: list[Pair]
    n_done: int
    n_empty: int


def wanted_features(
    db: FeatureDB, features: Features, sae_id: int | None, model: str, recipe: str
) -> Wanted:
    """The features that are meant and that aren't labelled so already.

    features: "all", feature ids, or SQL that gives feature_id and, if it likes, sae_id.
    Raises: LabelError for SQL without feature_id, or features that there aren't.
    """
    pairs = list(dict.fromkeys(_meant(db, features, sae_id)))
    has_contexts = set(_pairs(db, "SELECT sae_id, feature_id FROM features WHERE NOT is_dead"))
    done = set(
        _pairs(
            db,
            "SELECT sae_id, feature_id FROM explanations "
            "WHERE method = ? AND model = ? AND recipe = ?",
            [LLM, model, recipe],
        )
    )
    known = set(_pairs(db, "SELECT sae_id, feature_id FROM features"))
    for pair in pairs:
        if pair not in known:
            raise LabelError(f"no feature {pair[1]} in SAE {pair[0]} of {db.path}")
    with_contexts = [pair for pair in pairs if pair in has_contexts]
    left = [pair for pair in with_contexts if pair not in done]
    return Wanted(left, len(with_contexts) - len(left), len(pairs) - len(with_contexts))


def read_others(db: FeatureDB, seed: int) -> dict[int, list[Passage]]:
    """Contexts drawn from all features of each SAE: what is surely of other features mostly."""
    found: dict[int, list[Passage]] = {}
    rows = _rows(
        db,
        f"SELECT sae_id, {_COLUMNS} FROM contexts WHERE kind = 'top' QUALIFY row_number() OVER "
        "(PARTITION BY sae_id ORDER BY hash(feature_id, rank, ?), feature_id, rank) <= ? "
        "ORDER BY sae_id, feature_id, rank",
        [seed, _N_OTHERS],
    )
    for row in rows:
        found.setdefault(row["sae_id"], []).append(_passage(row, RANDOM))
    return found


def read_evidence(
    db: FeatureDB, features: Sequence[Pair], others: dict[int, list[Passage]]
) -> Iterator[FeatureEvidence]:
    """What there is about some features, in their order."""
    own: dict[Pair, list[Passage]] = {pair: [] for pair in features}
    verified: dict[Pair, list[Passage]] = {pair: [] for pair in features}
    near: dict[Pair, list[Passage]] = {pair: [] for pair in features}
    for row in _rows(db, _OWN, _asked(features)):
        pair = (row["sae_id"], row["feature_id"])
        is_silent = row["kind"] == VERIFIED
        (verified if is_silent else own)[pair].append(_passage(row, _part(row)))
    for row in _rows(db, _NEAR, [*_asked(features), _CONTEXTS_A_NEIGHBOR]):
        near[row["sae_id"], row["wanted_id"]].append(_passage(row, NEIGHBOR))
    for pair in features:
        yield FeatureEvidence(*pair, own[pair], verified[pair], near[pair], others.get(pair[0], []))


def _meant(db: FeatureDB, features: Features, sae_id: int | None) -> list[Pair]:
    if features == "all":
        where, params = ("", []) if sae_id is None else (" WHERE sae_id = ?", [sae_id])
        sql = f"SELECT sae_id, feature_id FROM features{where} ORDER BY sae_id, feature_id"
        return _pairs(db, sql, params)
    if not isinstance(features, str):
        sae_id = db.require_sae(sae_id)
        return [(sae_id, int(feature_id)) for feature_id in features]
    found = db.sql(features).arrow()
    if "feature_id" not in found.column_names:
        raise LabelError(
            f"the SQL gives {', '.join(found.column_names) or 'nothing'}: expected a column "
            "feature_id, and sae_id where the database holds several SAEs"
        )
    ids = found.column("feature_id").to_pylist()
    if "sae_id" in found.column_names:
        pairs = zip(found.column("sae_id").to_pylist(), ids, strict=True)
        return [pair for pair in pairs if sae_id in (None, pair[0])]
    sae_id = db.require_sae(sae_id)
    return [(sae_id, feature_id) for feature_id in ids]


def _asked(features: Sequence[Pair]) -> list[Any]:
    return [[pair[0] for pair in features], [pair[1] for pair in features]]


def _part(row: dict[str, Any]) -> str:
    """ "top", "negative", or the quarter of the feature's acts that a sampled context is from."""
    if row["quantile"] is None:
        return str(row["kind"])
    quarter = min(int(row["quantile"] * _QUARTERS), _QUARTERS - 1)
    return f"quantile {quarter / _QUARTERS:g}-{(quarter + 1) / _QUARTERS:g}"


def _passage(row: dict[str, Any], part: str) -> Passage:
    return Passage(
        part,
        row["doc_id"],
        row["position"] - row["peak"],
        row["act"],
        row["text"],
        tuple(row["tokens"]),
        tuple(row["acts"]),
    )


def _pairs(db: FeatureDB, sql: str, params: Sequence[Any] = ()) -> list[Pair]:
    found = db.sql(sql, params).arrow()
    return list(zip(*(found.column(i).to_pylist() for i in range(2)), strict=True))


def _rows(db: FeatureDB, sql: str, params: Sequence[Any]) -> list[dict[str, Any]]:
    """Rows with `token_ids`, and these as `tokens`."""
    texts, found = db.vocabulary(), db.sql(sql, params).arrow().to_pylist()
    return [{**row, "tokens": [texts[token_id] for token_id in row["token_ids"]]} for row in found]


_COLUMNS = "feature_id, kind, rank, quantile, doc_id, position, act, peak, text, token_ids, acts"
_WANTED = (
    "WITH wanted AS (SELECT unnest(?::INTEGER[]) AS sae_id, unnest(?::INTEGER[]) AS wanted_id)"
)
_OWN = f"""
{_WANTED}
SELECT sae_id, {_COLUMNS} FROM contexts JOIN wanted USING (sae_id)
WHERE feature_id = wanted_id
ORDER BY sae_id, feature_id, kind = 'quantile', kind, rank
"""
_NEAR = f"""
{_WANTED}, near AS (
    SELECT sae_id, wanted_id, neighbor_id AS near_id, rank AS nearness
    FROM neighbors JOIN wanted USING (sae_id) WHERE feature_id = wanted_id
)
SELECT sae_id, wanted_id, {_COLUMNS} FROM contexts JOIN near USING (sae_id)
WHERE feature_id = near_id AND kind = 'top' AND rank <= ?
ORDER BY sae_id, wanted_id, nearness, rank
"""
