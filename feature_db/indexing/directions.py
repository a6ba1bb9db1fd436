"""What the decoder alone says of each feature: the tokens it promotes and its nearest neighbours.

In: W_dec and the model's unembedding. Out: ranked ids and values, some hundred features at a time,
so that neither the logits nor the cosines of all features are ever in memory.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.kernels import Kernels, PreActs, kernels_of

from .sorting import Float32, Int64

_AT_ONCE = 1024


class Ranked(NamedTuple):
    """The best ids of each feature, best first: ids int64 and values float32, [features, n]."""

    ids: Int64
    values: Float32

    def of_features(self, first: int, stop: int) -> "Ranked":
        """Those of the features first <= feature < stop."""
        return Ranked(self.ids[first:stop], self.values[first:stop])


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
def logit_spread(unembedding: Tensor) -> LogitSpread:
    """unembedding: [vocab, d_model], the transpose of LanguageModel.logit_matrix."""
    mean = unembedding.mean(dim=0)
    centred = unembedding - mean
    return LogitSpread(mean, centred.T @ centred / len(unembedding))


@torch.no_grad()
def logit_effects(W_dec: Tensor, unembedding: Tensor, spread: LogitSpread, n: int) -> LogitEffects:
    """Direct effect of each feature on the logits, per unit of its act: `W_dec @ unembedding.T`.

    W_dec: [features, d_model]. unembedding: [vocab, d_model]; spread: of it.
    """
    rows = W_dec.to(unembedding)
    promoted, lowest = (largest_products(sign * rows, unembedding, n) for sign in (1, -1))
    deviations = ((rows @ spread.covariance) * rows).sum(dim=1).sqrt().clamp_min(1e-12)
    means = (rows @ spread.mean).cpu().numpy()
    strengths = (promoted.values[:, 0] - means) / deviations.cpu().numpy()
    return LogitEffects(promoted, Ranked(lowest.ids, -lowest.values), strengths)


class NearestFeatures:
    """The n other features of highest decoder cosine of every feature, made once for each SAE."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._known: dict[str, Ranked] = {}

    @torch.no_grad()
    def of(self, key: str, W_dec: Tensor) -> Ranked:
        """key: names the SAE. W_dec: [d_sae, d_model], of rows of any length.

        n is cut to d_sae - 1.
        """
        if key not in self._known:
            unit = torch.nn.functional.normalize(W_dec.float(), dim=1)
            n = min(self._n, len(unit) - 1)
            parts = [_without_self(unit, at, n) for at in range(0, len(unit), _AT_ONCE)]
            self._known[key] = Ranked(
                np.concatenate([part.ids for part in parts]),
                np.concatenate([part.values for part in parts]),
            )
        return self._known[key]


@torch.no_grad()
def similar_features(W_dec: Tensor, others: Tensor, n: int) -> Ranked:
    """The n features of another SAE of highest decoder cosine, for every feature of one.

    W_dec: [d_sae, d_model]. others: [d_sae of the other, d_model].
    """
    unit, table = (torch.nn.functional.normalize(w.float(), dim=1) for w in (W_dec, others))
    return largest_products(unit, table, n)


@torch.no_grad()
def largest_products(rows: Tensor, table: Tensor, n: int) -> Ranked:
    """The n largest of each row's products with the rows of a table, and which these are.

    rows: [m, width]. table: [n_table, width]. n is cut to n_table. They are an encoder's n largest
    pre-activations, which the fastest kernels find without making all products in float32.
    """
    n, rows, table = min(n, len(table)), rows.float().contiguous(), table.float().contiguous()
    if n < len(table):
        kernels = fastest_on(rows.device, Kernels())
        codes = kernels.top_k_of_rows(PreActs(rows, table, table.new_zeros(len(table))), n)
        if codes.nnz == n * len(rows):
            values, order = codes.acts.view(-1, n).sort(dim=1, descending=True, stable=True)
            return _ranked(values, codes.feature_ids.view(-1, n).gather(1, order))
    return _ranked(*(rows @ table.T).topk(n, dim=1))  # rows with fewer positive products


def fastest_on(device: torch.device, otherwise: Kernels) -> Kernels:
    """On the CPU the kernels that train fastest there: they choose the same features."""
    return kernels_of("auto", "auto", "cpu") if device.type == "cpu" else otherwise


def _without_self(unit: Tensor, first: int, n: int) -> Ranked:
    """The n nearest of the rows first..first + _AT_ONCE - 1, themselves left out."""
    rows = unit[first : first + _AT_ONCE]
    found = largest_products(rows, unit, n + 1)
    own = np.arange(first, first + len(rows))[:, None]
    order = np.argsort(found.ids == own, axis=1, kind="stable")[:, :n]
    picked = np.arange(len(rows))[:, None], order
    return Ranked(found.ids[picked], found.values[picked])


def _ranked(values: Tensor, ids: Tensor) -> Ranked:
    return Ranked(ids.cpu().numpy(), values.cpu().numpy())
