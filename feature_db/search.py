"""Search over what a database says of its features: words, phrases, regular expressions; no model.

A text matches where the phrase begins a word in it, in any case; in a query of several words, a
text that has all of them apart matches too and counts less. Scores add up over where it matched:

    label     4                      the label says it
    token     3 * part               part of the feature's activations that fall on such tokens
    context   1 * part + 3 * part    of its contexts that hold it, and that peak on it
    promoted  1                      one of the tokens it promotes

One word is looked up in the sorted table `words`, where these scores are. (A part is at most 1: a
context that holds two words which begin so counts twice before.) Of several words the candidates
come from there, a few times as many as are asked for; then the texts of these alone are looked at.
A query without letters or digits, or one that begins with a letter outside of ASCII (which may
stand inside a word), looks at all texts; so does a regular expression.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from .errors import NotFoundError
from .words import CONTEXT_WEIGHT, PEAK_WEIGHT, TOKEN_WEIGHT

_APART = 0.4
# Candidates for each feature asked for: their order in `words` is nearly that of the scores.
_CANDIDATES = 2
_ALL = "TRUE"
_AFTER_ALL = "\U0010ffff"

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

Row = dict[str, Any]
Rows = Callable[[str, dict[str, Any]], Sequence[Row]]


class _Statement(NamedTuple):
    """SQL and the values to bind to it."""

    sql: str
    params: dict[str, object]


def search(rows: Rows, text: str, limit: int, *, is_regex: bool = False) -> pa.Table:
    """The features that `text` finds, ranked, at most `limit`. rows: runs a query, gives dicts.

    Columns: sae_id, feature_id, label, score, reason, example, density.
    Raises: NotFoundError for an empty text, or a regular expression that isn't one.
    """
    if not text.split():
        raise NotFoundError(f"nothing to search for in {text!r}: give a word or a phrase")
    if limit < 1:
        raise NotFoundError(f"limit={limit}: expected 1 or more")
    if not is_regex and re.fullmatch(r"[a-z0-9][^\W_]*", text.strip().lower()):
        found: Sequence[Row] = _word_search(rows, text.strip().lower(), limit)
    else:
        found = rows(*(_regex_search(text, limit) if is_regex else _text_search(rows, text, limit)))
    return pa.Table.from_pylist(list(found), _FOUND)


def _word_search(rows: Rows, word: str, limit: int) -> list[Row]:
    """What `words` says of the words that begin so, with labels and examples of the best."""
    between = {"word": word, "stop": word + _AFTER_ALL}
    best = rows(_WORD_SEARCH, {**between, "limit": limit})
    ids = {name: [row[name] for row in best] for name in ("sae_id", "feature_id", "context")}
    texts = rows(_EXAMPLES, {"context": [each for each in ids["context"] if each is not None]})
    about = rows(_ABOUT, {name: sorted(set(ids[name])) for name in ("sae_id", "feature_id")})
    text_of = {row["context"]: row["text"] for row in texts}
    about_of = {(row["sae_id"], row["feature_id"]): row for row in about}
    return [
        row
        | about_of[row["sae_id"], row["feature_id"]]
        | {"reason": _reason(row), "example": text_of.get(row["context"])}
        for row in best
    ]


def _reason(row: Row) -> str:
    parts = [
        row["of_label"] and "label",
        row["of_token"] and f'fires on "{row["token"]}"',
        row["of_context"]
        and f"{row['of_context']:.0%} of its contexts, "
        f"{row['of_peak'] / PEAK_WEIGHT:.0%} at the peak",
        row["of_promoted"] and f'promotes "{row["promoted"]}"',
    ]
    return "; ".join(filter(None, parts))


def _text_search(rows: Rows, text: str, limit: int) -> _Statement:
    words = text.lower().split()
    phrase = " ".join(words)
    params: dict[str, object] = {"phrase": pattern(phrase), "first": words[0], "limit": limit}
    params |= {"n": len(phrase)}
    params |= {f"word{i}": pattern(word) for i, word in enumerate(words)}
    together = " AND ".join(f"regexp_matches({{0}}, $word{i})" for i in range(len(words)))
    match = (
        "CASE WHEN NOT contains({0}, $first) THEN 0 WHEN regexp_matches({0}, $phrase) THEN 1 "
        f"WHEN {together} THEN {_APART} ELSE 0 END"
    )
    only = _ALL
    if re.match(r"[a-z0-9]", phrase):
        only = _candidates(rows, re.findall(r"[^\W_]+", phrase), _CANDIDATES * limit)
    return _Statement(_filled(match, "contains(lower(text), $first)", only), params)


def _regex_search(text: str, limit: int) -> _Statement:
    try:
        re.compile(text)
    except re.error as error:
        raise NotFoundError(f"{text!r} is no regular expression: {error}") from None
    match = "regexp_matches({0}, $phrase)::INTEGER"
    params: dict[str, object] = {"phrase": f"(?i){text}", "n": 0, "limit": limit}
    return _Statement(_filled(match, "TRUE", _ALL), params)


def _filled(match: str, contains: str, only: str) -> str:
    """match: SQL that says how well a text {0} matches. contains: what contexts surely fulfil."""
    # Few contexts are fetched before their texts are looked at, or all texts would be.
    how_kept = "NOT MATERIALIZED" if only == _ALL else "MATERIALIZED"
    sql = _SEARCH.replace("CONTAINS", contains).replace("ONLY", only).replace("HOW_KEPT", how_kept)
    for column in ("label", "token", "text"):
        sql = sql.replace(f"MATCH_{column.upper()}", match.format(f"lower({column})"))
    return sql


def _candidates(rows: Rows, words: Sequence[str], n: int) -> str:
    """SQL that holds for the n features of largest weight on words that begin so."""
    parts = [
        f"SELECT {i} AS i, sae_id, feature_id, weight FROM words "
        f"WHERE word >= $word{i} AND word < $stop{i}"
        for i in range(len(words))
    ]
    params = {f"word{i}": word for i, word in enumerate(words)}
    params |= {f"stop{i}": word + _AFTER_ALL for i, word in enumerate(words)}
    found = rows(
        "SELECT sae_id, feature_id FROM (SELECT i, sae_id, feature_id, sum(weight) AS weight "
        f"FROM ({' UNION ALL '.join(parts)}) GROUP BY ALL) GROUP BY ALL "
        f"HAVING count(*) = {len(words)} ORDER BY min(weight) DESC, sae_id, feature_id LIMIT {n}",
        params,
    )
    features = sorted({int(row["feature_id"]) for row in found})
    saes = sorted({int(row["sae_id"]) for row in found})
    return f"feature_id IN ({_listed(features)}) AND sae_id IN ({_listed(saes)})"


def _listed(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids)) or "-1"


def pattern(words: str) -> str:
    """A regular expression for lower-case text in which `words` begin a word."""
    body = r"\s+".join(re.escape(word) for word in words.split())
    return rf"(^|[^\pL\pN]){body}" if words[:1].isascii() and words[:1].isalnum() else body


_WORD_SEARCH = f"""
SELECT *, of_label + of_token + of_context + of_peak + of_promoted AS score
FROM (
    SELECT sae_id, feature_id,
        coalesce(max(weight) FILTER (field = 'label'), 0) AS of_label,
        least(coalesce(sum(weight) FILTER (field = 'token'), 0), {TOKEN_WEIGHT}) AS of_token,
        least(coalesce(sum(weight) FILTER (field = 'context'), 0), {CONTEXT_WEIGHT}) AS of_context,
        least(coalesce(sum(weight) FILTER (field = 'peak'), 0), {PEAK_WEIGHT}) AS of_peak,
        coalesce(max(weight) FILTER (field = 'promoted'), 0) AS of_promoted,
        arg_max(word, weight) FILTER (field = 'token') AS token,
        min(word) FILTER (field = 'promoted') AS promoted,
        coalesce(min(context) FILTER (field = 'peak'), min(context)) AS context
    FROM words WHERE word >= $word AND word < $stop GROUP BY sae_id, feature_id
)
ORDER BY score DESC, sae_id, feature_id LIMIT $limit
"""

_EXAMPLES = """
SELECT rowid AS context, text FROM contexts
WHERE rowid IN (SELECT unnest($context::BIGINT[]))
"""

_ABOUT = """
SELECT sae_id, feature_id, label, density FROM features
WHERE feature_id IN (SELECT unnest($feature_id::INTEGER[]))
    AND sae_id IN (SELECT unnest($sae_id::INTEGER[]))
"""

_SEARCH = """
WITH some_contexts AS HOW_KEPT (
    SELECT sae_id, feature_id, text, token_ids, token, peak, act FROM contexts
    WHERE kind <> 'negative' AND ONLY
), by_label AS (
    SELECT sae_id, feature_id, MATCH_LABEL AS quality
    FROM features WHERE label IS NOT NULL AND ONLY AND quality > 0
), by_token AS (
    SELECT sae_id, feature_id, sum(used.n_active * quality) AS n, max_by(token, lift) AS token
    FROM (SELECT *, MATCH_TOKEN AS quality FROM feature_tokens WHERE ONLY) AS used
    WHERE quality > 0 GROUP BY ALL
), by_context AS (
    SELECT sae_id, feature_id, sum(quality) AS n, count(*) AS n_found,
        sum(regexp_matches(lower(substr(
            text, greatest(n_before - $n + 1, 1), length(token) + 2 * $n
        )), $phrase)::INTEGER) AS n_peak,
        arg_max(text, quality * act) AS text
    FROM (
        SELECT *, length(array_to_string(tokens_of(token_ids[:peak]), '')) AS n_before
        FROM (SELECT *, MATCH_TEXT AS quality FROM some_contexts WHERE CONTAINS)
        WHERE quality > 0
    ) GROUP BY ALL
), by_logit AS (
    SELECT sae_id, feature_id, max(quality) AS quality, arg_min(token, rank) AS token
    FROM (SELECT *, MATCH_TOKEN AS quality FROM feature_logits WHERE sign = 1 AND ONLY)
    WHERE quality > 0 GROUP BY ALL
), n_contexts AS (
    SELECT sae_id, feature_id, count(*) AS n_contexts
    FROM some_contexts SEMI JOIN by_context USING (sae_id, feature_id) GROUP BY ALL
)
SELECT sae_id, feature_id, label,
    coalesce(4 * by_label.quality, 0)
        + coalesce(3 * by_token.n / n_active, 0)
        + coalesce((by_context.n + 3 * by_context.n_peak) / n_contexts, 0)
        + coalesce(by_logit.quality, 0) AS score,
    concat_ws('; ',
        CASE WHEN by_label.quality > 0 THEN 'label' END,
        'fires on "' || by_token.token || '"',
        printf('%.0f%% of its contexts, %.0f%% at the peak', 100 * n_found / n_contexts,
            100 * n_peak / n_contexts),
        'promotes "' || by_logit.token || '"') AS reason,
    by_context.text AS example,
    density
FROM features
LEFT JOIN by_label USING (sae_id, feature_id)
LEFT JOIN by_token USING (sae_id, feature_id)
LEFT JOIN by_context USING (sae_id, feature_id)
LEFT JOIN n_contexts USING (sae_id, feature_id)
LEFT JOIN by_logit USING (sae_id, feature_id)
WHERE ONLY AND score > 0
ORDER BY score DESC, sae_id, feature_id
LIMIT $limit
"""
