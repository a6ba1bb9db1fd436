"""Every architecture: stopped and continued exactly, and trained side by side as if alone."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sae import (
    BatchTopKConfig,
    ConfigError,
    DivergedError,
    GatedConfig,
    HierarchicalTopKConfig,
    JumpReLUConfig,
    MatryoshkaConfig,
    Metrics,
    PairedTensors,
    ReLUConfig,
    RunInUseError,
    RunSpec,
    SAEConfig,
    TopKConfig,
    TrainConfig,
    TrainingStoppedError,
    crosscoder,
    train,
    train_many,
    transcoder,
)
from sae.atomic_files import held, sha256
from sae.run_folder import LOCK_FILE
from sae.wiring import Wiring, wiring_of
from tests.sae.conftest import plant

if TYPE_CHECKING:
    pass

CASES: dict[str, tuple[SAEConfig, Wiring, dict[str, Any]]] = {
    "topk": (TopKConfig(d_sae=96, k=4), wiring_of("a"), {}),
    "annealed": (TopKConfig(d_sae=96, k=4, k_start=20), wiring_of("a"), {"center": True}),
    "batch_topk": (BatchTopKConfig(d_sae=96, k=4), wiring_of("a"), {"aligned": True}),
    "matryoshka": (
        MatryoshkaConfig(d_sae=96, k=4),
        wiring_of("a"),
        {"orthogonality_coefficient": 1.0},
    ),
    "hierarchical": (HierarchicalTopKConfig(d_sae=96, k=4), wiring_of("b"), {}),
    "jumprelu_l0": (JumpReLUConfig(d_sae=96, target_l0=4), wiring_of("b"), {}),
    "jumprelu_tanh": (JumpReLUConfig(d_sae=96, recipe="tanh"), wiring_of("a"), {}),
    "gated": (GatedConfig(d_sae=96, target_l0=4), wiring_of("a"), {"lr": 1e-3}),
    "relu": (ReLUConfig(d_sae=96, target_l0=4), crosscoder("a", "b"), {}),
    "skip": (BatchTopKConfig(d_sae=96, k=4), transcoder("a", "b", skip=True), {"n_steps": 30}),
}


def settings(short: TrainConfig, name: str) -> TrainConfig:
    return short.model_copy(update=CASES[name][2])


@pytest.fixture(scope="module")
def source() -> PairedTensors:
    x = plant(n_rows=6000, d_model=32, n_features=64, n_active=3).x
    return PairedTensors({"a": x, "b": 3 * x[:, :24].abs()})


def stop_at(step: int) -> Callable[[], bool]:
    return iter([False] * (step - 1) + [True]).__next__


@pytest.mark.parametrize("name", CASES)
def test_stopped_and_continued_run_ends_at_the_same_bytes(
    source: PairedTensors, short: TrainConfig, name: str, tmp_path: Path
) -> None:
    sae_config, wiring, _ = CASES[name]
    config = settings(short, name)
    train(source, wiring, sae_config, config, out=tmp_path / "whole")
    part = tmp_path / "part"
    with pytest.raises(TrainingStoppedError):
        train(source, wiring, sae_config, config, out=part, should_stop=stop_at(17))
    train(source, wiring, sae_config, config, out=part)
    assert sha256(tmp_path / "whole" / "sae.safetensors") == sha256(part / "sae.safetensors")


def test_runs_side_by_side_end_as_each_would_alone(
    source: PairedTensors, short: TrainConfig, tmp_path: Path
) -> None:
    def specs(folder: Path) -> list[RunSpec]:
        return [
            RunSpec(wiring, sae_config, settings(short, name), folder / name)
            for name, (sae_config, wiring, _) in CASES.items()
        ]

    told: set[Path] = set()
    many = specs(tmp_path / "many")
    with pytest.raises(TrainingStoppedError, match="stopped after step 13 of 40"):
        train_many(source, many, should_stop=stop_at(13))
    results = train_many(source, many, on_metrics=lambda path, _: told.add(path))
    assert told == {spec.out for spec in many}
    for spec, result in zip(specs(tmp_path / "alone"), results, strict=True):
        alone = train(source, *spec[:3], out=spec.out)
        assert result.steps == alone.steps
        assert result.metrics is not None
        names = ("sae.safetensors", "config.json")
        assert all((spec.out / n).read_bytes() == (result.path / n).read_bytes() for n in names)


class Streamed(PairedTensors):
    """A source that drops what a checkpoint allows it to, as a stream does."""

    released = 0

    def wants_checkpoint(self, n_rows_read: int, hookpoints: Any) -> bool:
        return n_rows_read - self.released >= 5 * 256

    def release(self, n_rows_read: int, hookpoints: Any) -> None:
        self.released = max(self.released, n_rows_read)


def test_a_run_that_is_done_keeps_no_rows_from_being_dropped(
    short: TrainConfig, tmp_path: Path
) -> None:
    source = Streamed({"a": plant(n_rows=6000, d_model=32, n_features=64, n_active=3).x})
    lengths = {"short": 12, "long": 40}
    specs = [
        RunSpec(
            "a", TopKConfig(d_sae=96, k=4), short.model_copy(update={"n_steps": n}), tmp_path / k
        )
        for k, n in lengths.items()
    ]
    train_many(source, specs)
    assert source.released == 40 * 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 128}, "share their batches, but batch_size is 128 and 256; give all the"),
        ({"data_seed": 3}, "but data_seed is 0 and 3; give all the same"),
    ],
)
def test_runs_that_need_other_batches_are_refused(
    source: PairedTensors, short: TrainConfig, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = TopKConfig(d_sae=96, k=4)
    specs = [
        RunSpec("a", config, short, tmp_path / "x"),
        RunSpec("a", config, short.model_copy(update=change), tmp_path / "y"),
    ]
    with pytest.raises(ConfigError, match=message):
        train_many(source, specs)
    with pytest.raises(ConfigError, match=r"two runs are to be trained into .*; give each its own"):
        train_many(source, [specs[0], specs[0]])
    with pytest.raises(ConfigError, match="no run to train"):
        train_many(source, [])


def hold(folder: Path, is_held: Any, may_end: Any) -> None:
    with held(folder / LOCK_FILE) as is_free:
        assert is_free
        is_held.set()
        may_end.wait(60)


def test_a_folder_in_use_is_told_and_left_alone(
    source: PairedTensors, short: TrainConfig, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    is_held, may_end = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, is_held, may_end))
    other.start()
    try:
        assert is_held.wait(60)
        with pytest.raises(RunInUseError, match=r"another process is training in .*; wait for it"):
            train(source, "a", TopKConfig(d_sae=96, k=4), short, out=tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
    finally:
        may_end.set()
        other.join()
    train(source, "a", TopKConfig(d_sae=96, k=4), short, out=tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_a_learning_rate_that_diverges_is_told(
    source: PairedTensors, short: TrainConfig, name: str, tmp_path: Path
) -> None:
    sae_config, wiring, changes = CASES[name]
    config = short.model_copy(update={**changes, "lr": 1e3})
    with pytest.raises(DivergedError, match=r"step \d+.* the loss is .*; lower lr=1e\+03") as told:
        train(source, wiring, sae_config, config, out=tmp_path)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "sae.safetensors").exists()


def test_k_falls_from_k_start(source: PairedTensors, short: TrainConfig, tmp_path: Path) -> None:
    lines: list[Metrics] = []
    config = short.model_copy(update={"log_every_steps": 1})
    train(source, "a", CASES["annealed"][0], config, out=tmp_path, on_metrics=lines.append)
    l0s = [line.l0 for line in lines]
    assert 14 < l0s[0] <= 20  # of which some aren't positive
    assert l0s[:20] == sorted(l0s[:20], reverse=True)
    assert all(3.9 < l0 <= 4 for l0 in l0s[20:])


def test_penalty_rises_from_nothing(
    source: PairedTensors, short: TrainConfig, tmp_path: Path
) -> None:
    lines: list[Metrics] = []
    config = short.model_copy(update={"log_every_steps": 1})
    train(source, "a", ReLUConfig(d_sae=96), config, out=tmp_path, on_metrics=lines.append)
    expected = [5 * min(1.0, step / 12) for step in range(40)]
    assert [line.coefficient for line in lines] == pytest.approx(expected)
    assert lines[0].penalty == 0 < lines[5].penalty
