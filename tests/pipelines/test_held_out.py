"""Held-out figures are refused where they might not be."""

import pytest

from activation_cache import ActivationCache
from sae import SAE, EvalConfig, SAEError, evaluate
from tests.pipelines.conftest import SmallRun


def test_a_split_that_training_did_not_know_is_refused(small_run: SmallRun) -> None:
    sae = SAE.load(small_run.sae)
    config = EvalConfig(batch_size=64)
    assert evaluate(sae, ActivationCache.open(small_run.acts), None, config).n_rows > 0
    other = ActivationCache.open(small_run.acts, heldout_fraction=0.5)
    with pytest.raises(SAEError, match=r"heldout_fraction=0\.5, this SAE was trained with 0\.1"):
        evaluate(sae, other, None, config)
