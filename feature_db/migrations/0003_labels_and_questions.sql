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

-- Words that features have to do with, features of other SAEs that lie alike, and macros.
CREATE TABLE words (
    word VARCHAR NOT NULL,
    field VARCHAR NOT NULL,
    sae_id INTEGER NOT NULL,
    feature_id INTEGER NOT NULL,
    weight FLOAT NOT NULL
);

CREATE TABLE similar_features (
    sae_id INTEGER NOT NULL,
    feature_id INTEGER NOT NULL,
    rank INTEGER NOT NULL,
    other_sae_id INTEGER NOT NULL,
    other_id INTEGER NOT NULL,
    cosine FLOAT NOT NULL
);

CREATE MACRO contexts_of(id, n, sae := 0) AS TABLE
    SELECT rank, act, doc_id, position, token, peak, tokens, acts, text FROM contexts
    WHERE sae_id = sae AND feature_id = id AND kind = 'top' AND rank <= n ORDER BY rank;

CREATE MACRO neighbors(id, n, sae := 0) AS TABLE
    SELECT neighbor_id, cosine, label, density FROM neighbors JOIN
        (SELECT sae_id, feature_id AS neighbor_id, label, density FROM features)
        USING (sae_id, neighbor_id)
    WHERE sae_id = sae AND feature_id = id AND rank <= n ORDER BY rank;

CREATE MACRO similar_to(sae, id) AS TABLE
    SELECT other_sae_id, name, hookpoint, other_id, cosine, label, density
    FROM similar_features JOIN
        (SELECT sae_id AS other_sae_id, feature_id AS other_id, label, density FROM features)
        USING (other_sae_id, other_id)
        JOIN (SELECT sae_id AS other_sae_id, name, hookpoint FROM saes) USING (other_sae_id)
    WHERE sae_id = sae AND feature_id = id ORDER BY cosine DESC, other_sae_id, other_id;

CREATE MACRO token_lift(text) AS TABLE
    SELECT sae_id, feature_id, label, lift, t.n_active, n_total, t.mean_act, density
    FROM feature_tokens AS t JOIN features USING (sae_id, feature_id)
    WHERE token = text ORDER BY lift DESC, sae_id, feature_id;

CREATE MACRO active_on(text) AS TABLE
    SELECT sae_id, feature_id, label, t.n_active / n_total AS share, t.n_active, n_total,
        t.mean_act, density
    FROM feature_tokens AS t JOIN features USING (sae_id, feature_id)
    WHERE token = text ORDER BY share DESC, sae_id, feature_id;

CREATE MACRO overlap(a, b, sae := 0) AS TABLE
    SELECT one.n_active AS n_one, other.n_active AS n_other, n_both,
        n_both / (one.n_active + other.n_active - n_both) AS jaccard, npmi
    FROM features AS one JOIN features AS other ON one.sae_id = other.sae_id
    LEFT JOIN (
        SELECT sae_id, max(n_both) AS n_both, max(npmi) AS npmi FROM coactivations
        WHERE (feature_id = a AND other_id = b) OR (feature_id = b AND other_id = a) GROUP BY ALL
    ) AS pair ON pair.sae_id = one.sae_id
    WHERE one.sae_id = sae AND one.feature_id = a AND other.feature_id = b;

CREATE MACRO quantile(id, q, sae := 0) AS TABLE
    SELECT lo + (least(hi, max_act) - lo) * greatest(q * n_active - below, 0) / n AS act
    FROM (
        SELECT *, sum(n) OVER (ORDER BY bin) - n AS below FROM feature_histogram
        WHERE sae_id = sae AND feature_id = id
    ) JOIN features USING (sae_id, feature_id)
    WHERE below + n >= q * n_active ORDER BY bin LIMIT 1;
