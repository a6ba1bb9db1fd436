-- Each token's text once, in place of the lists in `contexts`; where a word stands, beside it.
CREATE TABLE vocabulary (token_id INTEGER NOT NULL, token VARCHAR NOT NULL);

-- A database of before: the tokens that it shows, and nothing for all others.
INSERT INTO vocabulary
SELECT token_id, coalesce(any_value(token), '')
FROM (
    SELECT unnest(token_ids) AS token_id, unnest(tokens) AS token FROM contexts
    UNION ALL SELECT token_id, token FROM feature_logits
    UNION ALL SELECT token_id, token FROM feature_tokens
    UNION ALL SELECT token_id, token FROM feature_nearby_tokens
    UNION ALL SELECT unnest(range(1 + (SELECT max(token_id) FROM feature_logits))), NULL
)
GROUP BY token_id ORDER BY token_id;

CREATE MACRO tokens_of(ids) AS list_select(
    (SELECT list(token ORDER BY token_id) FROM vocabulary), list_transform(ids, lambda id: id + 1)
);

-- Uncompressed, one row's text is read without those of the 2,047 beside it.
CREATE TABLE new_contexts (
    sae_id INTEGER NOT NULL,
    feature_id INTEGER NOT NULL,
    kind VARCHAR NOT NULL,
    rank INTEGER NOT NULL,
    quantile DOUBLE,
    neighbor_id INTEGER,
    doc_id BIGINT NOT NULL,
    position INTEGER NOT NULL,
    act FLOAT NOT NULL,
    token VARCHAR NOT NULL USING COMPRESSION uncompressed,
    peak INTEGER NOT NULL,
    text VARCHAR NOT NULL USING COMPRESSION uncompressed,
    token_ids INTEGER[] NOT NULL,
    acts FLOAT[] NOT NULL
);
INSERT INTO new_contexts BY NAME SELECT * EXCLUDE (tokens) FROM contexts;
DROP TABLE contexts;
ALTER TABLE new_contexts RENAME TO contexts;

DROP MACRO TABLE contexts_of;
CREATE MACRO contexts_of(id, n, sae := 0) AS TABLE
    SELECT rank, act, doc_id, position, token, peak, tokens_of(token_ids) AS tokens, acts, text
    FROM contexts
    WHERE sae_id = sae AND feature_id = id AND kind = 'top' AND rank <= n ORDER BY rank;

-- example: rowid in `contexts` of the strongest one that holds the word.
DROP TABLE words;
CREATE TABLE words (
    word VARCHAR NOT NULL,
    field VARCHAR NOT NULL,
    sae_id INTEGER NOT NULL,
    feature_id INTEGER NOT NULL,
    weight FLOAT NOT NULL,
    example BIGINT
);

-- P(|Z| >= |z|) of a standard normal Z, within 1% up to |z| = 8.
-- Source: Abramowitz and Stegun 1964, 26.2.17.
CREATE MACRO two_sided_p(z) AS 2 * exp(-z * z / 2) / sqrt(2 * pi()) * (
    0.319381530 / (1 + 0.2316419 * abs(z)) - 0.356563782 / pow(1 + 0.2316419 * abs(z), 2)
    + 1.781477937 / pow(1 + 0.2316419 * abs(z), 3) - 1.821255978 / pow(1 + 0.2316419 * abs(z), 4)
    + 1.330274429 / pow(1 + 0.2316419 * abs(z), 5)
);

-- What labels and contexts mean to an embedding model: vectors of length 1.
CREATE TABLE meanings (
    sae_id INTEGER NOT NULL,
    feature_id INTEGER NOT NULL,
    model VARCHAR NOT NULL,
    field VARCHAR NOT NULL,
    vector FLOAT[] NOT NULL
);
