"""`saebase finetune`: an SAE that its model predicts better with, and mistakes in one line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sae import SAE, FinetuneConfig
from tests.pipelines.conftest import Outcome, SmallRun

Saebase = Callable[..., Outcome]
SHORT = ("--n-tokens", 1500, "--batch-blocks", 8, "--lr", 0.003, "--log-every-steps", 1)
SHORT += ("--init-rows", 256, "--calibration-rows", 512, "--device", "cpu")


def test_an_sae_is_fine_tuned_and_once_more_nothing_is_left_to_do(
    saebase: Saebase, small_run: SmallRun, tmp_path: Path
) -> None:
    out = tmp_path / "tuned"
    command = ("finetune", small_run.sae, "--acts", small_run.acts, "--out", out, *SHORT)
    outcome = saebase(*command)
    assert outcome.status == 0, outcome.err
    assert "by kl" in outcome.out
    assert "KL to the untouched model" in outcome.out
    assert f"saebase evaluate {out}" in outcome.out
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["n_tokens"] >= 1500
    assert {"kl", "ce_clean", "ce_spliced", "mse"} <= lines[0].keys()
    before, after = SAE.load(small_run.sae), SAE.load(out)
    assert after.hookpoint == before.hookpoint
    assert not (after.W_dec == before.W_dec).all()
    again = saebase(*command)
    assert again.status == 0
    assert "KL to" not in again.out
    evaluated = saebase(
        "evaluate", out, "--acts", small_run.acts, "--n-lm-tokens", 200, "--batch-size", 64
    )
    assert evaluated.status == 0, evaluated.err


def test_every_setting_is_a_flag_with_its_description(saebase: Saebase) -> None:
    text = " ".join(saebase("finetune", "--help").out.split())
    for name in FinetuneConfig.model_fields:
        assert f"--{name.replace('_', '-')}" in text


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--objective", "mse"), ("--objective", "kl")),
        (("--n-tokens", -1), ("--n-tokens",)),
        (("--out", "SAE"), ("is the SAE that is fine-tuned", "another folder")),
    ],
)
def test_mistakes_are_one_line(
    saebase: Saebase,
    small_run: SmallRun,
    tmp_path: Path,
    flags: tuple[object, ...],
    told: tuple[str, ...],
) -> None:
    given = [small_run.sae if flag == "SAE" else flag for flag in flags]
    out = () if "--out" in flags else ("--out", tmp_path / "x")
    outcome = saebase("finetune", small_run.sae, "--acts", small_run.acts, *out, *given)
    assert outcome.status == 2
    assert len(outcome.err.strip().splitlines()) == 1
    for part in told:
        assert part in outcome.err
    assert not (tmp_path / "x" / "sae.safetensors").exists()
