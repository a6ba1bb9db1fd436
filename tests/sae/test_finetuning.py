"""Fine-tuning through a model: its predictions come nearer, exactly resumable, or a clear no."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from activation_cache import ActivationCache, LanguageModel
from sae import (
    SAE,
    BatchTopKConfig,
    ConfigError,
    FinetuneConfig,
    FinetuneMetrics,
    ResumeMismatchError,
    SourceError,
    TensorSource,
    TrainConfig,
    TrainingStoppedError,
    finetune,
    train,
)
from sae.architectures import config_of
from sae.atomic_files import held
from sae.config import SAEConfig
from sae.errors import NonFiniteError, RunInUseError
from sae.evaluating.splicing import SplicedLoss, spliced_losses
from sae.wiring import transcoder, wiring_of

HOOKPOINT = "layers.1.resid_post"
TRAINED = TrainConfig(
    n_steps=150, batch_size=128, lr=3e-3, init_rows=512, calibration_rows=1024, device="cpu"
)
SHORT = FinetuneConfig(
    n_tokens=6_000,
    batch_blocks=16,
    lr=3e-3,
    init_rows=512,
    calibration_rows=1024,
    checkpoint_every_steps=4,
    log_every_steps=1,
    device="cpu",
)
TIMES = ("tokens_per_s", "elapsed_s")


@pytest.fixture(scope="module")
def trained(tiny_cache: ActivationCache, tmp_path_factory: pytest.TempPathFactory) -> SAE:
    out = tmp_path_factory.mktemp("trained") / "run"
    return train(tiny_cache, HOOKPOINT, BatchTopKConfig(d_sae=64, k=4), TRAINED, out=out).sae


def losses(sae: SAE, lm: LanguageModel, cache: ActivationCache, split: str) -> SplicedLoss:
    found = spliced_losses(
        lm,
        cache,
        wiring_of(HOOKPOINT),
        {"spliced": sae},
        max_norm=sae.max_norm,
        n_tokens=2_000,
        batch_size=32,
        split=split,  # type: ignore[arg-type]
    )
    return found.replaced["spliced"]


def logged(folder: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


@pytest.mark.parametrize("objective", ["kl", "ce"])
def test_predictions_of_the_spliced_model_come_nearer(
    trained: SAE,
    tiny_lm: LanguageModel,
    tiny_cache: ActivationCache,
    tmp_path: Path,
    objective: str,
) -> None:
    before = trained.state_dict()["W_dec"].clone()
    told: list[FinetuneMetrics] = []
    config = SHORT.model_copy(update={"objective": objective, "n_tokens": 12_000})
    done = finetune(
        trained, tiny_lm, tiny_cache, config, out=tmp_path / "x", on_metrics=told.append
    )
    assert torch.equal(trained.W_dec, before)
    old, new = (losses(each, tiny_lm, tiny_cache, "train") for each in (trained, done.sae))
    if objective == "kl":
        assert new.kl < 0.9 * old.kl
        heldout = [losses(e, tiny_lm, tiny_cache, "heldout").kl for e in (trained, done.sae)]
        assert heldout[1] < heldout[0]
    else:
        assert new.cross_entropy < old.cross_entropy - 0.05
    assert [line.step for line in told] == list(range(1, done.steps + 1))
    assert done.n_tokens >= 12_000
    assert done.n_tokens == told[-1].n_tokens
    assert told[-1].l0 == pytest.approx(4, rel=0.02)
    assert told[-1].ce_clean > 0


def test_what_is_saved_is_an_sae_of_unit_rows_that_says_how_it_was_made(
    trained: SAE, tiny_lm: LanguageModel, tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    out = tmp_path / "x"
    config = SHORT.model_copy(update={"n_tokens": 1_000})
    done = finetune(trained, tiny_lm, tiny_cache, config, out=out)
    loaded = SAE.load(out)
    assert all(torch.equal(a, loaded.state_dict()[n]) for n, a in done.sae.state_dict().items())
    torch.testing.assert_close(loaded.W_dec.norm(dim=1), torch.ones(64))
    assert loaded.origin.provenance["finetuning"]["objective"] == "kl"
    assert loaded.origin.provenance["model"] == trained.origin.provenance["model"]
    assert loaded.hookpoint == HOOKPOINT
    assert not loaded.W_dec.requires_grad
    assert float(loaded.density.sum()) == pytest.approx(4, rel=0.1)
    again = finetune(trained, tiny_lm, tiny_cache, config, out=out)  # returns at once
    assert again.steps == done.steps
    assert again.n_tokens == done.n_tokens
    with pytest.raises(ResumeMismatchError, match=r"lr=0\.003 \(now 0\.001\)"):
        finetune(trained, tiny_lm, tiny_cache, config.model_copy(update={"lr": 1e-3}), out=out)


@pytest.mark.parametrize("stop_at", [1, 6])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    trained: SAE, tiny_lm: LanguageModel, tiny_cache: ActivationCache, tmp_path: Path, stop_at: int
) -> None:
    config = SHORT.model_copy(update={"n_tokens": 3_000})
    whole = finetune(trained, tiny_lm, tiny_cache, config, out=tmp_path / "whole")
    cut, n_asked = tmp_path / "cut", 0

    def should_stop() -> bool:
        nonlocal n_asked
        n_asked += 1
        return n_asked == stop_at

    with pytest.raises(TrainingStoppedError, match=f"stopped after step {stop_at}"):
        finetune(trained, tiny_lm, tiny_cache, config, out=cut, should_stop=should_stop)
    done = finetune(trained, tiny_lm, tiny_cache, config, out=cut)
    assert done.steps == whole.steps > 6
    weights = [(each / "sae.safetensors").read_bytes() for each in (whole.path, cut)]
    assert weights[0] == weights[1]
    assert logged(cut) == logged(whole.path)
    assert len(list((cut / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize("name", ["topk", "jumprelu", "gated", "relu", "matryoshka"])
def test_other_architectures_keep_their_l0(
    tiny_lm: LanguageModel, tiny_cache: ActivationCache, tmp_path: Path, name: str
) -> None:
    settings = {"k": 4} if "k" in config_of(name, _least(name)).model_dump() else {}
    config = config_of(name, {"d_sae": 64, **settings})
    sae = train(tiny_cache, HOOKPOINT, config, TRAINED, out=tmp_path / "run").sae
    told: list[FinetuneMetrics] = []
    done = finetune(sae, tiny_lm, tiny_cache, SHORT, out=tmp_path / "x", on_metrics=told.append)
    old, new = (losses(each, tiny_lm, tiny_cache, "train").kl for each in (sae, done.sae))
    assert new < old
    assert told[-1].l0 == pytest.approx(told[0].l0, rel=0.25)


def _least(name: str) -> dict[str, int]:
    return {"d_sae": 64, "k": 4} if name in ("topk", "matryoshka") else {"d_sae": 64}


def test_rows_of_massive_norm_and_of_other_splits_stay_as_they_are(
    trained: SAE, tiny_lm: LanguageModel, tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    """Without rows to put anything in the place of, nothing can be learnt, and that is said."""
    narrow = SAE(trained.config, 32, trained.origin.model_copy(update={"max_norm": 1e-6}))
    narrow.load_state_dict(trained.state_dict())
    config = SHORT.model_copy(update={"max_skipped_batches": 2})
    with pytest.raises(NonFiniteError, match="held no row that the SAE is for"):
        finetune(narrow, tiny_lm, tiny_cache, config, out=tmp_path / "x")


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ("transcoder", ConfigError, "only an SAE that reconstructs the place it reads"),
        ("nowhere", ConfigError, "doesn't say where it was trained"),
        (
            "width",
            SourceError,
            r"holds d_model=7 at layers.1.resid_post \(unknown model\); this SAE expects 32",
        ),
        ("tensor", SourceError, "no train tokens to run a model on"),
    ],
)
def test_what_can_not_be_fine_tuned_is_refused_in_one_line(
    trained: SAE,
    tiny_lm: LanguageModel,
    tmp_path: Path,
    wrong: str,
    error: type[Exception],
    message: str,
) -> None:
    origins = {
        "transcoder": {"wiring": transcoder("layers.0.resid_post", HOOKPOINT)},
        "nowhere": {"hookpoint": None},
    }
    sae = SAE(trained.config, 32, trained.origin.model_copy(update=origins.get(wrong, {})))
    sae.load_state_dict(trained.state_dict())
    source = TensorSource(torch.randn(900, 7 if wrong == "width" else 32))
    with pytest.raises(error, match=message) as caught:
        finetune(sae, tiny_lm, source, SHORT, out=tmp_path / "x")
    assert "\n" not in str(caught.value)


def test_a_folder_in_use_and_another_sae_are_refused(
    trained: SAE, tiny_lm: LanguageModel, tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    call: Callable[[SAE], object] = lambda sae: finetune(  # noqa: E731
        sae, tiny_lm, tiny_cache, SHORT.model_copy(update={"n_tokens": 500}), out=tmp_path
    )
    with held(tmp_path / ".lock"), pytest.raises(RunInUseError):
        call(trained)
    call(trained)
    other: SAEConfig = trained.config
    twin = SAE(other, 32, trained.origin)
    twin.load_state_dict(trained.state_dict())
    twin.b_enc[0] += 1
    with pytest.raises(ResumeMismatchError, match="sae_sha256"):
        call(twin)
