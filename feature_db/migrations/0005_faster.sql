-- Uncompressed, a label is read without those of the 16,383 features beside it.
CREATE TABLE new_features (
    sae_id INTEGER NOT NULL,
    feature_id INTEGER NOT NULL,
    density DOUBLE NOT NULL,
    n_active BIGINT NOT NULL,
    mean_act FLOAT,
    max_act FLOAT,
    is_dead BOOLEAN NOT NULL,
    label VARCHAR USING COMPRESSION uncompressed,
    label_method VARCHAR USING COMPRESSION uncompressed,
    std_act FLOAT,
    n_documents BIGINT,
    mean_position FLOAT
);
INSERT INTO new_features FROM features;
DROP TABLE features;
ALTER TABLE new_features RENAME TO features;

-- By a join: a list of the whole vocabulary went along with each row that was sorted or joined.
CREATE OR REPLACE MACRO tokens_of(ids) AS coalesce(
    (
        SELECT list(token ORDER BY place)
        FROM (SELECT unnest(ids) AS token_id, generate_subscripts(ids, 1) AS place)
        JOIN vocabulary USING (token_id)
    ),
    if(ids IS NULL, NULL, []::VARCHAR[])
);
