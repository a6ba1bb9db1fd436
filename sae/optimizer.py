"""Adam over an SAE's parameters, through the kernels, with its state in tensors of its own.

Bytes a parameter of the two matrices, which are all but a thousandth of an SAE (the CUDA tier
makes no copy of them that outlives the product):

                    weights  gradient  mean  square  total
    adam               4        4       4      4      16
    adam_lean          4        2       2     4/d      8

In the encoder's product a float16 copy of W_enc, 1 on average, stands in for the gradients.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sae.kernels import AdamStep, Kernels

# Parameters whose rows have norm 1 after each step.
UNIT_ROWS = ("W_dec",)


class Adam:
    """parameters: by name, updated in place. beta1, beta2: decay of mean and squared gradients.

    is_lean: matrices have their mean gradient in bfloat16 and one second moment a row (a feature's
    weights grow alike, so little is lost); their gradients are bfloat16 too. Vectors are few.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        kernels: Kernels,
        *,
        beta1: float,
        beta2: float,
        is_lean: bool = False,
    ) -> None:
        self._parameters, self._kernels = dict(parameters), kernels
        self._betas = beta1, beta2
        self._lean = {name for name, each in parameters.items() if is_lean and each.dim() == 2}
        self._means = {name: self._empty_mean(name) for name in parameters}
        self._squares = {name: self._empty_square(name) for name in parameters}
        self.n_steps = 0

    def step_(self, gradients: Mapping[str, Tensor], lr: float, grad_scale: float) -> None:
        """One step on the parameters that have a gradient, which grad_scale multiplies."""
        self.n_steps += 1
        step = AdamStep(lr, *self._betas, self.n_steps, grad_scale)
        for name, gradient in gradients.items():
            update = self._kernels.adam_lean_ if name in self._lean else self._kernels.adam_
            update(
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

    def _empty_mean(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        dtype = torch.bfloat16 if name in self._lean else parameter.dtype
        return torch.zeros_like(parameter, dtype=dtype)

    def _empty_square(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        return torch.zeros_like(parameter[:, 0] if name in self._lean else parameter)
