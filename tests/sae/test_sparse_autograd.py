"""Gradients through sparse codes equal those of the same equations written densely."""

from __future__ import annotations

import pytest
import torch

from sae import SAE, BatchTopKConfig, Origin
from sae.architectures import config_of
from sae.config import SAEConfig
from sae.sparse_autograd import reconstructed
from sae.wiring import Wiring, transcoder

CONFIGS = [
    BatchTopKConfig(d_sae=40, k=3),
    config_of("topk", {"d_sae": 40, "k": 3}),
    config_of("jumprelu", {"d_sae": 40}),
    config_of("relu", {"d_sae": 40}),
]


def random_sae(config: SAEConfig, wiring: Wiring | None = None, d_out: int = 8) -> SAE:
    torch.manual_seed(0)
    sae = SAE(config, 8, Origin(wiring=wiring), d_out=d_out)
    for tensor in sae.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape) / 2)
    sae.threshold.fill_(0.3)
    return sae


@pytest.mark.parametrize("wiring", [None, transcoder("a", "b")], ids=["sae", "transcoder"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_gradients_equal_those_of_dense_autograd(config: SAEConfig, wiring: Wiring | None) -> None:
    sae = random_sae(config, wiring, d_out=8 if wiring is None else 5)
    x = torch.randn(12, 8, requires_grad=True)
    target = torch.randn(12, sae.d_out)
    sae.requires_grad_()
    codes = sae.encode_sparse(x)
    x_hat = reconstructed(sae, x, codes)
    (x_hat.cos() * target).sum().backward()
    grads = {name: each.grad for name, each in (*sae.weights._asdict().items(), ("x", x))}
    for leaf in (*sae.parameters(), x):
        leaf.grad = None
    is_active = codes.to_dense(40) > 0
    centred = x - sae.b_dec if wiring is None else x
    acts = (centred @ sae.W_enc_rows.T + sae.b_enc) * is_active
    ((acts @ sae.W_dec + sae.b_dec).cos() * target).sum().backward()
    torch.testing.assert_close(x_hat, acts @ sae.W_dec + sae.b_dec)
    for name, expected in (*sae.weights._asdict().items(), ("x", x)):
        assert grads[name] is not None
        torch.testing.assert_close(grads[name], expected.grad, msg=name)
    assert 0 < codes.nnz < is_active.numel()


def test_rows_without_an_active_feature_have_gradients_too() -> None:
    sae = random_sae(CONFIGS[0])
    sae.threshold.fill_(1e9)
    sae.requires_grad_()
    x = torch.randn(3, 8)
    sae(x).sum().backward()
    assert torch.equal(sae.b_dec.grad, torch.full((8,), 3.0))  # type: ignore[arg-type]
    assert not sae.W_dec.grad.any()  # type: ignore[union-attr]
