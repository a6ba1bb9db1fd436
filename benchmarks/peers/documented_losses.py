"""The loss that each trainer documents, in float64, for autograd: what its gradients should be.

    pre_acts = (x - b_dec) W_enc + b_enc,  acts: the largest of relu(pre_acts)
    e   = x - x_hat,  x_hat = acts W_dec + b_dec
    aux = |e - e_hat|^2,  e a constant, e_hat from the k_aux = d_model / 2 largest dead features

ours                 (|e|^2 + s/32 aux) / (batch V)      V: the data's variance, a constant
eai-sparsify         (|e|^2 + s/32 aux) / sum|x - mean|^2
dictionary-learning  |e|^2 / batch + aux / (32 sum|e - mean e|^2)
sae-lens             (|e|^2 + s aux) / batch             pre-activations times |W_dec|, acts over it

s = min(1, n_dead / k_aux). SAELens' aux takes pre-activations below zero too.
Read in: sparsify 1.3.3 sparse_coder.py and trainer.py, dictionary_learning 0.1.0 trainers/top_k.py,
sae-lens 6.54.12 saes/topk_sae.py, sae/gradients.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

NAMES = ("W_enc", "W_dec", "b_enc", "b_dec")


@dataclass(frozen=True)
class Problem:
    """One step: x [batch, d_model]; weights feature by feature; which features are dead.

    trainer: whose loss. variance: V of ours.
    """

    trainer: str
    architecture: str
    k: int
    rescales: bool
    x: Tensor
    weights: Mapping[str, Tensor]
    dead_ids: Tensor
    variance: float

    def gradients(self, *, auxk: bool) -> dict[str, Tensor]:
        """Of the four weights, in float64."""
        leaves = {name: self.weights[name].clone().requires_grad_() for name in NAMES}
        self._loss(leaves, auxk).backward()
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    def _loss(self, w: Mapping[str, Tensor], auxk: bool) -> Tensor:
        x, norms = self.x, w["W_dec"].norm(dim=1) if self.rescales else 1.0
        pre_acts = ((x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]) * norms  # [batch, d_sae]
        acts = self._largest(pre_acts.relu())
        e = x - ((acts / norms) @ w["W_dec"] + w["b_dec"])
        loss = e.square().sum() / self._divisor()
        if not auxk:
            return loss
        k_aux = min(x.shape[1] // 2, len(self.dead_ids))
        dead = pre_acts[:, self.dead_ids]
        kept = _largest_of_rows(dead if self.trainer == "sae-lens" else dead.relu(), k_aux)
        norms = norms[self.dead_ids] if self.rescales else 1.0
        e_hat = (kept / norms) @ w["W_dec"][self.dead_ids]
        return loss + (e.detach() - e_hat).square().sum() * self._aux_factor(e.detach())

    def _largest(self, acts: Tensor) -> Tensor:
        if self.architecture == "topk":
            return _largest_of_rows(acts, self.k)
        flat = acts.flatten()[None]
        return _largest_of_rows(flat, self.k * len(acts)).view_as(acts)

    def _divisor(self) -> float:
        if self.trainer == "saebase":
            return len(self.x) * self.variance
        if self.trainer == "eai-sparsify":
            return float((self.x - self.x.mean(0)).square().sum())
        return len(self.x)

    def _aux_factor(self, e: Tensor) -> float:
        if self.trainer == "dictionary-learning":
            return 1 / 32 / float((e - e.mean(0)).square().sum())
        few_dead = min(1.0, len(self.dead_ids) / (self.x.shape[1] // 2))
        return few_dead / self._divisor() * (1.0 if self.trainer == "sae-lens" else 1 / 32)


def _largest_of_rows(acts: Tensor, k: int) -> Tensor:
    values, ids = acts.topk(k, dim=1)
    return torch.zeros_like(acts).scatter(1, ids, values)
