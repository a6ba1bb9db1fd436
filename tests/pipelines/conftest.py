"""A whole small run, made once through the command line, from files alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pipelines.cli import run


class Outcome(NamedTuple):
    """What a command did: exit status, what it printed, what it said on stderr (one line)."""

    status: int
    out: str
    err: str


def refused(outcome: Outcome, *named: object) -> None:
    """One line on stderr that holds everything in `named`, and exit status 2."""
    assert outcome.status == 2, outcome
    assert outcome.err.startswith("saebase: ")
    assert outcome.err.count("\n") == 1, outcome.err
    for value in named:
        assert str(value) in outcome.err, outcome.err
    assert "Traceback" not in outcome.err


class SmallRun(NamedTuple):
    """Files of a finished run: model folder, text, configuration, and what was made of them."""

    model: Path
    text: Path
    config: Path
    acts: Path
    sae: Path
    db: Path


@pytest.fixture
def saebase(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs one command as the shell would."""

    def call(*arguments: object) -> Outcome:
        capfd.readouterr()
        status = run([str(a) for a in arguments])
        printed = capfd.readouterr()
        return Outcome(status, printed.out, printed.err)

    return call


@pytest.fixture(scope="session")
def small_model(
    tiny_model: Callable[[str], Any], tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with a tiny random Llama, as `save_pretrained` leaves it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_text(tiny_corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl file of the tiny corpus."""
    file = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_corpus))
    return file


def config_text(model: Path, text: Path, out: Path) -> str:
    """The configuration of a run that takes a second or two."""
    return f"""\
model: {model}
dataset: {text}
hookpoints: [layers.1.resid_post]
out: {out}
harvest: {{n_tokens: 1536, ctx_len: 32, shard_bytes: 20000}}
sae: {{architecture: batch_topk, d_sae: 96, k: 6}}
train: {{n_steps: 40, batch_size: 128, lr: 0.003, log_every_steps: 10, checkpoint_every_steps: 20}}
evaluate: {{n_lm_tokens: 200, batch_size: 64}}
"""


@pytest.fixture(scope="session")
def small_run(
    small_model: Path, small_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> SmallRun:
    """A finished run. Shared: leave its files as they are."""
    folder = tmp_path_factory.mktemp("run")
    config = folder / "config.yaml"
    config.write_text(config_text(small_model, small_text, folder / "out"))
    assert run(["run", str(config)]) == 0
    out = folder / "out"
    return SmallRun(
        small_model, small_text, config, out / "acts", out / "run", out / "features.duckdb"
    )
