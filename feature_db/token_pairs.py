"""How often each feature fires on each token, counted with bounded memory.

In: the sorted entries of each chunk. Out: the (feature, token) pairs of any range of features.
Meanwhile the entries wait in files of 8 bytes each, chunk by chunk, in feature order: what belongs
to a range of features is one slice of each chunk, and nothing is sorted until it is asked for.
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .codes import ChunkRows, FeatureEntries, Float32, Int64, run_starts, stable_order
from .totals import Float64

# Entries that are sorted together, where one feature hasn't more: they stay in the CPU's cache.
_SORTED_TOGETHER = 250_000
# Entries of one feature that are sorted at once: about 200 MB.
_SORTED_AT_ONCE = 4_000_000


class TokenPairs(NamedTuple):
    """What features do on tokens, by ascending key, each key once; all [n].

    keys: int64, feature * vocab_size + token. counts: int64, rows on which the feature fires on
    the token. act_sums: float64, its acts there.
    """

    keys: Int64
    counts: Int64
    act_sums: Float64


class TokenPairStore:
    """The token and act of every entry so far, in files.

    folder: a temporary folder of the build; it takes 8 bytes an entry.
    """

    def __init__(self, folder: Path, d_sae: int, vocab_size: int) -> None:
        folder.mkdir(parents=True)
        self._tokens, self._acts = folder / "tokens.bin", folder / "acts.bin"
        self._offsets = folder / "offsets.bin"
        self._d_sae, self._vocab_size = d_sae, vocab_size
        self._n_entries = 0

    def add(self, entries: FeatureEntries, chunk: ChunkRows) -> None:
        """Append one chunk's entries, of which there is at least one."""
        offsets = np.searchsorted(entries.features, np.arange(self._d_sae + 1))
        written = (
            (self._tokens, chunk.token_ids[entries.rows].astype(np.int32)),
            (self._acts, entries.acts),
            (self._offsets, offsets + self._n_entries),
        )
        for path, values in written:
            with path.open("ab") as file:
                values.tofile(file)
        self._n_entries += len(entries.acts)

    def of_features(self, first: int, stop: int) -> TokenPairs:
        """The pairs of the features first <= feature < stop."""
        ranges = self._ranges(first, stop)
        parts = [self._of_range(low, high) for low, high in pairwise(ranges)]
        return TokenPairs(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _ranges(self, first: int, stop: int) -> list[int]:
        """Where to cut a range of features, so that each part has few entries."""
        if not self._n_entries:
            return [first, stop]
        n_entries = np.zeros(stop - first, np.int64)
        for edges in self._all_offsets()[:, first : stop + 1]:
            n_entries += np.diff(edges)
        ends = np.cumsum(n_entries)
        cuts = np.searchsorted(ends, np.arange(_SORTED_TOGETHER, ends[-1], _SORTED_TOGETHER))
        return sorted({first, stop, *(first + 1 + cuts).tolist()})

    def _of_range(self, first: int, stop: int) -> TokenPairs:
        keys, acts, parts = list[Int64](), list[Float32](), list[TokenPairs]()
        for some_keys, some_acts in self._slices(first, stop):
            keys.append(some_keys)
            acts.append(some_acts)
            if sum(map(len, keys)) >= _SORTED_AT_ONCE:
                parts.append(_counted(keys, acts))
                keys, acts = [], []
        return _merged([*parts, _counted(keys, acts)])

    def _all_offsets(self) -> Int64:
        """Where each feature's entries begin in each chunk: int64 [chunks, d_sae + 1]."""
        return np.memmap(self._offsets, np.int64, "r").reshape(-1, self._d_sae + 1)

    def _slices(self, first: int, stop: int) -> Iterator[tuple[Int64, Float32]]:
        """Keys and acts of each chunk's entries of a range of features."""
        if not self._n_entries:
            return
        tokens: NDArray[np.int32] = np.memmap(self._tokens, np.int32, "r")
        acts: Float32 = np.memmap(self._acts, np.float32, "r")
        bases = np.arange(first, stop, dtype=np.int64) * self._vocab_size
        for edges in self._all_offsets()[:, first : stop + 1]:
            here = slice(int(edges[0]), int(edges[-1]))
            if here.start < here.stop:
                keys: Int64 = np.repeat(bases, np.diff(edges)) + tokens[here]
                yield keys, acts[here]


def _counted(keys: list[Int64], acts: list[Float32]) -> TokenPairs:
    """Entries as pairs, summed in the order given."""
    if not keys:
        return TokenPairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
    all_keys = np.concatenate(keys)
    order = stable_order(all_keys - min(int(part.min()) for part in keys))
    counts = np.ones(len(order), np.int64)
    return _summed(all_keys[order], counts, np.concatenate(acts)[order].astype(np.float64))


def _merged(parts: list[TokenPairs]) -> TokenPairs:
    """Pairs that may share keys as pairs that don't, earlier ones summed first."""
    if len(parts) == 1:
        return parts[0]
    keys, counts, sums = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(keys, kind="stable")  # timsort: sorted runs are merged, not sorted again
    return _summed(keys[order], counts[order], sums[order])


def _summed(sorted_keys: Int64, counts: Int64, act_sums: Float64) -> TokenPairs:
    starts = run_starts(sorted_keys)
    if not len(starts):
        return TokenPairs(sorted_keys, counts, act_sums)
    return TokenPairs(
        sorted_keys[starts], np.add.reduceat(counts, starts), np.add.reduceat(act_sums, starts)
    )
