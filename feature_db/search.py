"""Word search over what a database says of its features: one SQL statement, no model.

A text matches where the phrase begins a word in it, in any case; in a query of several words, a
text that has all of them apart matches too and counts less. Scores add up over where it matched:

    label     4                      the label says it
    token     3 * part               part of the feature's activations that fall on such tokens
    context   1 * part + 3 * part    of its contexts that hold it, and that peak on it
    promoted  1                      one of the tokens it promotes
"""

import re
from typing import NamedTuple

from .errors import NotFoundError

_APART = 0.4


class Search(NamedTuple):
    """A SQL statement and the values to bind to it."""

    sql: str
    params: dict[str, object]


def search_statement(text: str, limit: int) -> Search:
    """The search for `text`, ranked, at most `limit` features.

    Columns: sae_id, feature_id, label, score, reason, example, density.
    Raises: NotFoundError for an empty text.
    """
    words = text.lower().split()
    if not words:
        raise NotFoundError(f"nothing to search for in {text!r}: give a word or a phrase")
    if limit < 1:
        raise NotFoundError(f"limit={limit}: expected 1 or more")
    phrase = " ".join(words)
    params: dict[str, object] = {"phrase": pattern(phrase), "first": words[0], "limit": limit}
    params |= {"n": len(phrase)}
    params |= {f"word{i}": pattern(word) for i, word in enumerate(words)}
    together = " AND ".join(f"regexp_matches({{0}}, $word{i})" for i in range(len(words)))
    match = (
        "CASE WHEN NOT contains({0}, $first) THEN 0 WHEN regexp_matches({0}, $phrase) THEN 1 "
        f"WHEN {together} THEN {_APART} ELSE 0 END"
    )
    sql = _SEARCH
    for column in ("label", "token", "text"):
        sql = sql.replace(f"MATCH_{column.upper()}", match.format(f"lower({column})"))
    return Search(sql, params)


def pattern(words: str) -> str:
    """A regular expression for lower-case text in which `words` begin a word."""
    body = r"\s+".join(re.escape(word) for word in words.split())
    return rf"(^|[^\pL\pN]){body}" if words[:1].isascii() and words[:1].isalnum() else body


_SEARCH = """
WITH by_label AS (
    SELECT sae_id, feature_id, MATCH_LABEL AS quality
    FROM features WHERE label IS NOT NULL AND quality > 0
), by_token AS (
    SELECT sae_id, feature_id, sum(used.n_active * quality) AS n, max_by(token, lift) AS token
    FROM (SELECT *, MATCH_TOKEN AS quality FROM feature_tokens) AS used
    WHERE quality > 0 GROUP BY ALL
), by_context AS (
    SELECT sae_id, feature_id, sum(quality) AS n, count(*) AS n_found,
        sum(regexp_matches(around, $phrase)::INTEGER) AS n_peak,
        arg_max(text, quality * act) AS text
    FROM (
        SELECT *, MATCH_TEXT AS quality,
            length(array_to_string(tokens[:peak], '')) AS n_before,
            lower(substr(text, greatest(n_before - $n + 1, 1), length(token) + 2 * $n)) AS around
        FROM contexts WHERE contains(lower(text), $first)
    )
    WHERE quality > 0 GROUP BY ALL
), by_logit AS (
    SELECT sae_id, feature_id, max(quality) AS quality, arg_min(token, rank) AS token
    FROM (SELECT *, MATCH_TOKEN AS quality FROM feature_logits WHERE sign = 1)
    WHERE quality > 0 GROUP BY ALL
), n_contexts AS (
    SELECT sae_id, feature_id, count(*) AS n_contexts
    FROM contexts SEMI JOIN by_context USING (sae_id, feature_id) GROUP BY ALL
)
SELECT sae_id, feature_id, label,
    coalesce(4 * by_label.quality, 0)
        + coalesce(3 * by_token.n / n_active, 0)
        + coalesce((by_context.n + 3 * by_context.n_peak) / n_contexts, 0)
        + coalesce(by_logit.quality, 0) AS score,
    concat_ws('; ',
        CASE WHEN by_label.quality > 0 THEN 'label' END,
        'fires on "' || by_token.token || '"',
        n_found || ' of ' || n_contexts || ' contexts, ' || n_peak || ' at the peak',
        'promotes "' || by_logit.token || '"') AS reason,
    by_context.text AS example,
    density
FROM features
LEFT JOIN by_label USING (sae_id, feature_id)
LEFT JOIN by_token USING (sae_id, feature_id)
LEFT JOIN by_context USING (sae_id, feature_id)
LEFT JOIN n_contexts USING (sae_id, feature_id)
LEFT JOIN by_logit USING (sae_id, feature_id)
WHERE score > 0
ORDER BY score DESC, sae_id, feature_id
LIMIT $limit
"""
