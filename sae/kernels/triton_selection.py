"""Choosing features with the Triton kernels: float16 products find candidates, float32 decides.

Every score that decides is made in float32 by one kernel; the bound of triton_product says which
scores can matter. Rows for which it can't be shown that nothing was missed, or whose list of
candidates overflowed, are chosen again from dense float32 scores, so the choice is always that of
float32.

Top k: each row's threshold is guessed from every 16th feature, low enough that about 4k candidates
lie above it; then only those that may be among the k largest are scored in float32.
Imported only where triton is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sae.codes import Codes, offsets_of_counts
from sae.kernels import triton_choice, triton_product
from sae.kernels.selection import PreActs
from sae.kernels.triton_launch import ROWS, dot_by_entry, programs

# Of the features, every so many-th is looked at for a guess at the row's threshold.
SAMPLED = 16
# Candidates a row that there is room for, where nothing says how many are sought.
CAPACITY = 1024
# With more doubtful rows than this fraction, all are chosen densely.
DENSE_FRACTION = 0.25
Exactly = Callable[[PreActs], Codes]


class Tiles(NamedTuple):
    """The shape of a program's part of the product, and how it is run.

    rows, features, depth: of a tile. group: row tiles that share features. warps, stages: Triton's.
    """

    rows: int = 128
    features: int = 256
    depth: int = 64
    group: int = 16
    warps: int = 8
    stages: int = 3


TILES = Tiles()


class Rounded(NamedTuple):
    """Rows in float16, and what is known of the rounding (see triton_product.round_rows).

    low: [n, d] float16. scale, norm, rest: [n] float32.
    """

    low: Tensor
    scale: Tensor
    norm: Tensor
    rest: Tensor


class Product(NamedTuple):
    """A product x @ W.T + b whose estimates are to be made."""

    x: Rounded
    W: Rounded
    b: Tensor

    @classmethod
    def of(cls, pre_acts: PreActs) -> Product:
        """Both operands rounded."""
        return cls(round_rows(pre_acts.x), round_rows(pre_acts.W), pre_acts.b)

    @property
    def n_rows(self) -> int:
        """Rows of x."""
        return len(self.x.low)

    @property
    def d(self) -> int:
        """Length of the sums."""
        return self.x.low.shape[1]

    @property
    def depth_error(self) -> float:
        """The bound's part for adding up in float32."""
        return self.d * 2.0**-22


class Lists(NamedTuple):
    """Candidates, row by row, unordered (see triton_product.append_above).

    counts: [batch] int32. ids, uppers: [batch, capacity].
    """

    counts: Tensor
    ids: Tensor
    uppers: Tensor


def round_rows(values: Tensor) -> Rounded:
    """Rows [n, d] float32 in float16."""
    n, d = values.shape
    low = values.new_empty(n, d, dtype=torch.float16)
    made = Rounded(low, *(values.new_empty(n) for _ in range(3)))
    block = triton.next_power_of_2(d)
    with torch.cuda.device_of(values):
        triton_product.round_rows[programs(n)](
            values, *made, n, d, ROWS=ROWS, BLOCK=block, num_warps=max(1, min(16, block // 512))
        )
    return made


def above_threshold(pre_acts: PreActs, threshold: Tensor, exactly: Exactly) -> Codes:
    """All pre-activations above a threshold, a scalar or [d_sae], of either sign.

    exactly: the same from dense scores.
    """
    if len(pre_acts.x) * CAPACITY >= 2**31:
        return exactly(pre_acts)
    product = Product.of(pre_acts)
    row_limits, feature_limits = threshold.new_zeros(product.n_rows), torch.zeros_like(product.b)
    if threshold.dim():
        feature_limits = threshold.contiguous()
    else:
        row_limits += threshold
    lists = append_above(product, row_limits, feature_limits, CAPACITY)
    candidates, is_whole = _narrowed(product, lists, 0)
    if candidates is None:
        return exactly(pre_acts)
    scored = _scored(candidates, pre_acts)
    limits = threshold[scored.feature_ids] if threshold.dim() else threshold
    return _mended(scored.where(scored.acts > limits), is_whole, pre_acts, exactly)


def top_k_of_rows(pre_acts: PreActs, k: int, exactly: Exactly) -> Codes:
    """The k largest positive pre-activations of each row; of equal ones, the first features.

    exactly: the same from dense scores.
    """
    rank = sampled_rank(k)
    capacity = triton.next_power_of_2(SAMPLED * (rank + 4 * round(math.sqrt(rank))))
    if len(pre_acts.b) // SAMPLED < 2 * rank or len(pre_acts.x) * capacity >= 2**31:
        return exactly(pre_acts)
    product = Product.of(pre_acts)
    limits = _row_limits(product, rank)
    lists = append_above(product, limits, torch.zeros_like(product.b), capacity)
    candidates, is_whole = _narrowed(product, lists, k)
    if candidates is None:
        return exactly(pre_acts)
    scored = _scored(candidates, pre_acts)
    is_chosen = torch.empty(scored.nnz, dtype=torch.int8, device=limits.device)
    is_certain = torch.empty(product.n_rows, dtype=torch.int8, device=limits.device)
    with torch.cuda.device_of(limits):
        triton_choice.choose_largest[programs(product.n_rows)](
            scored.acts, scored.offsets, limits, is_chosen, is_certain,
            product.n_rows, k, ROWS=ROWS, WIDTH=_width(scored.n_active()), num_warps=1,
        )  # fmt: skip
    return _mended(scored.where(is_chosen.bool()), is_whole & is_certain.bool(), pre_acts, exactly)


def sampled_rank(k: int) -> int:
    """Which largest of the sampled features' scores guesses a row's threshold: k / 16, and three
    standard deviations of how many of the k largest the sample has, and three more."""
    sampled = k / SAMPLED
    return round(sampled + 3 * math.sqrt(max(1.0, sampled)) + 3)


def append_above(
    product: Product, row_limits: Tensor, feature_limits: Tensor, capacity: int
) -> Lists:
    """Candidates for lying above row_limits [batch] + feature_limits [d_sae]."""
    x, W, b = product
    n_rows, n_features = product.n_rows, len(b)
    counts = torch.zeros(n_rows, dtype=torch.int32, device=b.device)
    ids = torch.empty(n_rows, capacity, dtype=torch.int32, device=b.device)
    uppers = b.new_empty(n_rows, capacity)
    with torch.cuda.device_of(b):
        triton_product.append_above[_tiles(n_rows, n_features)](
            x.low, W.low, x.scale, W.scale, b, x.norm, x.rest, W.norm, W.rest,
            row_limits, feature_limits, counts, ids, uppers,
            n_rows, n_features, product.d, capacity, product.depth_error, **_shape(product.d),
        )  # fmt: skip
    return Lists(counts, ids, uppers)


def _row_limits(product: Product, rank: int) -> Tensor:
    """Each row's rank-th largest score among every SAMPLED-th feature, or 0: [batch]."""
    x, W, b = product
    n_sampled = len(b) // SAMPLED
    size = 1
    while size < triton_product.MAX_GROUP and n_sampled // (2 * size) >= 4 * rank:
        size *= 2
    n_groups = n_sampled // size
    maxima = b.new_empty(product.n_rows, n_groups)
    with torch.cuda.device_of(b):
        triton_product.group_maxima[_tiles(product.n_rows, n_sampled)](
            x.low, W.low, x.scale, W.scale, b, maxima, product.n_rows, n_sampled, n_groups,
            product.d, STRIDE=SAMPLED, SIZE=size, **_shape(product.d),
        )  # fmt: skip
    return maxima.topk(rank, dim=1).values[:, -1].relu()


def _narrowed(product: Product, lists: Lists, k: int) -> tuple[Codes | None, Tensor]:
    """Candidates that may be among a row's k largest (k 0: all) as codes whose acts are unset, and
    which rows' lists were whole, [batch]; no codes if too many weren't."""
    x, W, _ = product
    n_rows, capacity = lists.ids.shape
    is_whole = lists.counts <= capacity
    counts = lists.counts * is_whole
    n_broken = int((~is_whole).sum())
    if n_broken > DENSE_FRACTION * n_rows:
        return None, is_whole
    width = _width(counts)
    kept = torch.empty(n_rows, width, dtype=torch.int32, device=counts.device)
    n_kept = torch.empty_like(counts)
    with torch.cuda.device_of(counts):
        triton_choice.narrow_lists[programs(n_rows)](
            counts, lists.ids, lists.uppers, x.norm, x.rest, W.norm, W.rest, kept, n_kept,
            n_rows, len(product.b), capacity, k, product.depth_error, ROWS=ROWS, WIDTH=width,
            num_warps=max(1, width // 256),
        )  # fmt: skip
        offsets = offsets_of_counts(n_kept)
        ids = torch.empty(int(offsets[-1]), dtype=torch.int64, device=counts.device)
        in_order = kept.sort(dim=1).values  # what was dropped goes last
        triton_choice.pack_lists[programs(n_rows)](
            in_order, offsets, ids, n_rows, ROWS=ROWS, WIDTH=width, num_warps=1
        )
    return Codes(lists.uppers.new_empty(len(ids)), ids, offsets), is_whole


def _scored(candidates: Codes, pre_acts: PreActs) -> Codes:
    """The same with pre-activations in float32 as acts."""
    dots = dot_by_entry(candidates, pre_acts.x, pre_acts.W)
    return candidates._replace(acts=dots + pre_acts.b[candidates.feature_ids])


def _mended(codes: Codes, is_certain: Tensor, pre_acts: PreActs, exactly: Exactly) -> Codes:
    """Codes with the rows that aren't certain chosen exactly."""
    doubtful = (~is_certain).nonzero().squeeze(1)
    if len(doubtful) == 0:
        return codes
    exact = exactly(pre_acts._replace(x=pre_acts.x[doubtful]))
    n_active = codes.n_active()
    n_active[doubtful] = exact.n_active()
    offsets = offsets_of_counts(n_active)
    made = Codes(
        exact.acts.new_empty(int(offsets[-1])), offsets.new_empty(int(offsets[-1])), offsets
    )
    certain = codes.where(is_certain[codes.rows()])
    all_rows = torch.arange(codes.n_rows, device=offsets.device)
    for part, rows in ((certain, all_rows), (exact, doubtful)):
        of_part = part.rows()
        ranks = torch.arange(part.nnz, device=offsets.device) - part.offsets[of_part]
        places = offsets[rows[of_part]] + ranks
        made.acts[places], made.feature_ids[places] = part.acts, part.feature_ids
    return made


def _width(counts: Tensor) -> int:
    """A power of two that all counts fit in."""
    width: int = triton.next_power_of_2(max(16, int(counts.max())))
    return width


def _tiles(n_rows: int, n_features: int) -> tuple[int]:
    return (triton.cdiv(n_rows, TILES.rows) * triton.cdiv(n_features, TILES.features),)


def _shape(d: int) -> dict[str, int | bool]:
    """The keywords that say how the product is cut."""
    return {
        "BM": TILES.rows, "BN": TILES.features, "BK": TILES.depth, "GROUP": TILES.group,
        "EVEN": d % TILES.depth == 0, "num_warps": TILES.warps, "num_stages": TILES.stages,
    }  # fmt: skip
