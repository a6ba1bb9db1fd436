"""The one pass over the cache: chunks in, the running state of every SAE at that hookpoint out."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .best_rows import BestRows, ContextRows, act_scores, sample_scores
from .codes import ChunkRows, Int64, chunk_rows, feature_entries, indexable_rows
from .config import IndexConfig
from .inputs import IndexedSAE
from .token_pairs import TokenPairStore
from .totals import FeatureTotals

if TYPE_CHECKING:
    from activation_cache import ActivationCache, Chunk


class TokenSpool:
    """The token of every row of the cache, in a file: contexts read their tokens from it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()

    def add(self, chunk: ChunkRows) -> None:
        """Append one chunk's tokens; a chunk that is there already is left alone."""
        n_bytes = chunk.first_row * 4
        if self._path.stat().st_size == n_bytes:
            with self._path.open("ab") as file:
                chunk.token_ids.astype(np.int32).tofile(file)

    def spans(self, contexts: ContextRows) -> Int64:
        """The tokens of all contexts, one after the other: int64 [sum of their lengths]."""
        tokens = np.memmap(self._path, dtype=np.int32, mode="r")
        lengths = contexts.before + 1 + contexts.after
        return tokens[flat_spans(contexts.rows - contexts.before, lengths)].astype(np.int64)


class SAEState:
    """All that is known of one SAE's features so far.

    folder: where the pairs of features and tokens are kept while building.
    """

    def __init__(
        self, indexed: IndexedSAE, config: IndexConfig, vocab_size: int, folder: Path
    ) -> None:
        d_sae, reach = indexed.sae.d_sae, (config.tokens_before, config.tokens_after)
        self.indexed = indexed
        self.totals = FeatureTotals(d_sae, vocab_size)
        self.pairs = TokenPairStore(folder / f"pairs-{indexed.sae_id}", d_sae, vocab_size)
        self.top = BestRows(
            d_sae,
            config.n_top,
            before=reach[0],
            after=reach[1],
            max_per_document=config.max_per_document,
        )
        self.sample = BestRows(d_sae, config.quantile_sample, before=reach[0], after=reach[1])
        self._seed = config.seed

    def add(self, chunk: "Chunk", rows: ChunkRows) -> None:
        """Encode one chunk and count it."""
        indexed_rows = indexable_rows(chunk, self.indexed.sae)
        entries = feature_entries(chunk, self.indexed.sae, indexed_rows)
        self.totals.add(entries, rows, indexed_rows)
        if len(entries.acts):
            self.pairs.add(entries, rows)
            self.top.add(entries, act_scores(entries.acts), rows)
            global_rows = entries.rows + rows.first_row
            self.sample.add(entries, sample_scores(entries.features, global_rows, self._seed), rows)


def collect(
    cache: "ActivationCache",
    hookpoint: str,
    states: Sequence[SAEState],
    spool: TokenSpool,
    config: IndexConfig,
    on_rows: Callable[[int], None],
) -> None:
    """Run every SAE of `hookpoint` over the whole cache, once and in order.

    on_rows: told the number of rows done after each chunk.
    """
    for chunk in cache.chunks(hookpoint, rows=config.chunk_rows):
        rows = chunk_rows(chunk)
        spool.add(rows)
        for state in states:
            state.add(chunk, rows)
        on_rows(rows.first_row + len(rows.token_ids))


def flat_spans(starts: Int64, lengths: Int64) -> Int64:
    """starts[0], starts[0] + 1, ... lengths[0] numbers, then those of starts[1], and so on."""
    firsts = np.cumsum(lengths) - lengths
    spans: Int64 = np.arange(int(lengths.sum())) + np.repeat(starts - firsts, lengths)
    return spans
