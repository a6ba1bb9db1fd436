"""Search through texts: phrases of several words, regular expressions, words in any script.

Candidates first, a few times as many as are asked for: features that have to do with all the words
by the table `words`; or, for what that table can't look up (a regular expression, a query that
begins without an ASCII letter or digit), those that a look at all texts finds. Then the texts of
the candidates alone are read and scored.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from .errors import NotFoundError
from .feature_rows import OF_THESE, Pair, Row, ids_of
from .search import AFTER_ALL, Match, Rows, grouped
from .words import CONTEXT_WEIGHT, LABEL_WEIGHT, PEAK_WEIGHT, TOKEN_WEIGHT

_APART = 0.4
# Candidates for each feature asked for: their order is nearly that of the scores.
_CANDIDATES = 2
_SCANNED = 5


class Query(NamedTuple):
    """What is searched for.

    quality: how well a text in lower case matches, 0 to 1. pattern: the phrase, in such a text.
    words: those that it looks up in `words`; none where all texts are looked at. condition: SQL
    that holds for every text {0} in lower case that matches; params: its parameters.
    """

    quality: Callable[[str], float]
    pattern: re.Pattern[str]
    words: list[str]
    condition: str
    params: dict[str, str]


def phrase_query(text: str) -> Query:
    """A phrase, whose words may also stand apart."""
    words = text.lower().split()
    whole, each = _pattern(" ".join(words)), [_pattern(word) for word in words]

    def quality(text: str) -> float:
        if whole.search(text):
            return 1.0
        return _APART if all(word.search(text) for word in each) else 0.0

    listed = re.findall(r"[^\W_]+", " ".join(words)) if re.match(r"[a-z0-9]", words[0]) else []
    condition = " AND ".join(f"contains({{0}}, $word{i})" for i in range(len(words)))
    params = {f"word{i}": word for i, word in enumerate(words)}
    return Query(quality, whole, listed, condition, params)


def regex_query(text: str) -> Query:
    """A regular expression, in any case. Raises: NotFoundError if it isn't one."""
    try:
        pattern = re.compile(text, re.IGNORECASE)
    except re.error as error:
        raise NotFoundError(f"{text!r} is no regular expression: {error}") from None
    params = {"regex": f"(?i){text}"}
    return Query(
        lambda text: float(bool(pattern.search(text))),
        pattern,
        [],
        "regexp_matches({0}, $regex)",
        params,
    )


def text_matches(rows: Rows, vocabulary: Sequence[str], query: Query, limit: int) -> list[Match]:
    """The features that match, best first, at most `limit`. vocabulary: each token's text."""
    known = _listed(rows, query, limit) if query.words else _scanned(rows, query, limit)
    read = _Read(rows, known, query)
    matches = [_match(pair, read, query, vocabulary) for pair in known]
    found = [match for match in matches if match.score > 0]
    return sorted(found, key=lambda match: (-match.score, *match[:2]))[:limit]


class _Read:
    """What is said of some features: rows of each, by (sae_id, feature_id), and how well
    they match.

    before: of a context that matches, by its rowid, the tokens before its active one.
    """

    def __init__(self, rows: Rows, features: Sequence[Pair], query: Query) -> None:
        ids = ids_of(features)
        self.features = grouped(rows(_FEATURES, ids))
        self.tokens = _scored(rows(_TOKENS, ids), "token", query)
        self.promoted = _scored(rows(_PROMOTED, ids), "token", query)
        self.contexts = _scored(rows(_CONTEXTS, ids), "text", query)
        matching = [row["id"] for of in self.contexts.values() for quality, row in of if quality]
        found = rows(_BEFORE, {"ids": matching})
        self.before: dict[int, list[int]] = {row["id"]: row["token_ids"] for row in found}


_Scored = dict[Pair, list[tuple[float, Row]]]


def _scored(found: Sequence[Row], shown: str, query: Query) -> _Scored:
    return defaultdict(
        list,
        {
            pair: [(query.quality(row[shown].lower()), row) for row in of]
            for pair, of in grouped(found).items()
        },
    )


_FEATURES = f"SELECT sae_id, feature_id, label, n_active FROM features {OF_THESE}"
_TOKENS = f"SELECT sae_id, feature_id, token, n_active FROM feature_tokens {OF_THESE} ORDER BY rank"
_PROMOTED = (
    f"SELECT sae_id, feature_id, token FROM feature_logits {OF_THESE} WHERE sign = 1 ORDER BY rank"
)
# Lists of tokens take two thirds of the time to read: those of contexts that match, later.
_CONTEXTS = (
    "SELECT contexts.rowid AS id, sae_id, feature_id, text, token, act FROM contexts "
    f"{OF_THESE} WHERE kind <> 'negative' ORDER BY kind, rank"
)
_BEFORE = (
    "SELECT id, token_ids[:peak] AS token_ids FROM (SELECT unnest($ids::BIGINT[]) AS id) "
    "JOIN contexts ON contexts.rowid = id"
)


def _match(pair: Pair, read: _Read, query: Query, vocabulary: Sequence[str]) -> Match:
    (feature,) = read.features[pair]
    tokens, promoted, contexts = read.tokens[pair], read.promoted[pair], read.contexts[pair]
    n_contexts = max(len(contexts), 1)
    n_peak = sum(
        _is_at_peak(row, [vocabulary[token_id] for token_id in read.before[row["id"]]], query)
        for quality, row in contexts
        if quality
    )
    on_tokens = sum(quality * row["n_active"] for quality, row in tokens)
    return Match(
        *pair,
        label=LABEL_WEIGHT * query.quality((feature["label"] or "").lower()),
        token=TOKEN_WEIGHT * on_tokens / max(feature["n_active"], 1),
        context=CONTEXT_WEIGHT * sum(quality for quality, _ in contexts) / n_contexts,
        peak=PEAK_WEIGHT * n_peak / n_contexts,
        promoted=max((quality for quality, _ in promoted), default=0.0),
        shown_token=_best(tokens, "token", "n_active"),
        shown_promoted=_best(promoted, "token"),
        example=_best(contexts, "text", "act"),
    )


def _best(found: Iterable[tuple[float, Row]], shown: str, by: str | None = None) -> str | None:
    """What the best match shows; of equal ones the first."""
    some = [(quality, row) for quality, row in found if quality > 0]
    return str(max(some, key=lambda f: f[0] * (f[1][by] if by else 1))[1][shown]) if some else None


def _is_at_peak(row: Row, before: Sequence[str], query: Query) -> bool:
    """Whether the phrase reaches into the active token of a context. before: the tokens before."""
    start = len("".join(before))
    stop = start + len(row["token"])
    found = query.pattern.finditer(row["text"].lower())
    return any(each.start() < stop and each.end() > start for each in found)


def _pattern(words: str) -> re.Pattern[str]:
    """Where `words` begin a word of a text in lower case."""
    body = r"\s+".join(re.escape(word) for word in words.split())
    begins_word = words[:1].isascii() and words[:1].isalnum()
    return re.compile(rf"(?<![^\W_]){body}" if begins_word else body)


def _listed(rows: Rows, query: Query, limit: int) -> list[Pair]:
    """The features of largest weight on words that begin so, on all of them."""
    parts = [
        f"SELECT {i} AS i, sae_id, feature_id, weight FROM words "
        f"WHERE word >= $word{i} AND word < $stop{i}"
        for i in range(len(query.words))
    ]
    params = {f"word{i}": word for i, word in enumerate(query.words)}
    params |= {f"stop{i}": word + AFTER_ALL for i, word in enumerate(query.words)}
    return _pairs(
        rows(
            "SELECT sae_id, feature_id FROM (SELECT i, sae_id, feature_id, sum(weight) AS weight "
            f"FROM ({' UNION ALL '.join(parts)}) GROUP BY ALL) GROUP BY ALL "
            f"HAVING count(*) = {len(query.words)} "
            f"ORDER BY min(weight) DESC, sae_id, feature_id LIMIT {_CANDIDATES * limit}",
            params,
        )
    )


def _scanned(rows: Rows, query: Query, limit: int) -> list[Pair]:
    """The features that most texts of match, of all texts."""
    holds = {
        column: query.condition.format(f"lower({column})") for column in ("label", "token", "text")
    }
    return _pairs(
        rows(
            "SELECT sae_id, feature_id FROM ("
            f"SELECT sae_id, feature_id, 4 AS weight FROM features WHERE {holds['label']} "
            "UNION ALL SELECT sae_id, feature_id, 3 / rank FROM feature_tokens "
            f"WHERE {holds['token']} "
            "UNION ALL SELECT sae_id, feature_id, 1 / rank FROM feature_logits "
            f"WHERE sign = 1 AND {holds['token']} "
            "UNION ALL SELECT sae_id, feature_id, 0.1 FROM contexts "
            f"WHERE kind <> 'negative' AND {holds['text']}"
            ") GROUP BY ALL ORDER BY sum(weight) DESC, sae_id, feature_id "
            f"LIMIT {_SCANNED * limit}",
            query.params,
        )
    )


def _pairs(found: Sequence[Row]) -> list[Pair]:
    return [(row["sae_id"], row["feature_id"]) for row in found]
