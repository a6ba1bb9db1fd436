"""Each architecture's loss as its docstring has it, written densely, for autograd to differentiate.

Nothing here uses the package's own selection, sums or gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Leaves = dict[str, Tensor]


class Data(NamedTuple):
    """x: [batch, d_in]. y: [batch, d_out]; x itself if tied. widths: of y's places. variance: V.
    coefficient: of the penalty. auxk: dead_ids, k_aux and coefficient, if there is one."""

    x: Tensor
    y: Tensor
    is_tied: bool
    widths: tuple[int, ...]
    variance: float
    coefficient: float
    auxk: tuple[Tensor, int, float] | None


class Losses(NamedTuple):
    """loss (reconstruction), penalty, aux_loss; acts: [batch, d_sae]."""

    loss: Tensor
    penalty: Tensor
    aux_loss: Tensor
    acts: Tensor


def products(data: Data, p: Leaves) -> Tensor:
    """x @ W_enc, centred where tied."""
    return (data.x - p["b_dec"] if data.is_tied else data.x) @ p["W_enc"].T


def largest(scores: Tensor, n: int) -> Tensor:
    """Whether each of scores [batch, m] is one of its row's n largest."""
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :n]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, value=True)


def error(data: Data, p: Leaves, acts: Tensor) -> Tensor:
    x_hat = acts @ p["W_dec"] + p["b_dec"]
    return data.y - x_hat - (data.x @ p["W_skip"] if "W_skip" in p else 0.0)


def topk(data: Data, p: Leaves, k: int) -> tuple[Tensor, Tensor, Tensor]:
    pre_acts = products(data, p) + p["b_enc"]
    acts = pre_acts.relu() * largest(pre_acts, k)
    return error(data, p, acts).square().sum(), torch.zeros(()), acts


def batch_topk(data: Data, p: Leaves, k: int) -> tuple[Tensor, Tensor, Tensor]:
    acts = _top_of_batch(products(data, p) + p["b_enc"], k)
    return error(data, p, acts).square().sum(), torch.zeros(()), acts


def matryoshka(
    data: Data, p: Leaves, k: int, prefixes: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    acts = _top_of_batch(products(data, p) + p["b_enc"], k)
    ids = torch.arange(acts.shape[1])
    losses = [error(data, p, acts * (ids < m)).square().sum() for m in prefixes]
    return torch.stack(losses).mean(), torch.zeros(()), acts


def hierarchical(
    data: Data, p: Leaves, k: int, ks: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    pre_acts = products(data, p) + p["b_enc"]
    losses = [error(data, p, pre_acts.relu() * largest(pre_acts, j)).square().sum() for j in ks]
    return torch.stack(losses).mean(), torch.zeros(()), pre_acts.relu() * largest(pre_acts, k)


def relu(data: Data, p: Leaves) -> tuple[Tensor, Tensor, Tensor]:
    acts = (products(data, p) + p["b_enc"]).relu()
    norms = torch.stack([each.norm(dim=1) for each in p["W_dec"].split(data.widths, dim=1)]).sum(0)
    return error(data, p, acts).square().sum(), data.coefficient * (acts * norms).sum(), acts


def gated(data: Data, p: Leaves) -> tuple[Tensor, Tensor, Tensor]:
    gates = products(data, p) + p["b_enc"]
    magnitudes = p["r_mag"].exp() * products(data, p) + p["b_mag"]
    acts = magnitudes.relu() * (gates > 0)
    decoder = {name: each.detach() for name, each in p.items()}
    by_gates = error(data, decoder, gates.relu()).square().sum()
    penalty = data.coefficient * gates.relu().sum() + by_gates
    return error(data, p, acts).square().sum(), penalty, acts


def jumprelu_l0(data: Data, p: Leaves, width: float) -> tuple[Tensor, Tensor, Tensor]:
    pre_acts = (products(data, p) + p["b_enc"]).relu()
    threshold = p["log_threshold"].exp()
    acts = _Jump.apply(pre_acts, threshold, width, False)
    l0 = _Step.apply(pre_acts, threshold, width).sum()
    loss = error(data, p, acts).square().sum()
    return loss, data.coefficient * data.y.shape[1] * l0, acts


def jumprelu_tanh(data: Data, p: Leaves, width: float) -> tuple[Tensor, Tensor, Tensor]:
    pre_acts = products(data, p) + p["b_enc"]
    threshold = p["log_threshold"].exp()
    acts = _Jump.apply(pre_acts, threshold, width, True)
    penalty = data.coefficient * (4 * acts).tanh().sum()
    penalty = penalty + 3e-6 * (threshold - pre_acts).relu().sum()
    return error(data, p, acts).square().sum(), penalty, acts


Loss = Callable[[Data, Leaves], tuple[Tensor, Tensor, Tensor]]


def losses(of: Loss, data: Data, p: Leaves) -> Losses:
    """All three losses, over batch times variance."""
    loss, penalty, acts = of(data, p)
    aux_loss = torch.zeros_like(loss)
    if data.auxk is not None:
        dead_ids, k, coefficient = data.auxk
        dead = (products(data, p) + p["b_enc"])[:, dead_ids].relu()
        dead = dead * largest(dead, k)
        left_over = error(data, p, acts).detach() - dead @ p["W_dec"][dead_ids]
        aux_loss = coefficient * min(1.0, len(dead_ids) / k) * left_over.square().sum()
    size = len(data.x) * data.variance
    return Losses(loss / size, penalty / size, aux_loss / size, acts)


def _top_of_batch(pre_acts: Tensor, k: int) -> Tensor:
    n_keep = k * len(pre_acts)
    return pre_acts.relu() * largest(pre_acts.reshape(1, -1), n_keep).view_as(pre_acts)


class _Jump(torch.autograd.Function):
    """pre_acts where above threshold, with the pseudo-derivatives of JumpReLU's docstring."""

    @staticmethod
    def forward(
        ctx: Any, pre_acts: Tensor, threshold: Tensor, width: float, through: bool
    ) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.width, ctx.through = width, through
        return pre_acts * (pre_acts > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        pre_acts, threshold = ctx.saved_tensors
        window = (((pre_acts - threshold) / ctx.width).abs() < 0.5) / ctx.width
        of_acts = (pre_acts > threshold) + (pre_acts * window if ctx.through else 0.0)
        return grads[0] * of_acts, (-threshold * window * grads[0]).sum(0), None, None


class _Step(torch.autograd.Function):
    """1 where pre_acts are above threshold, which alone gets a pseudo-derivative."""

    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.width = width
        return (pre_acts > threshold).to(pre_acts.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        pre_acts, threshold = ctx.saved_tensors
        window = (((pre_acts - threshold) / ctx.width).abs() < 0.5) / ctx.width
        return torch.zeros_like(pre_acts), (-window * grads[0]).sum(0), None
