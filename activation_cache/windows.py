"""Windows of shuffled blocks: read from disk on threads, verified, decoded batch by batch.

In: shards, which of their rows are kept, and hookpoints. Out: `Blocks` for `shuffle`. A window
holds rows as they are stored; only those of a batch become floats, on the device that asks.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .manifest import BLOCK_ROWS
from .read_ahead import in_parallel
from .row_selection import Places, RowSelection, Split
from .shard_reader import ShardReader
from .shuffle import Blocks
from .stored_rows import Exact, StoredRows
from .tensor_file import writable_bytes

READ_THREADS = 2


class Wanted(NamedTuple):
    """What a reader wants: hookpoints, split, and the device and dtype of its batches."""

    hookpoints: Places
    split: Split
    device: torch.device
    dtype: torch.dtype


class LoadedWindow:
    """Rows in memory as they are stored, and which of them are kept, in the order of loading."""

    def __init__(
        self,
        rows: dict[str, StoredRows],
        kept: Tensor,
        wanted: Wanted,
        on_release: Callable[[dict[str, StoredRows]], None] = lambda _: None,
    ):
        self._rows, self._kept, self._wanted = rows, kept, wanted
        self._on_release = on_release

    def take(self, places: Tensor) -> dict[str, Tensor]:
        """Kept rows by number, hookpoint -> [n, width]."""
        index, wanted = self._kept[places], self._wanted
        return {h: rows.take(index, wanted.device, wanted.dtype) for h, rows in self._rows.items()}

    def release(self) -> None:
        """The rows may be overwritten."""
        rows, self._rows = self._rows, {}
        self._on_release(rows)


class WindowLoader:
    """Loads windows of at most `window_bytes`; where everything fits into one, it stays."""

    def __init__(
        self, shards: ShardReader, selection: RowSelection, wanted: Wanted, window_bytes: int
    ):
        self._shards, self._selection, self._wanted = shards, selection, wanted
        files = [shards.file(0, hookpoint) for hookpoint in wanted.hookpoints]
        per_window = window_bytes // (BLOCK_ROWS * sum(file.row_bytes for file in files))
        self._per_window = max(per_window, 1)
        self._spare: list[dict[str, StoredRows]] = []  # fresh memory costs more than reading
        self._whole: tuple[NDArray[np.int64], dict[str, StoredRows]] | None = None

    def blocks(self) -> Blocks:
        """The kept rows, block by block."""
        counts = self._selection.counts(self._wanted.hookpoints, self._wanted.split)
        return Blocks(counts, self.load, self._per_window)

    def load(self, chosen: NDArray[np.int64]) -> LoadedWindow:
        """The kept rows of the chosen blocks, one block after another."""
        n_blocks = len(self._shards.block_rows)
        if len(chosen) < n_blocks:
            begins, rows = self._read(chosen)
            kept = self._kept(chosen, begins)
            return LoadedWindow(rows, kept, self._wanted, self._spare.append)
        if self._whole is None:
            self._whole = self._read(np.arange(n_blocks))
        begins, rows = self._whole
        return LoadedWindow(rows, self._kept(chosen, begins[chosen]), self._wanted)

    def _kept(self, chosen: NDArray[np.int64], begins: NDArray[np.int64]) -> Tensor:
        """int64: places of the kept rows of each chosen block, which begins at `begins`."""
        wanted = self._wanted
        places = []
        for number, begin in zip(chosen.tolist(), begins.tolist(), strict=True):
            shard, block = self._shards.place_of_block(number)
            n = int(self._shards.block_rows[number])
            key = (wanted.hookpoints, wanted.split)
            places.append(self._selection.kept_in_block(shard, block, n, key) + begin)
        return torch.cat(places)

    def _read(self, chosen: NDArray[np.int64]) -> tuple[NDArray[np.int64], dict[str, StoredRows]]:
        """Where each chosen block begins in memory, and the memory, by hookpoint."""
        sizes = self._shards.block_rows[chosen]
        begins = np.cumsum([0, *sizes])[:-1]
        order = np.argsort(chosen)  # as they lie on disk
        kept = self._kept(chosen, begins)
        spare = self._spare.pop() if self._spare else {}
        rows = {
            h: self._read_at(h, chosen, begins, order, kept, spare.get(h))
            for h in self._wanted.hookpoints
        }
        return begins, rows

    def _read_at(
        self,
        hookpoint: str,
        chosen: NDArray[np.int64],
        begins: NDArray[np.int64],
        order: NDArray[np.int64],
        kept: Tensor,
        spare: StoredRows | None,
    ) -> StoredRows:
        """spare: rows of an earlier window, whose memory is used again."""
        n_rows, file = len(chosen) * BLOCK_ROWS, self._shards.file(0, hookpoint)
        if spare is not None and len(spare.raw) >= n_rows:
            raw, scales = spare.raw, spare.row_scales
        else:
            raw = torch.empty(n_rows, *file.row_shape, dtype=file.dtype)
            scales = torch.empty(n_rows) if file.dtype == torch.int8 else None
        places = [
            (*self._shards.place_of_block(int(chosen[i])), int(begins[i])) for i in order.tolist()
        ]
        self._fetch(hookpoint, places)

        def read(shard: int, block: int, begin: int) -> None:
            file = self._shards.file(shard, hookpoint)
            inside = slice(begin, begin + file.n_rows_of(block))
            file.read_block(
                block,
                writable_bytes(raw[inside]),
                None if scales is None else writable_bytes(scales[inside]),
            )

        in_parallel(read, places, READ_THREADS)
        if scales is None:
            return StoredRows(raw)
        is_exact_wanted = bool((scales.index_select(0, kept) == 0).any())
        exact = self._exact(hookpoint, places) if is_exact_wanted else None
        return self._coded(hookpoint, raw, scales, exact, places)

    def _fetch(self, hookpoint: str, places: list[tuple[int, int, int]]) -> None:
        """Have many blocks brought here at once, from a disk or from elsewhere."""
        for store in dict.fromkeys(self._shards.shards[shard].store for shard, _, _ in places):
            wanted = [
                place
                for shard, block, _ in places
                if self._shards.shards[shard].store is store
                for place in self._shards.file(shard, hookpoint).block_ranges(block)
            ]
            store.expect(wanted)
            store.fetch(wanted)

    def _coded(
        self,
        hookpoint: str,
        raw: Tensor,
        scales: Tensor,
        exact: Exact | None,
        places: list[tuple[int, int, int]],
    ) -> StoredRows:
        """int8 rows with what decodes them."""
        hashes = [
            self._shards.shards[shard].record.calibrations[hookpoint] for shard, _, _ in places
        ]
        names = sorted(set(hashes))
        calibrations = [self._shards.calibration(hookpoint, name) for name in names]
        which = None
        if len(names) > 1:
            which = torch.zeros(len(raw), dtype=torch.int16)
            for (shard, block, begin), name in zip(places, hashes, strict=True):
                n = self._shards.file(shard, hookpoint).n_rows_of(block)
                which[begin : begin + n] = names.index(name)
        return StoredRows(raw, scales, calibrations, which, exact)

    def _exact(self, hookpoint: str, places: list[tuple[int, int, int]]) -> Exact:
        """The rows among these that are stored as they are."""
        at, acts = [], []
        for shard, block, begin in places:
            first = block * BLOCK_ROWS
            inside = self._shards.exact(shard, hookpoint).between(first, first + BLOCK_ROWS)
            at.append(inside.at + begin)
            acts.append(inside.acts)
        places_of, order = torch.cat(at).sort()
        return Exact(places_of, torch.cat(acts)[order])
