"""Search over what a database says of its features: words, phrases, regular expressions; no model.

A text matches where the phrase begins a word in it, in any case; in a query of several words, a
text that has all of them apart matches too and counts less. Scores add up over where it matched:

    label     4                      the label says it
    token     3 * part               part of the feature's activations that fall on such tokens
    context   1 * part + 3 * part    of its contexts that hold it, and that peak on it
    promoted  1                      one of the tokens it promotes

One word is looked up in the sorted table `words`, which holds these scores. (A part is 1 at most: a
context that holds two words which begin so counts twice before.) What else is asked for goes
through the texts of candidates: see search_texts.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from .errors import NotFoundError
from .words import CONTEXT_WEIGHT, LABEL_WEIGHT, PEAK_WEIGHT, TOKEN_WEIGHT

AFTER_ALL = "\U0010ffff"
OF_THESE = """feature_id IN (SELECT unnest($feature_ids::INTEGER[]))
    AND sae_id IN (SELECT unnest($sae_ids::INTEGER[]))"""
ABOUT = f"SELECT sae_id, feature_id, label, density, n_active FROM features WHERE {OF_THESE}"

Pair = tuple[int, int]
Row = dict[str, Any]
Rows = Callable[[str, dict[str, Any]], Sequence[Row]]


class Match(NamedTuple):
    """Where one feature matched. label, token, context, peak, promoted: its score from each.

    shown_token, shown_promoted: a token that matched. example: a context that did. meant: by the
    meaning of which field; its score is then the cosine.
    """

    sae_id: int
    feature_id: int
    label: float
    token: float
    context: float
    peak: float
    promoted: float
    shown_token: str | None
    shown_promoted: str | None
    example: str | None
    cosine: float = 0.0
    meant: str | None = None

    @classmethod
    def by_meaning(
        cls, sae_id: int, feature_id: int, cosine: float, field: str, example: str | None
    ) -> "Match":
        """A feature of which a field means what was searched for."""
        nothing = dict.fromkeys(("label", "token", "context", "peak", "promoted"), 0.0)
        return cls(
            sae_id,
            feature_id,
            **nothing,
            shown_token=None,
            shown_promoted=None,
            example=example,
            cosine=cosine,
            meant=field,
        )

    @property
    def score(self) -> float:
        return self.cosine + self.label + self.token + self.context + self.peak + self.promoted

    def reason(self) -> str:
        """Where it matched, in words."""
        parts = [
            self.meant and f"meaning of its {self.meant}",
            self.label and "label",
            self.token and f'fires on "{self.shown_token}"',
            self.context
            and f"{self.context / CONTEXT_WEIGHT:.0%} of its contexts, "
            f"{self.peak / PEAK_WEIGHT:.0%} at the peak",
            self.promoted and f'promotes "{self.shown_promoted}"',
        ]
        return "; ".join(part for part in parts if part)


def require_text(text: str, limit: int) -> None:
    """Raises: NotFoundError unless there is something to search for and something to give."""
    if not text.split():
        raise NotFoundError(f"nothing to search for in {text!r}: give a word or a phrase")
    if limit < 1:
        raise NotFoundError(f"limit={limit}: expected 1 or more")


def is_one_word(text: str) -> bool:
    """Whether `text` is one word of those that `words` holds, and begins in ASCII."""
    return re.fullmatch(r"[a-z0-9][^\W_]*", text.strip().lower()) is not None


def word_matches(rows: Rows, word: str, limit: int) -> list[Match]:
    """What `words` says of words that begin so, best first, at most `limit` features."""
    params = {"word": word, "stop": word + AFTER_ALL, "limit": limit}
    best = rows(_WORD_SEARCH, params)
    ids = [row["example"] for row in best if row["example"] is not None]
    texts = {row["id"]: row["text"] for row in rows(_EXAMPLES, {"ids": ids})}
    return [Match(**{**row, "example": texts.get(row["example"])}) for row in best]


def found_table(rows: Rows, matches: Sequence[Match]) -> pa.Table:
    """sae_id, feature_id, label, score, reason, example, density of each, in order."""
    about = {(row["sae_id"], row["feature_id"]): row for row in rows(ABOUT, ids_of(matches))}
    found = [
        {
            **about[match.sae_id, match.feature_id],
            "score": match.score,
            "reason": match.reason(),
            "example": match.example,
        }
        for match in matches
    ]
    return pa.Table.from_pylist(found, _FOUND)


def strongest_texts(rows: Rows, features: Sequence[Pair]) -> dict[Pair, str]:
    """The text of each feature's strongest context."""
    found = rows(
        "SELECT sae_id, feature_id, text FROM contexts "
        f"WHERE kind = 'top' AND rank = 1 AND {OF_THESE}",
        ids_of(features),
    )
    return {(row["sae_id"], row["feature_id"]): row["text"] for row in found}


def ids_of(features: Sequence[Match] | Sequence[Pair]) -> dict[str, list[int]]:
    """The parameters of OF_THESE: features of these ids, of any of these SAEs."""
    return {
        "sae_ids": sorted({each[0] for each in features}),
        "feature_ids": sorted({each[1] for each in features}),
    }


_FOUND = pa.schema(
    {
        "sae_id": pa.int32(),
        "feature_id": pa.int32(),
        "label": pa.string(),
        "score": pa.float64(),
        "reason": pa.string(),
        "example": pa.string(),
        "density": pa.float64(),
    }
)

_WORD_SEARCH = f"""
SELECT * FROM (
    SELECT sae_id, feature_id,
        least(coalesce(max(weight) FILTER (field = 'label'), 0), {LABEL_WEIGHT}) AS label,
        least(coalesce(sum(weight) FILTER (field = 'token'), 0), {TOKEN_WEIGHT}) AS token,
        least(coalesce(sum(weight) FILTER (field = 'context'), 0), {CONTEXT_WEIGHT}) AS context,
        least(coalesce(sum(weight) FILTER (field = 'peak'), 0), {PEAK_WEIGHT}) AS peak,
        coalesce(max(weight) FILTER (field = 'promoted'), 0) AS promoted,
        arg_max(word, weight) FILTER (field = 'token') AS shown_token,
        min(word) FILTER (field = 'promoted') AS shown_promoted,
        coalesce(min(example) FILTER (field = 'peak'), min(example)) AS example
    FROM words WHERE word >= $word AND word < $stop GROUP BY sae_id, feature_id
)
ORDER BY label + token + context + peak + promoted DESC, sae_id, feature_id LIMIT $limit
"""

_EXAMPLES = "SELECT rowid AS id, text FROM contexts WHERE rowid IN (SELECT unnest($ids::BIGINT[]))"
