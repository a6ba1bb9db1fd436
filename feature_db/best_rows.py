"""The best rows of every feature, kept while chunks go by, each with the acts around it.

One merge serves both kinds of context. A *score* of 32 bits says which rows are better: the act
itself for the strongest contexts, a hash of (feature, row) for a uniform sample. Equal scores go
to the earlier row, so the outcome depends neither on chunk sizes nor on any sort's whims.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .codes import (
    ChunkRows,
    FeatureEntries,
    Float32,
    Int64,
    rank_in_run,
    stable_order,
)

_HIGHEST_SCORE = (1 << 32) - 1
# Chunks whose entries are kept until a merge, at most: 200 MB at 32 features on each of 32k rows.
_MOST_CHUNKS_WAITING = 8


def act_scores(acts: Float32) -> Int64:
    """Scores that order as positive float32 acts do: their bits, int64 above 0."""
    return acts.view(np.uint32).astype(np.int64)


def sample_scores(features: Int64, rows: Int64, seed: int) -> Int64:
    """Scores that are uniform and depend on (seed, feature, global row) alone: int64 above 0.

    Source: the finaliser of SplitMix64 (Steele, Lea and Flood 2014, OOPSLA, figure 17).
    """
    with np.errstate(over="ignore"):
        x = rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x += (features + (seed << 32)).astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    scores: Int64 = np.maximum(x >> np.uint64(32), 1).astype(np.int64)
    return scores


class ContextRows(NamedTuple):
    """Kept rows of some features, by feature and then rank; all [n], windows [n, width].

    features; ranks, from 0; scores; acts float32; rows: global; doc_ids; positions.
    before, after: tokens of the context on either side of the row.
    windows: float32 [n, width]; the feature's acts on the rows around, 0 where it is silent or
        the context doesn't reach. peak: the column of `windows` in which the row itself lies.
    """

    features: Int64
    ranks: Int64
    scores: Int64
    acts: Float32
    rows: Int64
    doc_ids: Int64
    positions: Int64
    before: Int64
    after: Int64
    windows: Float32
    peak: int

    def take(self, places: Int64) -> "ContextRows":
        """The rows at `places`, in that order."""
        columns = {name: getattr(self, name)[places] for name in self._fields if name != "peak"}
        return self._replace(**columns)


class BestRows:
    """The n rows of highest score of each feature.

    d_sae: features. n: rows kept of each. before, after: tokens kept around a row, fewer where
    its block or document ends. max_per_document: rows kept of one document, None for any number.
    Rows that beat a feature's n-th best wait until there are many, and are merged together. Ranks
    are ordered in small arrays; what belongs to a row lies in a *slot* that never moves.
    """

    def __init__(
        self, d_sae: int, n: int, *, before: int, after: int, max_per_document: int | None = None
    ) -> None:
        self._n, self._before, self._after = n, before, after
        self._max_per_document = max_per_document
        self._scores = np.zeros((d_sae, n), np.int64)  # descending in a row; 0 is an empty place
        self._slots = np.tile(np.arange(n, dtype=np.int32), (d_sae, 1))
        self._thresholds = np.zeros(d_sae, np.int64)
        self._acts = np.zeros(d_sae * n, np.float32)
        self._rows = np.zeros(d_sae * n, np.int64)
        self._doc_ids = np.zeros(d_sae * n, np.int64)
        self._positions = np.zeros(d_sae * n, np.int32)
        self._reach = np.zeros((d_sae * n, 2), np.int32)
        self._windows = np.zeros((d_sae * n, before + 1 + after), np.float32)
        self._waiting: list[_Waiting] = []

    def add(self, entries: FeatureEntries, scores: Int64, chunk: ChunkRows) -> None:
        """Consider one chunk's entries. scores: int64 [nnz], above 0, below 2**32."""
        where = np.flatnonzero(scores > self._thresholds[entries.features])
        self._waiting.append(_Waiting(where, scores[where], entries, chunk))
        n_waiting = sum(len(part.where) for part in self._waiting)
        if n_waiting > self._scores.size // 2 or len(self._waiting) == _MOST_CHUNKS_WAITING:
            self._merge()

    def of_features(self, first: int, stop: int) -> ContextRows:
        """What is kept of the features first <= feature < stop."""
        self._merge()
        scores = self._scores[first:stop]
        feature, rank = np.nonzero(scores)
        slots = (feature + first) * self._n + self._slots[first:stop][feature, rank]
        before, after = self._reach[slots].T.astype(np.int64)
        return ContextRows(
            (feature + first).astype(np.int64),
            rank.astype(np.int64),
            scores[feature, rank],
            self._acts[slots],
            self._rows[slots],
            self._doc_ids[slots],
            self._positions[slots].astype(np.int64),
            before,
            after,
            self._windows[slots],
            self._before,
        )

    def _merge(self) -> None:
        """Take in the rows that wait."""
        waiting, self._waiting = self._waiting, []
        edges = np.cumsum([0, *(len(part.where) for part in waiting)])
        if not edges[-1]:
            return
        features = np.concatenate([part.entries.features[part.where] for part in waiting])
        scores = np.concatenate([part.scores for part in waiting])
        docs = [part.chunk.doc_ids[part.entries.rows[part.where]] for part in waiting]
        is_touched = np.zeros(len(self._scores), dtype=bool)
        is_touched[features] = True
        touched, local = np.flatnonzero(is_touched), (np.cumsum(is_touched) - 1)[features]
        chosen = self._choose(touched, local, scores, np.concatenate(docs))
        slots, new = self._move(touched, chosen, scores)
        for part, (first, stop) in zip(waiting, pairwise(edges), strict=True):
            here = np.flatnonzero((new >= first) & (new < stop))
            self._record(slots[here], part.where[new[here] - first], part)

    def _choose(self, touched: Int64, local: Int64, scores: Int64, doc_ids: Int64) -> Int64:
        """The n best of what each touched feature had and now gets.

        local: int64 [waiting], the place in `touched` of each waiting row's feature.
        Returns: int64 [touched, n], best first: below touched * n an old row (feature by feature,
        in rank order), above it a waiting one's number. Equal scores: the old, then the earlier.
        """
        n = self._n
        features = np.concatenate([np.repeat(np.arange(len(touched)), n), local])
        all_scores = np.concatenate([self._scores[touched].ravel(), scores])
        order = np.argsort((features << 32) | (_HIGHEST_SCORE - all_scores), kind="stable")
        if self._max_per_document is not None:
            slots = (touched[:, None] * n + self._slots[touched]).ravel()
            docs = np.concatenate([self._doc_ids[slots], doc_ids])[order]
            order = order[self._within_document_limit(features[order], docs, all_scores[order])]
        best = rank_in_run(features[order]) < n
        return order[best].reshape(len(touched), n)

    def _within_document_limit(
        self, features: Int64, doc_ids: Int64, scores: Int64
    ) -> NDArray[np.bool_]:
        """Which rows are among the first of their feature and document; empty places are."""
        assert self._max_per_document is not None
        pairs = features * (int(doc_ids.max()) + 1) + doc_ids
        by_document = stable_order(pairs)
        allowed = np.empty(len(features), dtype=bool)
        allowed[by_document] = rank_in_run(pairs[by_document]) < self._max_per_document
        allowed |= scores == 0
        return allowed

    def _move(self, touched: Int64, chosen: Int64, new_scores: Int64) -> tuple[Int64, Int64]:
        """Write the new order; give each new row a slot that an old one left.

        Returns: slots int64 [n_new] over all features, and the waiting rows' numbers, [n_new].
        """
        n, n_old = self._n, len(touched) * self._n
        is_new = chosen >= n_old
        slots = np.empty(chosen.shape, np.int32)
        old_slots = self._slots[touched].ravel()
        slots[~is_new] = old_slots[chosen[~is_new]]
        is_taken = np.zeros(chosen.shape, dtype=bool)
        is_taken[np.nonzero(~is_new)[0], slots[~is_new]] = True
        slots[is_new] = np.nonzero(~is_taken)[1]  # as many as new ones, feature by feature
        all_scores = np.concatenate([self._scores[touched].ravel(), new_scores])
        self._scores[touched] = all_scores[chosen]
        self._slots[touched] = slots
        self._thresholds[touched] = self._scores[touched, n - 1]
        return (touched[:, None] * n + slots)[is_new], chosen[is_new] - n_old

    def _record(self, slots: Int64, where: Int64, part: "_Waiting") -> None:
        """Fill `slots` with the entries at `where` and the acts around them."""
        entries, chunk = part.entries, part.chunk
        rows = entries.rows[where]
        before = np.minimum(rows - chunk.segment_starts[rows], self._before)
        after = np.minimum(chunk.segment_ends[rows] - 1 - rows, self._after)
        self._acts[slots] = entries.acts[where]
        self._rows[slots] = rows + chunk.first_row
        self._doc_ids[slots] = chunk.doc_ids[rows]
        self._positions[slots] = chunk.positions[rows]
        self._reach[slots, 0], self._reach[slots, 1] = before, after
        self._windows[slots] = 0
        self._windows[slots, self._before] = entries.acts[where]
        self._look_around(slots, where, entries, before, step=-1)
        self._look_around(slots, where, entries, after, step=1)

    def _look_around(
        self, slots: Int64, where: Int64, entries: FeatureEntries, reach: Int64, step: int
    ) -> None:
        """Copy the feature's acts on the rows before (step -1) or after (1) each entry.

        A feature's entries lie beside each other in row order, so those of a context are the next
        few: most walks end at the first step.
        """
        features, rows = entries.features[where], entries.rows[where]
        walking, other = np.arange(len(where)), where + step
        while len(walking):
            inside = (other >= 0) & (other < len(entries.acts))
            walking, other = walking[inside], other[inside]
            distance = (entries.rows[other] - rows[walking]) * step
            near = (entries.features[other] == features[walking]) & (distance <= reach[walking])
            walking, other, distance = walking[near], other[near], distance[near]
            self._windows[slots[walking], self._before + step * distance] = entries.acts[other]
            other = other + step


class _Waiting(NamedTuple):
    """Entries of a chunk that beat their feature's n-th best, to be merged in.

    where: int64 [n], which of `entries`. scores: int64 [n].
    """

    where: Int64
    scores: Int64
    entries: FeatureEntries
    chunk: ChunkRows
