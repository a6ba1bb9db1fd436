"""Where a feature is active: on which tokens, in which documents, beside which features.

Counts of all pairs would grow with the text: of each feature some tokens, documents and companions
are kept, the most frequent ones, in every part of the text.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .sorting import DOCUMENT, Float32, Float64, Int32, Int64, UInt16, compiled
from .spool import RowFeatures, RunRows

MOST_ROWS = 512
"""Of a feature's rows in a part that are looked at for the features beside it."""

# Features, of 16 bits each, in a line of the processor's cache.
_LINE = 32

# The place of a word's only bit, by its product with a de Bruijn sequence.
_DE_BRUIJN = 0x03F79D71B4CB0A89
_BIT_PLACES = np.zeros(64, np.uint8)
for _bit in range(64):
    _BIT_PLACES[(_DE_BRUIJN << _bit & 0xFFFFFFFFFFFFFFFF) >> 58] = _bit


class TokenUses(NamedTuple):
    """Triples of feature, place and token, in this order; all [n].

    features: from 0 for the first of those asked. places: columns of the tokens asked. n_active:
    entries of the feature on the token. act_sums: int64, of its acts there, see `Scales`.
    """

    features: Int64
    places: Int64
    token_ids: Int64
    n_active: Int64
    act_sums: Int64


@compiled
def token_uses(
    offsets: Int64, fixed: Int64, tokens: Int32, vocab_size: int, most: Int64
) -> TokenUses:
    """The most frequent tokens of each feature at each place; equal ones: those of smaller ids.

    fixed: int64 [nnz], see `fixed_acts`. tokens: int32 [nnz, at least n_places], -1 where there is
    none. most: int64 [n_places], how many are kept.
    """
    n_features, at = len(offsets) - 1, 0
    found = np.empty((5, _room(offsets, most)), np.int64)
    counts = np.zeros((vocab_size, 2), np.int64)
    touched = np.empty(vocab_size + 1, np.uint32)
    is_kept = np.zeros(vocab_size // 64 + 1, np.uint64)
    n_of_count = np.zeros(len(tokens) + 1, np.int64)
    for feature in range(n_features):
        for place in range(len(most)):
            n_touched = 0
            for i in range(offsets[feature], offsets[feature + 1]):
                if tokens[i, place] >= 0:
                    token = np.uint32(tokens[i, place])
                    touched[n_touched] = token
                    n_touched += counts[token, 0] == 0
                    counts[token, 0] += 1
                    counts[token, 1] += fixed[i]
            mine = touched[:n_touched]
            least, n_least = _threshold(mine, counts, most[place], n_of_count)
            for token in mine:
                if counts[token, 0] >= least:
                    is_kept[token >> np.uint32(6)] |= np.uint64(1) << np.uint64(token & 63)
            begin, at = at, _take(is_kept, counts, least, n_least, found, at)
            found[0, begin:at], found[1, begin:at] = feature, place
            for token in mine:
                counts[token, 0] = counts[token, 1] = 0
    kept = found[:, :at]
    return TokenUses(kept[0], kept[1], kept[2], kept[3], kept[4])


@compiled
def _room(offsets: Int64, most: Int64) -> int:
    room = 0
    for feature in range(len(offsets) - 1):
        for n in most:
            room += min(offsets[feature + 1] - offsets[feature], n)
    return room


@compiled
def _threshold(
    touched: NDArray[np.uint32], counts: Int64, most: int, n_of_count: Int64
) -> tuple[int, int]:
    """The count that the last of the `most` frequent tokens has, and how many of that count are
    among them. n_of_count: zeros, and left so."""
    if len(touched) <= most:
        return 1, len(touched)
    highest = 0
    for token in touched:
        n_of_count[counts[token, 0]] += 1
        highest = max(highest, counts[token, 0])
    least, n_above = highest, 0
    while n_above + n_of_count[least] < most:
        n_above += n_of_count[least]
        least -= 1
    n_of_count[: highest + 1] = 0
    return least, most - n_above


@compiled
def _take(
    is_kept: NDArray[np.uint64], counts: Int64, least: int, n_least: int, found: Int64, at: int
) -> int:
    """Write the tokens whose bits are set, by id, and clear those: of the count `least` the first
    n_least. Returns: the next free place of found."""
    for number in range(len(is_kept)):
        word = is_kept[number]
        is_kept[number] = 0
        while word:
            low = word & (~word + np.uint64(1))
            word ^= low
            token = 64 * number + _BIT_PLACES[(low * np.uint64(_DE_BRUIJN)) >> np.uint64(58)]
            if counts[token, 0] == least:
                n_least -= 1
                if n_least < 0:
                    continue
            found[2, at], found[3, at], found[4, at] = token, counts[token, 0], counts[token, 1]
            at += 1
    return at


class DocumentUses(NamedTuple):
    """The documents in which a feature is most active; [n_features, n].

    documents: int64, -1 where there are fewer. n_active; act_sums: see `Scales`; max_acts.
    """

    documents: Int64
    n_active: Int64
    act_sums: Int64
    max_acts: Float32


@compiled
def document_uses(
    offsets: Int64, acts: Float32, fixed: Int64, records: Int32, n: int
) -> DocumentUses:
    """The n documents of largest summed act; equal ones: the earlier. records: of each entry."""
    n_features = len(offsets) - 1
    best = np.full((n_features, n), -1, np.int64)
    n_active = np.zeros((n_features, n), np.int64)
    sums = np.zeros((n_features, n), np.int64)
    highest = np.zeros((n_features, n), np.float32)
    for feature in range(n_features):
        i, stop, filled = offsets[feature], offsets[feature + 1], 0
        while i < stop:
            document, its_sum, its_n, its_max = records[i, DOCUMENT], np.int64(0), 0, acts[i]
            while i < stop and records[i, DOCUMENT] == document:
                its_sum += fixed[i]
                its_max = max(its_max, acts[i])
                its_n += 1
                i += 1
            if filled == n and its_sum <= sums[feature, n - 1]:
                continue
            at = min(filled, n - 1)
            filled = min(filled + 1, n)
            while at > 0 and sums[feature, at - 1] < its_sum:
                best[feature, at] = best[feature, at - 1]
                n_active[feature, at] = n_active[feature, at - 1]
                sums[feature, at] = sums[feature, at - 1]
                highest[feature, at] = highest[feature, at - 1]
                at -= 1
            best[feature, at], n_active[feature, at] = document, its_n
            sums[feature, at], highest[feature, at] = its_sum, its_max
    return DocumentUses(best, n_active, sums, highest)


class Companions(NamedTuple):
    """Features that are active on the same rows; [n_features, n].

    others: int64, -1 where there are fewer. n_both: rows on which both are. Of a feature with more
    than `MOST_ROWS` entries every second, or third, ... entry is looked at, and n_both estimated.
    """

    others: Int64
    n_both: Int64


@compiled
def companions(
    offsets: Int64,
    rows: Int32,
    first_feature: int,
    by_row: RowFeatures,
    n_active: Int64,
    n: int,
) -> Companions:
    """The n features of largest n_both^2 / (n_active * n_active of the other).

    first_feature: the number of the first one of `offsets`. n_active: int64 [d_sae].
    """
    n_features = len(offsets) - 1
    found = Companions(np.full((n_features, n), -1, np.int64), np.zeros((n_features, n), np.int64))
    counts = np.zeros(len(n_active), np.uint16)
    touched = np.empty(len(n_active) + 1, by_row.features.dtype)
    both_of_count = np.empty(MOST_ROWS + 1, np.int64)
    active, scores = n_active.astype(np.float64), np.empty(n, np.float64)
    for feature in range(n_features):
        first, n_entries = offsets[feature], offsets[feature + 1] - offsets[feature]
        step = max((n_entries + MOST_ROWS - 1) // MOST_ROWS, 1)
        looked_at = rows[first : first + n_entries : step]
        n_touched = _count_beside(looked_at, by_row, counts, touched)
        for count in range(len(looked_at) + 1):
            both_of_count[count] = count * n_entries // max(len(looked_at), 1)
        if n_entries:
            counts[first_feature + feature] = 0
        _keep_best(
            touched[:n_touched], counts, both_of_count, active, scores,
            found.others[feature], found.n_both[feature],
        )  # fmt: skip
    return found


@compiled
def _count_beside(
    rows: Int32, by_row: RowFeatures, counts: NDArray[np.uint16], touched: UInt16 | Int32
) -> int:
    """Count the features of some rows. touched: filled with each feature that was counted, once.

    The first loop asks for all rows' memory before the second waits for it: 0.4 of the time.
    """
    starts, stops = np.empty(MOST_ROWS, np.int64), np.empty(MOST_ROWS, np.int64)
    asked = 0
    for j in range(len(rows)):
        row = np.uint32(rows[j])
        starts[j], stops[j] = by_row.offsets[row], by_row.offsets[row + 1]
        asked += by_row.features[stops[j] - 1]
        for i in range(starts[j], stops[j], _LINE):
            asked += by_row.features[i]
    n_touched = min(asked, 0)
    for j in range(len(rows)):
        for i in range(starts[j], stops[j]):
            other = by_row.features[i]
            touched[n_touched] = other
            n_touched += counts[np.uint32(other)] == 0
            counts[np.uint32(other)] += 1
    return n_touched


@compiled
def _keep_best(
    touched: UInt16 | Int32,
    counts: NDArray[np.uint16],
    both_of_count: Int64,
    n_active: Float64,
    scores: Float64,
    others: Int64,
    n_both: Int64,
) -> None:
    """Choose by score, equal ones by smaller number; counts of those touched are set to 0."""
    n, filled = len(others), 0
    for narrow in touched:
        other = np.uint32(narrow)
        count = counts[other]
        counts[other] = 0
        both = both_of_count[count]
        if both == 0:
            continue
        score = both * both / n_active[other]
        if filled == n and (
            score < scores[n - 1] or (score == scores[n - 1] and other > others[n - 1])
        ):
            continue
        at = min(filled, n - 1)
        filled = min(filled + 1, n)
        while at > 0 and (
            scores[at - 1] < score or (scores[at - 1] == score and others[at - 1] > other)
        ):
            scores[at], others[at], n_both[at] = scores[at - 1], others[at - 1], n_both[at - 1]
            at -= 1
        scores[at], others[at], n_both[at] = score, other, both


class NearMisses(NamedTuple):
    """Contexts of a feature's neighbours in which it is silent; [n_features, n].

    rows: int64, of the neighbour's peak; -1 where there are fewer. neighbors: whose it is.
    """

    rows: Int64
    neighbors: Int64


def near_misses(
    runs: Iterable[RunRows], neighbors: Int64, top_rows: Int32, spans: tuple[Int32, Int32], n: int
) -> NearMisses:
    """Each neighbour's strongest context, then each one's second, and so on, if the feature is
    active nowhere in it.

    runs: all rows of the features. neighbors: int64 [n_features, some], nearest first. top_rows:
    int32 [d_sae, some], the rows of the strongest contexts of every feature, -1 where there are
    fewer. spans: `Spans` of the rows.
    """
    contexts = top_rows[neighbors].transpose(0, 2, 1).reshape(len(neighbors), -1)
    is_active = contexts < 0
    for run in runs:
        _mark_active(*run, contexts, *spans, is_active)
    return _first_silent(contexts, is_active, neighbors, n)


@compiled
def _mark_active(
    first_row: int,
    n_rows: int,
    offsets: Int64,
    rows: UInt16,
    contexts: Int32,
    before: Int32,
    after: Int32,
    is_active: NDArray[np.bool_],
) -> None:
    """Mark the contexts, int32 [n_features, some], in which their feature is active in this run."""
    for feature in range(len(contexts)):
        begin, end = offsets[feature] - offsets[0], offsets[feature + 1] - offsets[0]
        for place in range(contexts.shape[1]):
            row = contexts[feature, place]
            if row < 0 or begin == end:
                continue
            first, last = row - before[row] - first_row, row + after[row] - first_row
            if last < 0 or first >= n_rows:
                continue
            low, high = begin, end
            while low < high:
                middle = (low + high) // 2
                if rows[middle] < first:
                    low = middle + 1
                else:
                    high = middle
            is_active[feature, place] |= low < end and rows[low] <= last


@compiled
def _first_silent(
    contexts: Int32, is_active: NDArray[np.bool_], neighbors: Int64, n: int
) -> NearMisses:
    n_features, n_neighbors = neighbors.shape
    found = np.full((2, n_features, n), -1, np.int64)
    for feature in range(n_features):
        filled = 0
        for place in range(contexts.shape[1]):
            row, is_new = contexts[feature, place], not is_active[feature, place]
            for j in range(filled):
                is_new = is_new and found[0, feature, j] != row
            if is_new and filled < n:
                found[0, feature, filled] = row
                found[1, feature, filled] = neighbors[feature, place % n_neighbors]
                filled += 1
    return NearMisses(found[0], found[1])
