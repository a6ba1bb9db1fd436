"""A synthetic text and codes of it, as an index is given them: no model, no SAE.

Tokens are as rare as in real text; half of a row's features go with its token, the others are few
and frequent or many and rare. In a row no feature stands twice.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from feature_db.indexing.best_rows import Spans
from feature_db.indexing.text_rows import PartRows

N_VOCAB = 49_152
_CHUNK, _BLOCK, _DOCUMENT = 32_768, 256, 800


class Codes(NamedTuple):
    """A chunk, as `EntrySpool.add` takes it."""

    row_counts: NDArray[np.int64]
    features: NDArray[np.int64]
    acts: NDArray[np.float32]
    first_row: int


def made_rows(n_tokens: int, seed: int = 0) -> PartRows:
    """Documents of 800 tokens in blocks of 256; contexts of 24 tokens before and 8 after."""
    rng, row = np.random.default_rng(seed), np.arange(n_tokens)
    tokens = ((rng.pareto(1.0, n_tokens) * 50).astype(np.int64) % N_VOCAB).astype(np.int32)
    place = row % _BLOCK
    spans = Spans(
        np.minimum(place, 24).astype(np.int32), np.minimum(_BLOCK - 1 - place, 8).astype(np.int32)
    )
    beside = np.roll(tokens, 1), np.roll(tokens, -1)
    positions = (row % _DOCUMENT).astype(np.int32)
    return PartRows(0, tokens, row // _DOCUMENT, positions, *beside, spans)


def made_codes(rows: PartRows, d_sae: int, k: int, seed: int = 0) -> Iterator[Codes]:
    """Codes of k features a row, chunk by chunk. k must divide d_sae."""
    rng, half = np.random.default_rng(seed), k // 2
    of_token = rng.integers(0, d_sae, (N_VOCAB, half))
    for first in range(0, len(rows.token_ids), _CHUNK):
        tokens = rows.token_ids[first : first + _CHUNK]
        others = (rng.pareto(0.8, (len(tokens), k - half)) * 40).clip(max=1e9).astype(np.int64)
        features = np.concatenate([of_token[tokens], others % d_sae], axis=1)
        features = features // k * k + np.arange(k)
        acts = rng.lognormal(0, 1, features.shape).astype(np.float32)
        yield Codes(np.full(len(tokens), k), features.ravel(), acts.ravel(), first)
