"""A user's mistakes in training: one line with the value and the way out, nothing overwritten."""

import fcntl
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from activation_cache import ActivationCache
from sae import SAE
from tests.pipelines.conftest import Outcome, SmallRun, config_text, refused
from tests.pipelines.test_bad_input import spoilt

Saebase = Callable[..., Outcome]
PLACES = ("layers.1.resid_post", "layers.1.mlp_out")


@pytest.fixture
def train(tiny_cache: ActivationCache, tmp_path: Path) -> list[object]:
    """A command that works, to be added to."""
    return [
        *("train", "--acts", tiny_cache.path, "--out", tmp_path / "sae", "--d-sae", 64),
        *("--n-steps", 3, "--batch-size", 64, "--init-rows", 64, "--calibration-rows", 128),
    ]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--k", 65], ("k=65 is more than d_sae=64", "lower k")),
        (["--k", 0], ("--k:", "greater than 0", "got 0")),
        (["--k", 4, "--k-start", 2], ("k_start=2", "k=4")),
        (
            ["--k", 4, "--architecture", "matryoshka", "--prefixes", 16, 8, 64],
            ("prefixes=(16, 8, 64) don't nest", "ascending", "d_sae=64"),
        ),
        (
            ["--k", 4, "--architecture", "matryoshka", "--prefixes", 16, 32],
            ("prefixes=(16, 32) don't nest", "d_sae=64"),
        ),
        (
            ["--k", 4, "--architecture", "hierarchical_topk", "--ks", 1, 2],
            ("ks=(1, 2)", "the last k=4"),
        ),
        (
            ["--k", 4, "--prefixes", 16, 64],
            ("prefixes is a setting of matryoshka", "batch_topk has", "leave prefixes out"),
        ),
        (
            ["--architecture", "relu", "--k", 4],
            ("k is a setting of batch_topk, topk, matryoshka, hierarchical_topk", "relu has"),
        ),
        (["--architecture", "jumprelu", "--target-l0", 65], ("target_l0=65", "d_sae=64")),
        (["--architecture", "jumprely", "--k", 4], ("jumprely", "jumprelu")),
        (["--k", 4, "--batch-size", 10**6], ("fewer than batch_size=1000000", "lower batch_size")),
        (["--k", 4, "--reads", PLACES[0]], ("--writes is missing",)),
        (["--k", 4, "--skip"], ("--skip is for transcoders",)),
        (["--k", 4, "--reads", PLACES[0], "--writes", PLACES[0]], ("both are", PLACES[0])),
        (["--k", 4, "--hookpoints", PLACES[0]], ("two places or more", PLACES[0])),
        (
            ["--k", 4, "--hookpoint", PLACES[0], "--hookpoints", *PLACES],
            ("--hookpoint and --hookpoints name different things",),
        ),
        (["--k", 4, "--reads", PLACES[0], "--writes", "layers.9.mlp_out"], ("layers.9.mlp_out",)),
        (["--k", 4, "--n-tokens", 64], ("n_steps=3 and n_tokens=64", "give one")),
        (["--sweep", "k=2,65"], ("k=65 is more than d_sae=64",)),
        (["--sweep", "k"], ("--sweep k", "k=16,32,64")),
        (["--sweep", "k="], ("sweep of k", "list of values")),
        (["--sweep", "k=2,2"], ("2 stands twice",)),
        (["--sweep", "k=2", "--sweep", "k=4"], ("--sweep k is given twice",)),
        (["--sweep", "batch_size=32,64", "--k", 2], ("batch_size can't be swept", "share")),
        (["--sweep", "kk=2,4"], ("no architecture has a setting 'kk'", "did you mean k?")),
        (["--sweep", "prefixes=[8,64]", "--k", 2], ("prefixes is a setting of matryoshka",)),
        (["--sweep", "architecture=topk,tpk", "--k", 2], ("unknown architecture 'tpk'", "topk")),
        (["--sweep", "lr=fast", "--k", 2], ("--lr:", "fast")),
        (
            ["--sweep", "hookpoint=layers.1.mlp_out", "--hookpoints", *PLACES, "--k", 2],
            ("sweep of hookpoint",),
        ),
        (["--k", 4, "--plot", "x.pdf"], ("--plot x.pdf", ".html or .png or .svg")),
        (["--k", 4, "--plot", "/no/such/x.html"], ("no folder /no/such",)),
    ],
)
def test_impossible_settings(
    saebase: Saebase, train: list[object], tmp_path: Path, flags: list[object], named: tuple[str]
) -> None:
    needs_place = not any(str(f).startswith(("--reads", "--hookpoint")) for f in flags)
    place = ["--hookpoint", PLACES[0]] if needs_place else []
    given = {str(flag) for flag in flags if str(flag).startswith("--")}
    line, at = list[object](), 0
    while at < len(train):  # a flag that is given now replaces the command's own
        if str(train[at]) in given and str(train[at]) != "--sweep":
            at += 2
            continue
        line.append(train[at])
        at += 1
    refused(saebase(*line, *place, *flags), *named)
    assert not list((tmp_path / "sae").rglob("*.safetensors"))


def test_a_run_of_other_settings_lists_what_differs(
    saebase: Saebase, train: list[object], tmp_path: Path
) -> None:
    command = [*train, "--hookpoint", PLACES[0]]
    assert saebase(*command, "--k", 4).status == 0
    before = (tmp_path / "sae" / "sae.safetensors").read_bytes()
    outcome = saebase(*command, "--k", 5, "--lr", 0.5)
    refused(outcome, "sae.k=4 (now 5)", "train.lr=", "another folder")
    other = [PLACES[1] if word == PLACES[0] else word for word in command]
    refused(saebase(*other, "--k", 4), "wiring.reads", PLACES[0], PLACES[1])
    assert (tmp_path / "sae" / "sae.safetensors").read_bytes() == before


def test_a_folder_in_use(saebase: Saebase, train: list[object], tmp_path: Path) -> None:
    (tmp_path / "sae").mkdir()
    descriptor = os.open(tmp_path / "sae" / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        outcome = saebase(*train, "--hookpoint", PLACES[0], "--k", 4)
    finally:
        os.close(descriptor)
    refused(outcome, "another process is training in", tmp_path / "sae")
    assert not (tmp_path / "sae" / "metrics.jsonl").exists()


def test_a_learning_rate_that_diverges(
    saebase: Saebase, train: list[object], tmp_path: Path
) -> None:
    flags = ("--hookpoint", PLACES[0], "--k", 4, "--lr", 300, "--warmup-steps", 0)
    outcome = saebase(*spoilt(train, "--n-steps", 40), *flags)
    refused(outcome, "training diverged at step", "the loss is", "lower lr=300")
    assert not (tmp_path / "sae" / "sae.safetensors").exists()


def test_a_cache_of_another_width(saebase: Saebase, small_run: SmallRun, tmp_path: Path) -> None:
    sae = SAE.load(small_run.sae)
    wide = SAE(sae.config, 2 * sae.d_model, sae.origin)
    wide.save(tmp_path / "wide")
    outcome = saebase("evaluate", tmp_path / "wide", "--acts", small_run.acts, "--no-with-model")
    refused(outcome, str(2 * sae.d_model), str(sae.d_model))
    assert not (tmp_path / "wide" / "report.json").exists()


def test_a_missing_wandb_key_is_told_before_training(
    saebase: Saebase, train: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    command = [*train, "--hookpoint", PLACES[0], "--k", 4, "--wandb-project", "p"]
    outcome = saebase(*command)
    refused(outcome, "no key for api.wandb.ai", "WANDB_API_KEY", "WANDB_MODE=offline")
    assert not (tmp_path / "sae").exists()
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(saebase(*command), "pip install 'saebase[wandb]'")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("sae: {d_sae: 64, k: 4, prefixes: [8, 64]}", ("prefixes is a setting of matryoshka",)),
        ("sae: {architecture: relu, d_sae: 64, k: 4}", ("k is a setting of batch_topk",)),
        ("sweep: {k: 3}", ("sweep",)),
        ("sweep: {batch_size: [3]}", ("batch_size can't be swept",)),
        ("sweep: {hookpoint: [a]}", ("hookpoints",)),
        ("wiring: {reads: [a, b]}", ("one of hookpoints", "wiring")),
        ("wiring: {read: [a, b]}", ("read", "reads")),
    ],
)
def test_configurations(
    saebase: Saebase,
    small_model: Path,
    small_text: Path,
    tmp_path: Path,
    line: str,
    named: tuple[str],
) -> None:
    lines = config_text(small_model, small_text, tmp_path / "out").splitlines()
    key = line.split(":")[0]
    config = tmp_path / "config.yaml"
    config.write_text("\n".join([one for one in lines if one.split(":")[0] != key] + [line]))
    refused(saebase("run", config), config, *named)
    assert not (tmp_path / "out").exists()


def test_reports_of_what_is_no_run(saebase: Saebase, small_run: SmallRun, tmp_path: Path) -> None:
    refused(saebase("report", tmp_path / "none"), "none", "no folder")
    refused(saebase("report", tmp_path), tmp_path, "metrics.jsonl", "folder of a run")
    (tmp_path / "metrics.jsonl").write_text("")
    refused(saebase("report", tmp_path), "no line yet")
    refused(saebase("report", small_run.sae, "--out", tmp_path / "r.doc"), "r.doc", ".html")
    (tmp_path / "sweep.json").write_text("{")
    refused(saebase("report", tmp_path), "sweep.json", "remove it")
    assert not list(tmp_path.glob("*.html"))


def test_one_process_verbs_refuse_several(
    saebase: Saebase, small_run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(saebase("run", small_run.config), "for one process", "2 were started")
