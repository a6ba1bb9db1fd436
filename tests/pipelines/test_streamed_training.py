"""Training straight from a model: the same SAE after a stop, the budget kept, errors in a line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from activation_cache import ActivationStream, LanguageModel, harvest
from sae import SAE, BatchTopKConfig, TrainConfig, TrainingStoppedError, evaluate, train

from .conftest import Outcome, SmallRun

HOOKPOINT = "layers.1.resid_post"
SMALL: dict[str, Any] = {
    "hookpoints": HOOKPOINT,
    "ctx_len": 16,
    "batch_blocks": 4,
    "shard_bytes": 16_384,
    "storage_dtype": "float32",
}
SAE_CONFIG = BatchTopKConfig(d_sae=64, k=4)
TRAINING = TrainConfig(
    n_steps=60, batch_size=48, lr=1e-3, checkpoint_every_steps=17, init_rows=64, device="cpu"
)


def _trained(
    lm: LanguageModel, texts: list[str], folder: Path, stop_at: int | None = None, **budget: int
) -> SAE:
    steps = iter(range(1, 10_000))
    with ActivationStream.open(lm, texts, folder=folder / "stream", **SMALL, **budget) as stream:
        return train(
            stream,
            HOOKPOINT,
            SAE_CONFIG,
            TRAINING,
            out=folder / "run",
            should_stop=lambda: next(steps) == stop_at,
        ).sae


@pytest.mark.parametrize("budget", [{"max_disk_bytes": 100_000}, {"buffer_bytes": 200_000}])
def test_stopped_run_ends_with_the_same_weights(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path, budget: dict[str, int]
) -> None:
    whole = _trained(tiny_lm, tiny_corpus, tmp_path / "whole", **budget)
    for stop_at in (3, 20, 30):
        with pytest.raises(TrainingStoppedError):
            _trained(tiny_lm, tiny_corpus, tmp_path / "stopped", stop_at, **budget)
    stopped = _trained(tiny_lm, tiny_corpus, tmp_path / "stopped", **budget)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, stopped.state_dict()[name]), name
    assert whole.origin.n_tokens_trained == 60 * 48


def test_streamed_sae_is_evaluated_on_a_cache_of_the_text(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    sae = _trained(tiny_lm, tiny_corpus, tmp_path, buffer_bytes=200_000)
    cache = harvest(tiny_lm, tiny_corpus, out=tmp_path / "acts", n_tokens=1_000, **SMALL)
    report = evaluate(sae, cache, tiny_lm)
    assert report.reconstruction.fvu < next(b for b in report.baselines).reconstruction.fvu


def test_command_trains_from_a_model(
    saebase: Callable[..., Outcome], small_run: SmallRun, tmp_path: Path
) -> None:
    flags = ["--model", small_run.model, "--dataset", small_run.text, "--hookpoint", HOOKPOINT]
    flags += ["--harvest.ctx-len", 16, "--harvest.shard-bytes", 16_384, "--max-disk", "100kB"]
    flags += ["--d-sae", 64, "--k", 4, "--n-steps", 20, "--batch-size", 32, "--out", tmp_path / "r"]
    outcome = saebase("train", *flags)
    assert outcome.status == 0, outcome.err
    assert SAE.load(tmp_path / "r").d_sae == 64
    assert "next: saebase harvest --model" in outcome.out
    assert not list((tmp_path / "r" / "stream").glob("shards/*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-disk", "12 parsecs"], "expected a size such as 20GB or 500MB"),
        (["--max-disk", "1MB"], "max_disk=1,000,000 bytes is less than two shards of 200,000,000"),
        (
            ["--max-disk", "1GB"],
            "text for --model has no end: say how long to train, with --n-tokens",
        ),
    ],
)
def test_bad_budgets_are_told_in_a_line(
    saebase: Callable[..., Outcome],
    small_run: SmallRun,
    tmp_path: Path,
    flags: list[str],
    message: str,
) -> None:
    where = ["--model", small_run.model, "--dataset", small_run.text, "--hookpoint", HOOKPOINT]
    sizes = ["--d-sae", 64, "--k", 4, "--out", tmp_path / "r"]
    sizes += ["--n-steps", 10] if flags != ["--max-disk", "1GB"] else []
    outcome = saebase("train", *where, *sizes, *flags)
    assert outcome.status == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
