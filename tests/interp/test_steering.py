"""Steering: what is added to the stream, where, and what is refused."""

import math

import pytest
import torch

from activation_cache import ActivationCache, LanguageModel
from interp import Ablate, Add, Clamp, SteeringError, compare, perplexity, steer, stream_edit
from sae import SAE, BatchTopKConfig, TrainConfig, train

HOOKPOINT = "layers.1.resid_post"
TEXT = "The river crosses the bridge. Paris admires"


@pytest.fixture(scope="module")
def sae(tiny_cache: ActivationCache, tmp_path_factory: pytest.TempPathFactory) -> SAE:
    """A small SAE that was trained on the tiny model for a moment."""
    config = TrainConfig(n_steps=30, batch_size=128, lr=3e-3)
    out = tmp_path_factory.mktemp("sae")
    return train(tiny_cache, HOOKPOINT, BatchTopKConfig(d_sae=64, k=5), config, out=out).sae


@pytest.fixture(scope="module")
def feature(sae: SAE) -> int:
    """A feature that is often active."""
    return int(sae.density.argmax())


def stream(lm: LanguageModel, text: str = TEXT) -> torch.Tensor:
    return lm.capture(text, [HOOKPOINT]).acts[HOOKPOINT]


def test_add_adds_the_dose_times_the_unit_along_the_direction(
    tiny_lm: LanguageModel, sae: SAE, feature: int
) -> None:
    x = stream(tiny_lm)
    edited = stream_edit(sae, {feature: Add(2.0)})(x)
    expected = x + 2.0 * sae.max_act[feature] * sae.W_dec[feature]
    torch.testing.assert_close(edited, expected)


def test_clamp_and_ablate_change_the_feature_and_keep_the_error(
    tiny_lm: LanguageModel, sae: SAE
) -> None:
    x = stream(tiny_lm)
    feature = int(sae.encode(x).sum((0, 1)).argmax())
    old = sae.encode(x)[..., feature]
    assert (old > 0).any()
    for operation, new in ((Clamp(3.0), 3.0 * sae.max_act[feature]), (Ablate(), torch.tensor(0.0))):
        edited = stream_edit(sae, {feature: operation})(x)
        expected = x + (new - old)[..., None] * sae.W_dec[feature]
        torch.testing.assert_close(edited, expected)
    # Where the feature is silent, ablating it changes nothing: the reconstruction error stays.
    ablated = stream_edit(sae, {feature: Ablate()})(x)
    assert torch.equal(ablated[old == 0], x[old == 0])


def test_doses_of_several_features_add_up(tiny_lm: LanguageModel, sae: SAE, feature: int) -> None:
    other = int((sae.max_act * (torch.arange(64) != feature)).argmax())
    x = stream(tiny_lm)
    both = stream_edit(sae, {feature: Add(1.0), other: Ablate()})(x)
    one = stream_edit(sae, {feature: Add(1.0)})(x) - x
    two = stream_edit(sae, {other: Ablate()})(x) - x
    torch.testing.assert_close(both, x + one + two, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("operations", [{}, {3: Add(0.0)}, {3: Add(0.0), 5: Add(-0.0)}])
def test_strength_zero_leaves_logits_and_text_bitwise(
    tiny_lm: LanguageModel, sae: SAE, operations: dict[int, Add]
) -> None:
    plain, text = tiny_lm.logits(TEXT), tiny_lm.generate(TEXT, max_new_tokens=8)
    with steer(tiny_lm, sae, operations):
        assert torch.equal(tiny_lm.logits(TEXT), plain)
        assert tiny_lm.generate(TEXT, max_new_tokens=8) == text


def test_generated_positions_are_steered_behind_the_kv_cache(
    tiny_lm: LanguageModel, sae: SAE, feature: int
) -> None:
    with steer(tiny_lm, sae, {feature: Add(4.0)}):
        steered = tiny_lm.generate(TEXT, max_new_tokens=12)
        ids = tiny_lm.token_batch(TEXT)[0]
        for _ in range(12):  # the same without a cache: the whole text anew for every token
            next_id = tiny_lm.logits(ids)[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, next_id], dim=1)
    assert steered == tiny_lm.tokenizer.decode(ids[0])
    assert steered != tiny_lm.generate(TEXT, max_new_tokens=12)


def test_steering_ends_with_the_context_however_it_ends(
    tiny_lm: LanguageModel, sae: SAE, feature: int
) -> None:
    plain = tiny_lm.logits(TEXT)

    def fail_inside() -> None:
        with steer(tiny_lm, sae, {feature: Add(3.0)}):
            assert not torch.equal(tiny_lm.logits(TEXT), plain)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail_inside()
    assert torch.equal(tiny_lm.logits(TEXT), plain)


def test_rows_of_massive_norm_are_left_alone(
    tiny_lm: LanguageModel, sae: SAE, feature: int
) -> None:
    x = stream(tiny_lm).clone()
    x[0, 0] *= 10 * sae.max_norm / x[0, 0].norm()
    for operation in (Add(2.0), Clamp(2.0), Ablate()):
        edited = stream_edit(sae, {feature: operation})(x)
        assert torch.equal(edited[0, 0], x[0, 0])


def test_bfloat16_streams_stay_bfloat16(sae: SAE, feature: int) -> None:
    x = torch.randn(1, 3, sae.d_model).bfloat16()
    edited = stream_edit(sae, {feature: Clamp(1.0)})(x)
    assert edited.dtype == torch.bfloat16
    assert not torch.equal(edited, x)


def test_compare_reports_both_texts_and_what_it_cost(
    tiny_lm: LanguageModel, sae: SAE, feature: int
) -> None:
    nothing = compare(tiny_lm, sae, {feature: Add(0.0)}, TEXT, max_new_tokens=6)
    assert nothing.baseline == nothing.steered
    assert nothing.kl == pytest.approx(0.0, abs=1e-6)
    much = compare(tiny_lm, sae, {feature: Add(4.0)}, TEXT, max_new_tokens=6)
    assert much.baseline == nothing.baseline == tiny_lm.generate(TEXT, max_new_tokens=6)
    assert much.kl > 0
    assert much.steered_perplexity > much.baseline_perplexity  # greedy text is the likelier one


def test_perplexity_is_that_of_the_continuation_alone(tiny_lm: LanguageModel) -> None:
    text = tiny_lm.generate(TEXT, max_new_tokens=5)
    ids = tiny_lm.token_batch(text)[0][0]
    log_probs = tiny_lm.logits(text)[0].double().log_softmax(-1)
    n = tiny_lm.token_batch(TEXT)[0].shape[1]
    losses = [-float(log_probs[i - 1, ids[i]]) for i in range(n, len(ids))]
    expected = math.exp(sum(losses) / len(losses))
    assert perplexity(tiny_lm, TEXT, text) == pytest.approx(expected, rel=1e-4)
    assert math.isnan(perplexity(tiny_lm, TEXT, TEXT))


def test_what_does_not_fit_is_refused_in_one_line(
    tiny_lm: LanguageModel, sae: SAE, feature: int
) -> None:
    def refusal(operations: dict[int, object], lm: LanguageModel = tiny_lm, at: str = "") -> str:
        steering = steer(lm, sae, operations, hookpoint=at or None)  # type: ignore[arg-type]
        with pytest.raises(SteeringError) as caught:
            steering.__enter__()
        message = str(caught.value)
        assert "\n" not in message
        return message

    assert refusal({64: Add(1.0)}) == "unknown feature 64: this SAE has features 0 to 63"
    assert "expected Add, Clamp or Ablate, got 1.5" in refusal({feature: 1.5})
    assert "unknown feature '12'" in refusal({"12": Add(1.0)})  # type: ignore[dict-item]
    assert "not finite" in refusal({feature: Add(math.inf)})
    assert "64 wide, this SAE expects 32" in refusal({feature: Add(1.0)}, at="layers.1.mlp_acts")
    other = LanguageModel(tiny_lm.model, tiny_lm.tokenizer, name="other", revision="r2")
    assert "trained on tiny-llama" in refusal({feature: Add(1.0)}, lm=other)


def test_a_feature_without_a_unit_is_refused(sae: SAE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sae, "max_act", sae.max_act * (torch.arange(64) != 7))
    with pytest.raises(SteeringError, match="feature 7 was never active"):
        stream_edit(sae, {7: Add(1.0)})
