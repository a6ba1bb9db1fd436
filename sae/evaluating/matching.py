"""Two sets of directions -> a one-to-one matching of them, by cosine."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

# Entries of a tile of cosines: 64 MiB in float32.
TILE_ENTRIES = 1 << 24


class Matching(NamedTuple):
    """partner: [n] int64, the row of the other set; -1 where none was left. cosine: [n], with the
    partner; 0 where there is none."""

    partner: Tensor
    cosine: Tensor


class Nearest(NamedTuple):
    """cosine: [n], the largest with a row of the other set. row: [n] int64, which one it is."""

    cosine: Tensor
    row: Tensor


def nearest_directions(a: Tensor, b: Tensor) -> Nearest:
    """The direction of b [m, width] nearest to each of a [n, width]: signed cosine, by tiles."""
    return _nearest(functional.normalize(a, dim=1), functional.normalize(b, dim=1))


def match_directions(a: Tensor, b: Tensor) -> Matching:
    """Greedy one-to-one matching of a [n, width] with b [m, width] by signed cosine.

    The pair of the largest cosine is taken, both its members are set aside, and so on until one
    set is used up. That is done by taking all mutually nearest pairs at once, which gives the same
    pairs, in memory for a tile of cosines. Its summed cosine is at least half of the Hungarian
    algorithm's optimum, which takes n^3 steps; where each direction has one clear partner the two
    are the same.
    """
    sides = functional.normalize(a, dim=1), functional.normalize(b, dim=1)
    free = [torch.ones(len(side), dtype=torch.bool, device=a.device) for side in sides]
    best = [Nearest(a.new_zeros(len(s)), a.new_zeros(len(s), dtype=torch.int64)) for s in sides]
    stale = [each.clone() for each in free]
    found = Matching(torch.full((len(a),), -1, device=a.device), a.new_zeros(len(a)))
    while free[0].any() and free[1].any():
        for i in (0, 1):
            _refresh_(best[i], stale[i], sides[i], sides[1 - i], free[1 - i])
        rows = _mutual_rows(best, free[0])
        partners = best[0].row[rows]
        found.partner[rows], found.cosine[rows] = partners, best[0].cosine[rows]
        free[0][rows], free[1][partners] = False, False
        for i in (0, 1):  # those whose nearest was just taken
            stale[i] = free[i] & ~free[1 - i][best[i].row]
    return found


def _mutual_rows(best: list[Nearest], is_free: Tensor) -> Tensor:
    """Free rows of the first set that are their nearest one's nearest: at least one."""
    rows = is_free.nonzero().squeeze(1)
    mutual = rows[best[1].row[best[0].row[rows]] == rows]
    if len(mutual):
        return mutual
    # Equal cosines that rounding tells apart differently from either side.
    return rows[best[0].cosine[rows].argmax()].unsqueeze(0)


def _refresh_(best: Nearest, stale: Tensor, own: Tensor, other: Tensor, is_free: Tensor) -> None:
    """Find the nearest free row of the other set anew for the stale ones."""
    rows, candidates = stale.nonzero().squeeze(1), is_free.nonzero().squeeze(1)
    if len(rows):
        nearest = _nearest(own[rows], other[candidates])
        best.cosine[rows], best.row[rows] = nearest.cosine, candidates[nearest.row]


def _nearest(a: Tensor, b: Tensor) -> Nearest:
    """Of unit rows."""
    step = max(1, TILE_ENTRIES // len(b))
    tiles = [(part @ b.T).max(1) for part in a.split(step)]
    return Nearest(torch.cat([t.values for t in tiles]), torch.cat([t.indices for t in tiles]))
