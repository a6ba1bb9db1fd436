"""Adam over an SAE's parameters, through the kernels, with its state in tensors of its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sae.kernels import AdamStep, Kernels

# Parameters whose rows have norm 1 after each step.
UNIT_ROWS = ("W_dec",)


class Adam:
    """parameters: by name, updated in place. beta1, beta2: decay of mean and squared gradients."""

    def __init__(
        self, parameters: Mapping[str, Tensor], kernels: Kernels, *, beta1: float, beta2: float
    ) -> None:
        self._parameters, self._kernels = dict(parameters), kernels
        self._betas = beta1, beta2
        self._means = {name: torch.zeros_like(each) for name, each in parameters.items()}
        self._squares = {name: torch.zeros_like(each) for name, each in parameters.items()}
        self.n_steps = 0

    def step_(self, gradients: Mapping[str, Tensor], lr: float, grad_scale: float) -> None:
        """One step on the parameters that have a gradient, which grad_scale multiplies."""
        self.n_steps += 1
        step = AdamStep(lr, *self._betas, self.n_steps, grad_scale)
        for name, gradient in gradients.items():
            self._kernels.adam_(
                self._parameters[name],
                gradient,
                self._means[name],
                self._squares[name],
                step,
                unit_rows=name in UNIT_ROWS,
            )

    def tensors(self) -> dict[str, Tensor]:
        """Its state by name, for a checkpoint."""
        means = {f"mean.{name}": each for name, each in self._means.items()}
        return means | {f"square.{name}": each for name, each in self._squares.items()}

    def load_(self, tensors: Mapping[str, Tensor], n_steps: int) -> None:
        """Take up the state that tensors() gave."""
        for name, each in self.tensors().items():
            each.copy_(tensors[name])
        self.n_steps = n_steps
