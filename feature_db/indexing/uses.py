"""Where a feature is active: on which tokens, in which documents, beside which features.

Counts of all pairs would grow with the text: of each feature some tokens, documents and companions
are kept, the most frequent ones, in every part of the text.
"""

from typing import NamedTuple

import numpy as np

from .sorting import Float32, Int32, Int64, compiled

MOST_ROWS = 512
"""Of a feature's rows in a part that are looked at for the features beside it."""


class TokenUses(NamedTuple):
    """Pairs of features and tokens, by feature and then token; all [n].

    features: from 0 for the first of those asked. n_active: entries of the feature on the token.
    act_sums: int64, of its acts there, see `Scales`.
    """

    features: Int64
    token_ids: Int64
    n_active: Int64
    act_sums: Int64


def token_uses(
    offsets: Int64,
    fixed: Int64,
    tokens: Int32,
    vocab_size: int,
    most: int,
) -> TokenUses:
    """The `most` frequent tokens of each feature; equal ones: those of smaller ids.

    fixed: int64 [nnz], see `fixed_acts`. tokens: int32 [nnz], -1 where there is none.
    """
    counts, token_ids, n_active, act_sums = _token_uses(offsets, fixed, tokens, vocab_size, most)
    return TokenUses(np.repeat(np.arange(len(counts)), counts), token_ids, n_active, act_sums)


@compiled
def _token_uses(
    offsets: Int64,
    fixed: Int64,
    tokens: Int32,
    vocab_size: int,
    most: int,
) -> tuple[Int64, Int64, Int64, Int64]:
    n_features = len(offsets) - 1
    most = min(most, vocab_size)
    room = 0
    for feature in range(n_features):
        room += min(offsets[feature + 1] - offsets[feature], most)
    counts = np.zeros(n_features, np.int64)
    found = np.empty((3, room), np.int64)
    n_on = np.zeros(vocab_size, np.int32)
    sum_on = np.zeros(vocab_size, np.int64)
    touched = np.empty(vocab_size, np.int64)
    at = 0
    for feature in range(n_features):
        n_touched = 0
        for i in range(offsets[feature], offsets[feature + 1]):
            if tokens[i] < 0:
                continue
            token = np.uint32(tokens[i])
            if n_on[token] == 0:
                touched[n_touched] = token
                n_touched += 1
            n_on[token] += 1
            sum_on[token] += fixed[i]
        kept = touched[:n_touched].copy()
        if len(kept) > most:
            keys = n_on[kept].astype(np.int64) * vocab_size + (vocab_size - 1 - kept)
            keys.sort()
            kept = vocab_size - 1 - keys[len(keys) - most :] % vocab_size
        kept.sort()
        for token in kept:
            found[0, at], found[1, at], found[2, at] = token, n_on[token], sum_on[token]
            at += 1
        counts[feature] = len(kept)
        for token in touched[:n_touched]:
            n_on[token] = sum_on[token] = 0
    return counts, found[0, :at].copy(), found[1, :at].copy(), found[2, :at].copy()


class DocumentUses(NamedTuple):
    """The documents in which a feature is most active; [n_features, n].

    documents: int64, -1 where there are fewer. n_active; act_sums: see `Scales`; max_acts.
    """

    documents: Int64
    n_active: Int64
    act_sums: Int64
    max_acts: Float32


def document_uses(
    offsets: Int64, acts: Float32, fixed: Int64, documents: Int32, n: int
) -> DocumentUses:
    """The n documents of largest summed act; equal ones: the earlier. documents: of each entry."""
    return DocumentUses(*_document_uses(offsets, acts, fixed, documents, n))


@compiled
def _document_uses(
    offsets: Int64, acts: Float32, fixed: Int64, documents: Int32, n: int
) -> tuple[Int64, Int64, Int64, Float32]:
    n_features = len(offsets) - 1
    best = np.full((n_features, n), -1, np.int64)
    n_active = np.zeros((n_features, n), np.int64)
    sums = np.zeros((n_features, n), np.int64)
    highest = np.zeros((n_features, n), np.float32)
    for feature in range(n_features):
        i, stop, filled = offsets[feature], offsets[feature + 1], 0
        while i < stop:
            document, its_sum, its_n, its_max = documents[i], np.int64(0), 0, acts[i]
            while i < stop and documents[i] == document:
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
    return best, n_active, sums, highest


class Companions(NamedTuple):
    """Features that are active on the same rows; [n_features, n].

    others: int64, -1 where there are fewer. n_both: rows on which both are. Of a feature with more
    than `MOST_ROWS` entries every second, or third, ... entry is looked at, and n_both estimated.
    """

    others: Int64
    n_both: Int64


def companions(
    offsets: Int64,
    rows: Int32,
    first_feature: int,
    row_offsets: Int64,
    row_features: Int32,
    n_active: Int64,
    n: int,
) -> Companions:
    """The n features of largest n_both^2 / (n_active * n_active of the other).

    row_offsets, row_features: the features of every row. n_active: int64 [d_sae].
    """
    return Companions(
        *_companions(offsets, rows, first_feature, row_offsets, row_features, n_active, n)
    )


@compiled
def _companions(
    offsets: Int64,
    rows: Int32,
    first_feature: int,
    row_offsets: Int64,
    row_features: Int32,
    n_active: Int64,
    n: int,
) -> tuple[Int64, Int64]:
    n_features = len(offsets) - 1
    best = np.full((n_features, n), -1, np.int64)
    n_both = np.zeros((n_features, n), np.int64)
    counts = np.zeros(len(n_active), np.int32)
    scores = np.empty(n, np.float64)
    for feature in range(n_features):
        first, n_entries = offsets[feature], offsets[feature + 1] - offsets[feature]
        step = max((n_entries + MOST_ROWS - 1) // MOST_ROWS, 1)
        n_looked_at = (n_entries + step - 1) // step
        for i in range(first, first + n_entries, step):
            for j in range(row_offsets[rows[i]], row_offsets[rows[i] + 1]):
                counts[np.uint32(row_features[j])] += 1
        counts[first_feature + feature] = 0
        filled = 0
        for i in range(first, first + n_entries, step):
            for j in range(row_offsets[rows[i]], row_offsets[rows[i] + 1]):
                other = np.uint32(row_features[j])
                if counts[other] == 0:
                    continue
                both = counts[other] * n_entries // n_looked_at
                counts[other] = 0
                score = both * both / n_active[other]
                if filled == n and (
                    score < scores[n - 1]
                    or (score == scores[n - 1] and other > best[feature, n - 1])
                ):
                    continue
                at = min(filled, n - 1)
                filled = min(filled + 1, n)
                while at > 0 and (
                    scores[at - 1] < score
                    or (scores[at - 1] == score and best[feature, at - 1] > other)
                ):
                    scores[at], best[feature, at] = scores[at - 1], best[feature, at - 1]
                    n_both[feature, at] = n_both[feature, at - 1]
                    at -= 1
                scores[at], best[feature, at], n_both[feature, at] = score, other, both
    return best, n_both


class NearMisses(NamedTuple):
    """Contexts of a feature's neighbours in which it is silent; [n_features, n].

    rows: int64, of the neighbour's peak; -1 where there are fewer. neighbors: whose it is.
    """

    rows: Int64
    neighbors: Int64


def near_misses(
    offsets: Int64,
    rows: Int32,
    neighbors: Int64,
    top_rows: Int32,
    spans: tuple[Int32, Int32],
    n: int,
) -> NearMisses:
    """Each neighbour's strongest context, then each one's second, and so on, if the feature is
    active nowhere in it.

    neighbors: int64 [n_features, some], nearest first. top_rows: int32 [d_sae, some], the rows of
    the strongest contexts of every feature, -1 where there are fewer. spans: `Spans` of the rows.
    """
    return NearMisses(*_near_misses(offsets, rows, neighbors, top_rows, spans[0], spans[1], n))


@compiled
def _near_misses(
    offsets: Int64,
    rows: Int32,
    neighbors: Int64,
    top_rows: Int32,
    before: Int32,
    after: Int32,
    n: int,
) -> tuple[Int64, Int64]:
    n_features = len(offsets) - 1
    found = np.full((n_features, n), -1, np.int64)
    whose = np.full((n_features, n), -1, np.int64)
    for feature in range(n_features):
        mine, filled = rows[offsets[feature] : offsets[feature + 1]], 0
        for rank in range(top_rows.shape[1]):
            for neighbor in neighbors[feature]:
                row = top_rows[neighbor, rank]
                if row < 0 or filled == n:
                    continue
                at = np.searchsorted(mine, row - before[row])
                if at < len(mine) and mine[at] <= row + after[row]:
                    continue
                is_new = True
                for j in range(filled):
                    is_new = is_new and found[feature, j] != row
                if is_new:
                    found[feature, filled], whose[feature, filled] = row, neighbor
                    filled += 1
    return found, whose
