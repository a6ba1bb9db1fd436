-- Every figure of an SAE's evaluation, with its definition.
CREATE TABLE metrics (
    sae_id INTEGER NOT NULL,
    name VARCHAR NOT NULL,
    value DOUBLE NOT NULL,
    definition VARCHAR NOT NULL
);
