"""SAEs + activations -> rows of the database: one pass over each part of the text, then tables."""
