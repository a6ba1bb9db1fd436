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
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from .errors import NotFoundError
from .feature_rows import OF_THESE, FeatureRows, Pair, Row, ids_of
from .words import (
    CONTEXT_WEIGHT,
    LABEL_WEIGHT,
    PEAK_WEIGHT,
    PROMOTED_WEIGHT,
    TOKEN_WEIGHT,
)

AFTER_ALL = "\U0010ffff"
# Looked at for each feature asked for, and again as many times as many if they weren't enough.
_CANDIDATES = 2
_ROUNDING = 1e-9
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


class WordMatch(NamedTuple):
    """What `words` says of one feature and all words that begin so."""

    pair: Pair
    scores: dict[str, float]
    said: Sequence[Row]

    @classmethod
    def of(cls, pair: Pair, said: Sequence[Row]) -> "WordMatch":
        """said: its rows of `words`, in order of the words."""
        scores = dict.fromkeys(_MOST, 0.0)
        for row in said:
            scores[row["field"]] += row["weight"]
        return cls(pair, {name: min(scores[name], most) for name, most in _MOST.items()}, said)

    def score(self) -> float:
        return sum(self.scores.values())

    def example(self) -> int | None:
        """The rowid in `contexts` of the strongest context that peaks on the word, else of one
        that holds it."""
        held = [row for row in self.said if row["example"] is not None]
        at_peak = [row for row in held if row["field"] == "peak"]
        return min((int(row["example"]) for row in at_peak or held), default=None)

    def match(self, example: str | None) -> Match:
        """The same, as what is found. example: the text of its context."""
        tokens = [row for row in self.said if row["field"] == "token"]
        promoted = [row["word"] for row in self.said if row["field"] == "promoted"]
        return Match(
            *self.pair,
            label=self.scores["label"],
            token=self.scores["token"],
            context=self.scores["context"],
            peak=self.scores["peak"],
            promoted=self.scores["promoted"],
            shown_token=max(tokens, key=lambda row: row["weight"])["word"] if tokens else None,
            shown_promoted=promoted[0] if promoted else None,
            example=example,
        )


def word_matches(rows: Rows, word: str, limit: int) -> list[WordMatch]:
    """The features of the highest score on words that begin so, best first, at most `limit`.

    Candidates are those of the largest sum of weights, which no score exceeds: there are enough
    when the worst that is given is no worse than the last candidate could be.
    """
    n = _CANDIDATES * limit
    while True:
        sums = rows(_SUMS, _range(word) | {"limit": n})
        pairs = [(row["sae_id"], row["feature_id"]) for row in sums]
        said = grouped(rows(_SAID, _range(word) | ids_of(pairs)))
        matches = [WordMatch.of(pair, said[pair]) for pair in pairs]
        best = sorted(matches, key=lambda match: (-match.score(), match.pair))[:limit]
        if len(pairs) < n or best[-1].score() >= sums[-1]["weight"] - _ROUNDING:
            return best
        n *= _CANDIDATES


def with_examples(rows: Rows, found: Sequence[WordMatch]) -> list[Match]:
    """The same, with a text of each."""
    examples = [match.example() for match in found]
    shown = rows(_EXAMPLES, {"ids": [row for row in examples if row is not None]})
    texts = {row["id"]: row["text"] for row in shown}
    return [match.match(texts.get(row)) for match, row in zip(found, examples, strict=True)]


def _range(word: str) -> dict[str, Any]:
    return {"word": word, "stop": word + AFTER_ALL}


def found_table(features: FeatureRows, matches: Sequence[Match]) -> pa.Table:
    """sae_id, feature_id, label, score, reason, example, density of each match, in order."""
    of = features.of([(match.sae_id, match.feature_id) for match in matches])
    kept = ("sae_id", "feature_id", "label", "density")
    found = [
        {
            **{name: of[match.sae_id, match.feature_id][name] for name in kept},
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
        f"SELECT sae_id, feature_id, text FROM contexts {OF_THESE} WHERE kind = 'top' AND rank = 1",
        ids_of(features),
    )
    return {(row["sae_id"], row["feature_id"]): row["text"] for row in found}


def grouped(found: Sequence[Row]) -> dict[Pair, list[Row]]:
    """Rows of each feature."""
    rows_of = defaultdict[Pair, list[Row]](list)
    for row in found:
        rows_of[row["sae_id"], row["feature_id"]].append(row)
    return rows_of


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

# What the words that begin so add to a score at most, by field.
_MOST = {
    "label": LABEL_WEIGHT,
    "token": TOKEN_WEIGHT,
    "context": CONTEXT_WEIGHT,
    "peak": PEAK_WEIGHT,
    "promoted": PROMOTED_WEIGHT,
}
_SUMS = """
SELECT sae_id, feature_id, sum(weight) AS weight FROM words WHERE word >= $word AND word < $stop
GROUP BY ALL ORDER BY weight DESC, sae_id, feature_id LIMIT $limit
"""
_SAID = f"""
SELECT * FROM (
    SELECT sae_id, feature_id, word, field, weight, example
    FROM words WHERE word >= $word AND word < $stop
) {OF_THESE} ORDER BY word
"""
_EXAMPLES = """
SELECT id, text FROM (SELECT unnest($ids::BIGINT[]) AS id) JOIN contexts ON contexts.rowid = id
"""
