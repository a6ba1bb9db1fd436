"""What CUDA's float32 products round to is set for a block, and put back."""

from __future__ import annotations

import pytest
import torch

from sae.products import float32_products

MATMUL = torch.backends.cuda.matmul


@pytest.mark.parametrize("before", ["ieee", "tf32"])
def test_precision_of_products_is_put_back(before: str) -> None:
    found = MATMUL.fp32_precision
    MATMUL.fp32_precision = before
    try:
        with float32_products("tf32"):
            assert MATMUL.fp32_precision == "tf32"
            with float32_products("ieee"):
                assert MATMUL.fp32_precision == "ieee"
            assert MATMUL.fp32_precision == "tf32"
        assert MATMUL.fp32_precision == before
        with pytest.raises(ZeroDivisionError), float32_products("tf32"):
            raise ZeroDivisionError
        assert MATMUL.fp32_precision == before
    finally:
        MATMUL.fp32_precision = found
