"""Checkpoints that lie beside damaged ones; tensors written without safetensors' own writer."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae import StorageError
from sae.atomic_files import write_tensors
from sae.checkpoints import (
    STATE_FILE,
    Checkpoint,
    load_newest_checkpoint,
    save_checkpoint,
    sweep_checkpoints,
)


def save(folder: Path, step: int, keep: int) -> Path:
    state = Checkpoint({"w": torch.full((3,), float(step))}, {"step": step})
    return save_checkpoint(folder, step, state, keep=keep)


def test_a_damaged_checkpoint_does_not_push_out_the_one_that_is_gone_on_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 20, keep=2)
    damaged = save(tmp_path, 40, keep=2) / STATE_FILE
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert load_newest_checkpoint(tmp_path).values == {"step": 20}  # type: ignore[union-attr]
    assert "step-000040 is damaged and passed over" in caplog.text
    save(tmp_path, 30, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000030"]
    assert load_newest_checkpoint(tmp_path).values == {"step": 30}  # type: ignore[union-attr]


def test_sweeping_leaves_the_newest_and_nothing_half_made(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=5)
    (tmp_path / ".step-000004.tmp").mkdir()
    sweep_checkpoints(tmp_path, 3, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]


def test_what_the_system_refuses_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("not a folder")
    with pytest.raises(StorageError, match=r"checkpoints.*make room or look at the disk") as caught:
        save(tmp_path / "checkpoints", 1, keep=1)
    assert "\n" not in str(caught.value)


def test_written_tensors_are_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {
        "bool": torch.tensor([True, False, True]),
        "transposed": torch.rand(5, 3).T,
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "half": torch.rand(3).bfloat16(),
        "long": torch.arange(7),
        "double": torch.rand(2, 1, 2).double(),
    }
    path = tmp_path / "state.safetensors"
    assert write_tensors(path, tensors) == hashlib.sha256(path.read_bytes()).hexdigest()
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert [each.name for each in tmp_path.iterdir()] == ["state.safetensors"]
