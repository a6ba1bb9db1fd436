-- Everything that one pass over a cache says about every feature.
CREATE TABLE meta (key VARCHAR PRIMARY KEY, value VARCHAR NOT NULL);

CREATE TABLE saes (
    sae_id INTEGER PRIMARY KEY,
    name VARCHAR NOT NULL,
    model VARCHAR NOT NULL,
    model_revision VARCHAR,
    hookpoint VARCHAR NOT NULL,
    architecture VARCHAR NOT NULL,
    d_in INTEGER NOT NULL,
    d_sae INTEGER NOT NULL,
    k DOUBLE,
    fvu DOUBLE,
    l0 DOUBLE,
    ce_recovered DOUBLE,
    n_tokens_trained BIGINT,
    n_tokens_indexed BIGINT NOT NULL,
    n_tokens_skipped BIGINT NOT NULL,
    weights_hash VARCHAR NOT NULL,
    cache_fingerprint VARCHAR NOT NULL,
    created_at TIMESTAMP NOT NULL
);

CREATE TABLE features (
    sae_id INTEGER NOT NULL,
    feature_id INTEGER NOT NULL,
    density DOUBLE NOT NULL,
    n_active BIGINT NOT NULL,
    mean_act FLOAT,
    max_act FLOAT,
    is_dead BOOLEAN NOT NULL,
    label VARCHAR,
    label_method VARCHAR
);

CREATE TABLE contexts (
    sae_id INTEGER NOT NULL,
    feature_id INTEGER NOT NULL,
    kind VARCHAR NOT NULL,
    rank INTEGER NOT NULL,
    quantile DOUBLE,
    doc_id BIGINT NOT NULL,
    position INTEGER NOT NULL,
    act FLOAT NOT NULL,
    token VARCHAR NOT NULL,
    peak INTEGER NOT NULL,
    text VARCHAR NOT NULL,
    token_ids INTEGER[] NOT NULL,
    tokens VARCHAR[] NOT NULL,
    acts FLOAT[] NOT NULL
);

CREATE TABLE feature_logits (
    sae_id INTEGER NOT NULL,
    feature_id INTEGER NOT NULL,
    sign INTEGER NOT NULL,
    rank INTEGER NOT NULL,
    token_id INTEGER NOT NULL,
    token VARCHAR NOT NULL,
    logit FLOAT NOT NULL
);

CREATE TABLE feature_tokens (
    sae_id INTEGER NOT NULL,
    feature_id INTEGER NOT NULL,
    rank INTEGER NOT NULL,
    token_id INTEGER NOT NULL,
    token VARCHAR NOT NULL,
    n_active BIGINT NOT NULL,
    n_total BIGINT NOT NULL,
    mean_act FLOAT NOT NULL,
    lift DOUBLE NOT NULL
);

CREATE TABLE feature_histogram (
    sae_id INTEGER NOT NULL,
    feature_id INTEGER NOT NULL,
    bin INTEGER NOT NULL,
    lo DOUBLE NOT NULL,
    hi DOUBLE NOT NULL,
    n BIGINT NOT NULL
);

CREATE TABLE neighbors (
    sae_id INTEGER NOT NULL,
    feature_id INTEGER NOT NULL,
    neighbor_id INTEGER NOT NULL,
    rank INTEGER NOT NULL,
    cosine FLOAT NOT NULL
);

CREATE TABLE documents (
    doc_id BIGINT PRIMARY KEY,
    source VARCHAR,
    text VARCHAR NOT NULL,
    n_tokens BIGINT NOT NULL
);
