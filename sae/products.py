"""What CUDA's float32 matrix products round to inside: a choice made where each is made.

A product in plain float32 runs outside the tensor cores, far slower than in TF32 (which keeps 10
bits of each factor). Torch's global setting decides unless somebody says otherwise, and neither is
right throughout:

- What decides which features are active is "ieee", whatever the setting: the selection promises
  float32's result. The fast tiers need it for doubtful rows alone.
- AuxK's dense products over dead features and OrtSAE's cosines are "tf32": they are gradients of
  a few per cent of the loss, and would cost more than the whole step.
- Single matrices by vectors, the skip connection's product, and evaluation keep torch's setting.

On a CPU all of this does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch


@contextmanager
def float32_products(inside: Literal["ieee", "tf32"]) -> Iterator[None]:
    """CUDA's float32 matrix products round to this inside, for as long as the block lasts."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = inside
    try:
        yield
    finally:
        matmul.fp32_precision = before
