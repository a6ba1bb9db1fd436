"""What the decoder alone says of each feature: the tokens it promotes and its nearest neighbours.

In: W_dec and the model's unembedding. Out: ranked ids and values, some hundred features at a time,
so that neither the logits nor the cosines of all features are ever in memory.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .codes import Float32, Int64

_FEATURES_AT_ONCE = 512
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


@torch.no_grad()
def logit_effects(W_dec: Tensor, logit_matrix: Tensor, n: int) -> LogitEffects:
    """Direct effect of each feature on the logits, per unit of its act: `W_dec @ logit_matrix`.

    W_dec: [features, d_model]. logit_matrix: [d_model, vocab], as LanguageModel.logit_matrix.
    """
    parts = [_effects(rows, logit_matrix, n) for rows in W_dec.split(_FEATURES_AT_ONCE)]
    promoted, suppressed, strengths = zip(*parts, strict=True)
    return LogitEffects(
        _ranked(promoted), _ranked(suppressed), torch.cat(strengths).float().cpu().numpy()
    )


@torch.no_grad()
def nearest_features(W_dec: Tensor, first: int, stop: int, n: int) -> Ranked:
    """The n other features of highest decoder cosine, for the features first <= feature < stop.

    W_dec: [d_sae, d_model], rows of any length; n is cut to d_sae - 1.
    """
    unit = torch.nn.functional.normalize(W_dec.float(), dim=1)
    parts = []
    for at in range(first, stop, _FEATURES_AT_ONCE):
        ids = torch.arange(at, min(at + _FEATURES_AT_ONCE, stop), device=unit.device)
        cosines = unit[ids] @ unit.T  # [features, d_sae]
        cosines[torch.arange(len(ids)), ids] = -torch.inf
        parts.append(tuple(cosines.topk(min(n, len(unit) - 1), dim=1)))
    return _ranked(parts)


def _effects(rows: Tensor, logit_matrix: Tensor, n: int) -> tuple[_TopK, _TopK, Tensor]:
    logits = rows.to(logit_matrix) @ logit_matrix  # [features, vocab]
    n = min(n, logits.shape[1])
    highest, lowest = logits.topk(n, dim=1), logits.topk(n, dim=1, largest=False)
    spread = logits.std(dim=1).clamp_min(1e-12)
    strengths = (highest.values[:, 0] - logits.mean(dim=1)) / spread
    return tuple(highest), tuple(lowest), strengths


def _ranked(parts: Iterable[_TopK]) -> Ranked:
    values, ids = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
    return Ranked(ids, values)
