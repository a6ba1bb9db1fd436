"""The words that features have to do with, sorted: what makes search fast.

In: labels, tokens and contexts of a database. Out: its table `words`. A word is a run of letters
and digits, in lower case; a row's weight is what it adds to the feature's score in a search for
exactly that word (see search). Words of contexts name the strongest one, by its rowid: contexts
are never deleted, so that it stays.
"""

import duckdb

LABEL_WEIGHT, TOKEN_WEIGHT, CONTEXT_WEIGHT, PEAK_WEIGHT, PROMOTED_WEIGHT = 4.0, 3.0, 1.0, 3.0, 1.0
_WORD = r"[\pL\pN]+"
_FEATURES_AT_ONCE = 65_536


def write_words(connection: duckdb.DuckDBPyConnection, at_once: int = _FEATURES_AT_ONCE) -> None:
    """Fill `words` from the other tables of an open database, in place of what it holds.

    at_once: features whose words are in memory; those of more are sorted on disk.
    """
    _run(connection, "DELETE FROM words")
    ((n,),) = connection.execute(
        "SELECT coalesce(max(feature_id), -1) + 1 FROM features"
    ).fetchall()
    if n <= at_once:
        _run(connection, f"INSERT INTO words {_select('TRUE')} {_ORDER}")
        return
    _run(connection, "CREATE TEMP TABLE unsorted_words AS FROM words")
    for first in range(0, n, at_once):
        part = f"feature_id >= {first} AND feature_id < {first + at_once}"
        _run(connection, f"INSERT INTO unsorted_words {_select(part)}")
    _run(connection, f"INSERT INTO words FROM unsorted_words {_ORDER}")
    _run(connection, "DROP TABLE unsorted_words")


def _run(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    connection.execute(sql).fetchall()


def words_in(text: str) -> str:
    """SQL: the list of distinct words in a text."""
    return f"list_distinct(regexp_extract_all(lower({text}), '{_WORD}'))"


def label_words(features: str) -> str:
    """SQL: rows of `words` from labels. features: a table with label, sae_id and feature_id."""
    return (
        f"SELECT unnest({words_in('label')}) AS word, 'label' AS field, sae_id, feature_id, "
        f"{LABEL_WEIGHT} AS weight, NULL AS example FROM {features} WHERE label IS NOT NULL"
    )


# As `tokens_of`, and faster for all rows of a table, where none is sorted.
_TOKENS = """list_select(
    (SELECT list(token ORDER BY token_id) FROM vocabulary), list_transform({0}, lambda id: id + 1)
)"""
# The word that the peak is a part of, of which six tokens on either side are looked at.
_PEAK = f"""
    CASE WHEN regexp_matches(token, '^{_WORD}') THEN regexp_extract(
        array_to_string({_TOKENS.format("token_ids[greatest(peak - 5, 1):peak]")}, ''), '{_WORD}$')
    ELSE '' END
    || token ||
    CASE WHEN regexp_matches(token, '{_WORD}$') THEN regexp_extract(
        array_to_string({_TOKENS.format("token_ids[peak + 2:peak + 7]")}, ''), '^{_WORD}')
    ELSE '' END
"""

_ORDER = "ORDER BY word, field, sae_id, feature_id"


def _select(part: str) -> str:
    """SQL: rows of `words`. part: a condition on feature_id that holds for the features meant."""
    features = f"(FROM features WHERE {part})"
    return f"""
WITH shown AS (
    SELECT *, rowid AS example FROM contexts WHERE kind <> 'negative' AND {part}
), n_shown AS (
    SELECT sae_id, feature_id, count(*) AS n_contexts FROM shown GROUP BY ALL
)
SELECT word, field, sae_id, feature_id, weight, example FROM (
    {label_words(features)}
    UNION ALL
    SELECT word, 'token', sae_id, feature_id,
        {TOKEN_WEIGHT} * sum(used.n_active) / any_value(features.n_active), NULL
    FROM (SELECT *, unnest({words_in("token")}) AS word FROM feature_tokens WHERE {part}) AS used
    JOIN features USING (sae_id, feature_id) GROUP BY word, sae_id, feature_id
    UNION ALL
    SELECT DISTINCT unnest({words_in("token")}), 'promoted', sae_id, feature_id,
        {PROMOTED_WEIGHT}, NULL
    FROM feature_logits WHERE sign = 1 AND {part}
    UNION ALL
    SELECT word, field, sae_id, feature_id, any_value(weight) * count(*) / any_value(n_contexts),
        min(example)
    FROM (
        SELECT unnest({words_in("text")}) AS word, 'context' AS field, sae_id, feature_id,
            {CONTEXT_WEIGHT} AS weight, example FROM shown
        UNION ALL
        SELECT unnest({words_in(_PEAK)}), 'peak', sae_id, feature_id, {PEAK_WEIGHT}, example
        FROM shown
    ) JOIN n_shown USING (sae_id, feature_id)
    GROUP BY word, field, sae_id, feature_id
)
WHERE word <> ''
"""
