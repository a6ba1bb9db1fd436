"""Two processes train what one does, on the same global batches, and go on exactly."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from sae import (
    SAE,
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    MatryoshkaConfig,
    Metrics,
    SAEConfig,
    TopKConfig,
    TrainConfig,
    TrainingStoppedError,
    train,
)
from sae.team import Team
from tests.sae.conftest import plant

CONFIGS: dict[str, SAEConfig] = {
    "topk": TopKConfig(d_sae=96, k=4),
    "batch_topk": BatchTopKConfig(d_sae=96, k=4),
    "matryoshka": MatryoshkaConfig(d_sae=96, k=4),
    "jumprelu": JumpReLUConfig(d_sae=96, target_l0=4),
    "gated": GatedConfig(d_sae=96, target_l0=4),
}
N_STEPS, STOP = 20, 7


def train_one(config: SAEConfig, out: Path, should_stop: Any = None) -> list[Metrics]:
    train_config = TrainConfig(
        n_steps=N_STEPS,
        batch_size=256,
        lr=1e-3,
        init_rows=1024,
        calibration_rows=4096,
        dead_after_tokens=2000,
        checkpoint_every_steps=100,
        log_every_steps=1,
        kernels="torch",
        nominate_in="float32",
        device="cpu",
    )
    lines: list[Metrics] = []
    source = plant(n_rows=6000, d_model=32, n_features=64, n_active=3).source
    train(
        source,
        "layer",
        config,
        train_config,
        out=out,
        on_metrics=lines.append,
        should_stop=should_stop,
    )
    return lines


def worker(rank: int, folder: Path) -> None:
    """One of two processes: each config, whole and with a stop; and what a team adds up."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    team = Team()
    assert team.sum(rank + 1.5) == 4.0
    assert team.any(rank == 1)
    assert not team.any(False)
    parts = team.gather(torch.arange(3.0 * rank))
    assert [part.tolist() for part in parts] == [[], [0.0, 1.0, 2.0]]
    for name, config in CONFIGS.items():
        lines = train_one(config, folder / "two" / name)
        assert bool(lines) == (rank == 0)  # the first one tells
        answers = iter([False] * (STOP - 1) + [rank == 1])  # one asks, both stop
        with pytest.raises(TrainingStoppedError, match=f"after step {STOP} of {N_STEPS}"):
            train_one(config, folder / "stopped" / name, answers.__next__)
        train_one(config, folder / "stopped" / name)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("team")
    mp.spawn(worker, args=(folder,), nprocs=2)
    return folder


def hash_of(folder: Path) -> str:
    return hashlib.sha256((folder / "sae.safetensors").read_bytes()).hexdigest()


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_train_what_one_does(folder: Path, name: str, tmp_path: Path) -> None:
    alone = train_one(CONFIGS[name], tmp_path / "one")
    together = metrics_of(folder / "two" / name)
    assert len(alone) == len(together) == N_STEPS
    for one, two in zip(alone, together, strict=True):
        for each in ("n_tokens", "n_skipped"):
            assert getattr(one, each) == two[each]
        assert one.loss == pytest.approx(two["loss"], rel=1e-4)
        assert one.fvu == pytest.approx(two["fvu"], rel=1e-4)
        assert one.l0 == pytest.approx(two["l0"], rel=2e-3)
    first, second = SAE.load(tmp_path / "one"), SAE.load(folder / "two" / name)
    for key, each in first.state_dict().items():
        assert distance(second.state_dict()[key], each) < 2e-3, key


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-9))


@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_that_were_stopped_end_at_the_same_weights(folder: Path, name: str) -> None:
    assert hash_of(folder / "two" / name) == hash_of(folder / "stopped" / name)
