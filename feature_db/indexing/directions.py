"""What the decoder alone says of each feature: the tokens it promotes and its nearest neighbours.

In: W_dec and the model's unembedding. Out: ranked ids and values, some hundred features at a time,
so that neither the logits nor the cosines of all features are ever in memory.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .sorting import Float32, Int64

_AT_ONCE = 512
_TopK = tuple[Tensor, ...]  # values, indices


class Ranked(NamedTuple):
    """The best ids of each feature, best first: ids int64 and values float32, [features, n]."""

    ids: Int64
    values: Float32


class LogitEffects(NamedTuple):
    """The effect of features on the logits.

    promoted, suppressed: the tokens of largest and of smallest logit.
    strengths: float32 [features], the largest logit in standard deviations above the mean over
        the vocabulary; noise alone reaches about 4.
    """

    promoted: Ranked
    suppressed: Ranked
    strengths: Float32


class LogitSpread(NamedTuple):
    """How the columns of the unembedding lie: mean [d_model], covariance [d_model, d_model].

    The logits of a direction v have the mean v @ mean and the variance v @ covariance @ v over the
    vocabulary, which thus need not be taken over all logits of each feature.
    """

    mean: Tensor
    covariance: Tensor


@torch.no_grad()
def logit_spread(logit_matrix: Tensor) -> LogitSpread:
    """logit_matrix: [d_model, vocab], as LanguageModel.logit_matrix."""
    mean = logit_matrix.mean(dim=1)
    centred = logit_matrix - mean[:, None]
    return LogitSpread(mean, centred @ centred.T / logit_matrix.shape[1])


@torch.no_grad()
def logit_effects(W_dec: Tensor, logit_matrix: Tensor, spread: LogitSpread, n: int) -> LogitEffects:
    """Direct effect of each feature on the logits, per unit of its act: `W_dec @ logit_matrix`.

    W_dec: [features, d_model]. logit_matrix: [d_model, vocab]; spread: of it.
    """
    parts = [_effects(rows.to(logit_matrix) @ logit_matrix, n) for rows in W_dec.split(_AT_ONCE)]
    promoted, suppressed = (_ranked(column) for column in zip(*parts, strict=True))
    rows = W_dec.to(logit_matrix)
    deviations = ((rows @ spread.covariance) * rows).sum(dim=1).sqrt().clamp_min(1e-12)
    means = (rows @ spread.mean).cpu().numpy()
    strengths = (promoted.values[:, 0] - means) / deviations.cpu().numpy()
    return LogitEffects(promoted, suppressed, strengths)


@torch.no_grad()
def nearest_features(W_dec: Tensor, first: int, stop: int, n: int) -> Ranked:
    """The n other features of highest decoder cosine, for the features first <= feature < stop.

    W_dec: [d_sae, d_model], rows of any length; n is cut to d_sae - 1.
    """
    unit = torch.nn.functional.normalize(W_dec.float(), dim=1)
    parts = []
    for at in range(first, stop, _AT_ONCE):
        ids = torch.arange(at, min(at + _AT_ONCE, stop), device=unit.device)
        cosines = unit[ids] @ unit.T  # [features, d_sae]
        cosines[torch.arange(len(ids)), ids] = -torch.inf
        parts.append(tuple(cosines.topk(min(n, len(unit) - 1), dim=1)))
    return _ranked(parts)


def _effects(logits: Tensor, n: int) -> tuple[_TopK, _TopK]:
    """The n largest and smallest of logits [features, vocab]."""
    n = min(n, logits.shape[1])
    return tuple(logits.topk(n, dim=1)), tuple(logits.topk(n, dim=1, largest=False))


def _ranked(parts: Iterable[_TopK]) -> Ranked:
    values, ids = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
    return Ranked(ids, values)
