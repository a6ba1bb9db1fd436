-- Moments, positions, documents, tokens beside the active one, co-activation, hard negatives.
ALTER TABLE features ADD COLUMN std_act FLOAT;
ALTER TABLE features ADD COLUMN n_documents BIGINT;
ALTER TABLE features ADD COLUMN mean_position FLOAT;
ALTER TABLE contexts ADD COLUMN neighbor_id INTEGER;

CREATE TABLE feature_nearby_tokens (
    sae_id INTEGER NOT NULL,
    feature_id INTEGER NOT NULL,
    place INTEGER NOT NULL,
    rank INTEGER NOT NULL,
    token_id INTEGER NOT NULL,
    token VARCHAR NOT NULL,
    n_active BIGINT NOT NULL,
    n_total BIGINT NOT NULL,
    mean_act FLOAT NOT NULL,
    lift DOUBLE NOT NULL
);

CREATE TABLE feature_positions (
    sae_id INTEGER NOT NULL,
    feature_id INTEGER NOT NULL,
    bin INTEGER NOT NULL,
    lo BIGINT NOT NULL,
    hi BIGINT,
    n BIGINT NOT NULL,
    rate DOUBLE NOT NULL
);

CREATE TABLE feature_documents (
    sae_id INTEGER NOT NULL,
    feature_id INTEGER NOT NULL,
    rank INTEGER NOT NULL,
    doc_id BIGINT NOT NULL,
    n_active BIGINT NOT NULL,
    mean_act FLOAT NOT NULL,
    max_act FLOAT NOT NULL,
    share DOUBLE NOT NULL
);

CREATE TABLE coactivations (
    sae_id INTEGER NOT NULL,
    feature_id INTEGER NOT NULL,
    rank INTEGER NOT NULL,
    other_id INTEGER NOT NULL,
    n_both BIGINT NOT NULL,
    npmi DOUBLE NOT NULL
);
