-- What language models, people and files say of features, with scores.
CREATE SEQUENCE explanation_ids;

CREATE TABLE explanations (
    explanation_id BIGINT PRIMARY KEY DEFAULT nextval('explanation_ids'),
    sae_id INTEGER NOT NULL,
    feature_id INTEGER NOT NULL,
    method VARCHAR NOT NULL,
    model VARCHAR,
    recipe VARCHAR,
    text VARCHAR NOT NULL,
    detection_score DOUBLE,
    fuzzing_score DOUBLE,
    n_detection INTEGER,
    n_fuzzing INTEGER,
    n_malformed INTEGER,
    parts VARCHAR,
    prompt_tokens BIGINT,
    answer_tokens BIGINT,
    cost DOUBLE,
    created_at TIMESTAMP NOT NULL
);
