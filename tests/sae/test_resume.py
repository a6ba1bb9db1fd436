"""Interrupted runs: continued exactly, or refused with a reason."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae import (
    SAE,
    BatchTopKConfig,
    CheckpointError,
    Metrics,
    ResumeMismatchError,
    RunResult,
    StorageError,
    TopKConfig,
    TrainConfig,
    TrainingStoppedError,
    train,
)
from sae.checkpoints import Checkpoint, load_newest_checkpoint, save_checkpoint

if TYPE_CHECKING:
    from tests.sae.conftest import Planted

CONFIG = BatchTopKConfig(d_sae=96, k=4)
TIMES = ("tokens_per_s", "elapsed_s")


class KilledError(Exception):
    """Stands for whatever ends a process."""


def stop_after(step: int) -> Callable[[Metrics], None]:
    def on_metrics(metrics: Metrics) -> None:
        if metrics.step == step:
            raise KilledError

    return on_metrics


def same_weights(a: SAE, b: SAE) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return all(torch.equal(first[name], second[name]) for name in first)


def logged(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


@pytest.fixture
def uninterrupted(planted: Planted, short: TrainConfig, tmp_path: Path) -> RunResult:
    return train(planted.source, "layer", CONFIG, short, out=tmp_path / "whole")


def go_on(planted: Planted, short: TrainConfig, out: Path) -> RunResult:
    return train(planted.source, "layer", CONFIG, short, out=out)


def interrupt(planted: Planted, short: TrainConfig, out: Path, step: int) -> None:
    with pytest.raises(KilledError):
        train(planted.source, "layer", CONFIG, short, out=out, on_metrics=stop_after(step))


@pytest.mark.parametrize("config", [TopKConfig(d_sae=300, k=2), CONFIG], ids=["topk", "batch_topk"])
def test_resumed_run_equals_uninterrupted_run(
    planted: Planted, short: TrainConfig, config: TopKConfig, tmp_path: Path
) -> None:
    whole = train(planted.source, "layer", config, short, out=tmp_path / "whole")
    part = tmp_path / "part"
    for step in (15, 30):
        with pytest.raises(KilledError):
            train(planted.source, "layer", config, short, out=part, on_metrics=stop_after(step))
    resumed = train(planted.source, "layer", config, short, out=part)
    assert same_weights(whole.sae, resumed.sae)
    assert logged(whole.path) == logged(part)
    names = ("config.json", "sae.safetensors")
    assert all((whole.path / n).read_bytes() == (part / n).read_bytes() for n in names)


def test_run_killed_without_warning_goes_on_from_its_last_checkpoint(
    uninterrupted: RunResult, planted: Planted, short: TrainConfig, tmp_path: Path
) -> None:
    part = tmp_path / "part"
    interrupt(planted, short, part, step=25)
    shutil.rmtree(part / "checkpoints" / "step-000025")  # a kill leaves none of its own
    with (part / "metrics.jsonl").open("a") as file:
        file.write('{"step": 26, "n_to')  # cut short
    assert same_weights(uninterrupted.sae, go_on(planted, short, part).sae)
    assert logged(uninterrupted.path) == logged(part)


def test_exception_leaves_a_checkpoint(
    planted: Planted, short: TrainConfig, tmp_path: Path
) -> None:
    interrupt(planted, short, tmp_path, step=25)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-000020",
        "step-000025",
    ]


def test_should_stop_leaves_a_checkpoint_and_says_where(
    uninterrupted: RunResult, planted: Planted, short: TrainConfig, tmp_path: Path
) -> None:
    part = tmp_path / "part"
    answers = iter([False] * 12 + [True])
    with pytest.raises(TrainingStoppedError, match="stopped after step 13 of 40; the same call"):
        train(planted.source, "layer", CONFIG, short, out=part, should_stop=lambda: next(answers))
    assert (part / "checkpoints" / "step-000013" / "manifest.json").is_file()
    assert same_weights(uninterrupted.sae, go_on(planted, short, part).sae)


@pytest.mark.parametrize("name", ["state.safetensors", "manifest.json"])
def test_damaged_checkpoint_is_passed_over_for_the_one_before(
    uninterrupted: RunResult,
    planted: Planted,
    short: TrainConfig,
    tmp_path: Path,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    part = tmp_path / "part"
    interrupt(planted, short, part, step=25)
    flip_a_byte(part / "checkpoints" / "step-000025" / name)
    with caplog.at_level(logging.WARNING):
        resumed = go_on(planted, short, part)
    assert "step-000025 is damaged and passed over" in caplog.text
    assert same_weights(uninterrupted.sae, resumed.sae)
    assert logged(uninterrupted.path) == logged(part)


def test_no_usable_checkpoint_is_an_error(
    planted: Planted, short: TrainConfig, tmp_path: Path
) -> None:
    interrupt(planted, short, tmp_path, step=25)
    for path in (tmp_path / "checkpoints").iterdir():
        flip_a_byte(path / "state.safetensors")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used .*resume=False"):
        go_on(planted, short, tmp_path)
    fresh = train(planted.source, "layer", CONFIG, short, out=tmp_path, resume=False)
    assert fresh.steps == 40


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
@pytest.mark.parametrize("nth", range(4))
def test_checkpoint_that_fails_at_any_moment_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, nth: int
) -> None:
    def state(value: float) -> Checkpoint:
        return Checkpoint({"w": torch.full((3,), value)}, {"value": value})

    save_checkpoint(tmp_path, 1, state(1.0), keep=2)
    owner, _, name = step.rpartition(".")
    target = Path if owner == "pathlib.Path" else __import__(owner)
    original, calls = getattr(target, name), 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth + 1:
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, failing)
    reached = True
    try:
        save_checkpoint(tmp_path, 2, state(2.0), keep=2)
        reached = calls > nth
    except StorageError:
        pass
    monkeypatch.undo()
    newest = load_newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.values["value"] == newest.tensors["w"][0]
    assert newest.values["value"] in (1.0, 2.0)
    if not reached:  # nothing failed: the new one must be there
        assert newest.values["value"] == 2.0
    save_checkpoint(tmp_path, 3, state(3.0), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def test_only_the_newest_checkpoints_are_kept(
    uninterrupted: RunResult, planted: Planted, short: TrainConfig
) -> None:
    names = sorted(path.name for path in (uninterrupted.path / "checkpoints").iterdir())
    assert names == ["step-000030", "step-000040"]


def test_finished_run_returns_at_once(
    uninterrupted: RunResult, planted: Planted, short: TrainConfig
) -> None:
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.path.rglob("*")}
    lines: list[Metrics] = []
    again = train(
        planted.source, "layer", CONFIG, short, out=uninterrupted.path, on_metrics=lines.append
    )
    assert lines == []
    assert same_weights(uninterrupted.sae, again.sae)
    assert again.metrics == uninterrupted.metrics
    assert before == {path: path.stat().st_mtime_ns for path in uninterrupted.path.rglob("*")}


@pytest.mark.parametrize("is_finished", [False, True])
@pytest.mark.parametrize(
    ("change", "name"),
    [({"lr": 1e-3}, r"train\.lr=0\.003 \(now 0\.001\)"), ({"k": 5}, r"sae\.k=4 \(now 5\)")],
)
def test_other_settings_are_refused_by_name(
    planted: Planted,
    short: TrainConfig,
    tmp_path: Path,
    is_finished: bool,
    change: dict[str, Any],
    name: str,
) -> None:
    if is_finished:
        go_on(planted, short, tmp_path)
    else:
        interrupt(planted, short, tmp_path, step=15)
    config = CONFIG.model_copy(update={k: v for k, v in change.items() if k == "k"})
    other = short.model_copy(update={k: v for k, v in change.items() if k != "k"})
    with pytest.raises(ResumeMismatchError, match=name):
        train(planted.source, "layer", config, other, out=tmp_path)


def test_how_often_to_save_may_change_when_a_run_goes_on(
    uninterrupted: RunResult, planted: Planted, short: TrainConfig, tmp_path: Path
) -> None:
    part = tmp_path / "part"
    interrupt(planted, short, part, step=15)
    rarely = short.model_copy(update={"checkpoint_every_steps": 1000, "keep_checkpoints": 1})
    assert same_weights(uninterrupted.sae, go_on(planted, rarely, part).sae)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
