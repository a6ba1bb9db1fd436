"""The best rows of every feature, each with the acts around it.

One choice serves both kinds of context: by act the strongest, by a hash of (feature, row) a uniform
sample. Equal scores go to the earlier row. The n best of a union are among the n best of its parts,
with a limit to the rows of one document too, so parts can be chosen from apart and then together.
"""

from typing import NamedTuple

import numpy as np

from .sorting import Float32, Int32, Int64, compiled


@compiled
def best_entries(
    offsets: Int64, scores: Float32 | Int64, documents: Int32 | Int64, n: int, per_document: int
) -> Int64:
    """Places of the n entries of highest score of each feature, best first.

    offsets: int64 [n_features + 1]. scores: [nnz]; equal ones go to the earlier entry.
    documents: int64 [nnz], of each entry. per_document: of one document at most so many; 0: any.
    Returns: int64 [n_features, n], -1 where there are fewer.
    """
    n_features = len(offsets) - 1
    best = np.full((n_features, n), -1, np.int64)
    for feature in range(n_features):
        mine, filled = best[feature], 0
        for i in range(offsets[feature], offsets[feature + 1]):
            score = scores[i]
            if filled == n and score <= scores[mine[n - 1]]:
                continue
            at = min(filled, n - 1)
            if per_document:
                n_same, last = 0, -1
                for j in range(filled):
                    if documents[mine[j]] == documents[i]:
                        n_same += 1
                        last = j
                if n_same >= per_document:
                    if score <= scores[mine[last]]:
                        continue
                    at = last
            if at == filled:
                filled += 1
            while at > 0 and scores[mine[at - 1]] < score:
                mine[at] = mine[at - 1]
                at -= 1
            mine[at] = i
    return best


@compiled
def sample_scores(
    offsets: Int64, first_feature: int, rows: Int32 | Int64, first_row: int, seed: int
) -> Int64:
    """Scores of entries that are uniform and depend on (seed, feature, row) alone: int64 [nnz].

    first_feature: the number of the first one of `offsets`. rows: [nnz], from first_row of the
    text.
    Source: the finaliser of SplitMix64 (Steele, Lea and Flood 2014, OOPSLA, figure 17).
    """
    scores = np.empty(len(rows), np.int64)
    for feature in range(len(offsets) - 1):
        salt = np.uint64(first_feature + feature + (seed << 32)) * np.uint64(0xD1B54A32D192ED03)
        for i in range(offsets[feature], offsets[feature + 1]):
            x = np.uint64(rows[i] + first_row) * np.uint64(0x9E3779B97F4A7C15) + salt
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            scores[i] = np.int64(x >> np.uint64(32))
    return scores


class Spans(NamedTuple):
    """How far a context around each row may reach: before, after, int32 [rows], tokens."""

    before: Int32
    after: Int32


class Around(NamedTuple):
    """Other acts of a feature within the contexts of its chosen rows, context after context.

    counts: int64 [n], of each. steps: int16, from the chosen row. acts: float32.
    """

    counts: Int64
    steps: Int32
    acts: Float32


def acts_around(
    entries: Int64, starts: Int64, stops: Int64, rows: Int32, acts: Float32, spans: Spans
) -> Around:
    """What the feature of each chosen entry does on the rows around it.

    entries: int64 [n], places in rows and acts. starts, stops: of its feature's entries there.
    """
    return Around(*_around(entries, starts, stops, rows, acts, spans.before, spans.after))


@compiled
def _around(
    entries: Int64,
    starts: Int64,
    stops: Int64,
    rows: Int32,
    acts: Float32,
    before: Int32,
    after: Int32,
) -> tuple[Int64, Int32, Float32]:
    counts = np.zeros(len(entries), np.int64)
    for writing in (False, True):
        n_all = counts.sum() if writing else 0
        steps = np.empty(n_all, np.int16)
        found = np.empty(n_all, np.float32)
        at = 0
        for c in range(len(entries)):
            i = entries[c]
            row = rows[i]
            first = i
            while first > starts[c] and row - rows[first - 1] <= before[row]:
                first -= 1
            for j in range(first, stops[c]):
                if rows[j] - row > after[row]:
                    break
                if j == i:
                    continue
                if writing:
                    steps[at], found[at] = rows[j] - row, acts[j]
                    at += 1
                else:
                    counts[c] += 1
    return counts, steps, found
