"""Logistic regression, and how good a score is at telling two classes apart."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from sae.evaluating.report import ProbeScore

MAX_STEPS = 100


class LogisticFit(NamedTuple):
    """score = x @ weight + bias, above 0 where positive is more likely. weight: [width] and bias:
    scalar, float64, in the units of x."""

    weight: Tensor
    bias: Tensor

    def score(self, x: Tensor) -> Tensor:
        """Log-odds of rows [n, width]: [n] float64."""
        return x.double() @ self.weight + self.bias


@torch.enable_grad()
def fit_logistic(x: Tensor, is_positive: Tensor, strength: float = 1.0) -> LogisticFit:
    """The weights of least total logistic loss + |weight|^2 / (2 strength), in float64.

    x: [n, width], standardised here (a constant column gets weight 0): the penalty is on weights
    in units of standard deviations. is_positive: [n] bool. The bias isn't penalised. strength is
    what scikit-learn calls C. Minimised by L-BFGS with a strong Wolfe line search.
    """
    x = x.double()
    mean, std = x.mean(0), x.std(0, correction=0)
    scale = torch.where(std > 1e-12 * (1 + mean.abs()), std, torch.inf)
    standard, targets = (x - mean) / scale, is_positive.double()
    parameters = torch.zeros(x.shape[1] + 1, dtype=torch.float64, device=x.device)
    parameters.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=MAX_STEPS,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        scores = standard @ parameters[:-1] + parameters[-1]
        fit = functional.binary_cross_entropy_with_logits(scores, targets, reduction="sum")
        total = (fit + parameters[:-1].square().sum() / (2 * strength)) / len(x)
        total.backward()
        return total

    optimizer.step(loss)
    weight = parameters.detach()[:-1] / scale
    return LogisticFit(weight, parameters.detach()[-1] - weight @ mean)


def score_of(scores: Tensor, is_positive: Tensor) -> ProbeScore:
    """What scores [n] tell of is_positive [n] bool; a score above 0 says positive."""
    said = scores > 0
    true_positives = float((said & is_positive).sum())
    n_said, n_positive = float(said.sum()), float(is_positive.sum())
    return ProbeScore(
        accuracy=float((said == is_positive).double().mean()),
        f1=2 * true_positives / max(n_said + n_positive, 1.0),
        auroc=auroc(scores, is_positive),
    )


def auroc(scores: Tensor, is_positive: Tensor) -> float:
    """The chance that a positive's score is above a negative's, ties counted half.

    scores: [n]. is_positive: [n] bool, with both kinds.
    """
    _, places, counts = scores.double().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks = (last - (counts.double() - 1) / 2)[places]  # from 1, equal scores share their mean
    n_positive = float(is_positive.sum())
    n_negative = len(scores) - n_positive
    above = float(ranks[is_positive].sum()) - n_positive * (n_positive + 1) / 2
    return above / (n_positive * n_negative)
