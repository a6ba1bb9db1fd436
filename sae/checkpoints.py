"""Checkpoints of a run: checkpoints/step-000123/ with state.safetensors and manifest.json.

Written under a temporary name, fsynced and renamed; the manifest carries the hash of each file
and of itself. A folder that doesn't match its manifest is passed over, with a warning, for the
one before it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor

from sae.atomic_files import commit, fsync, sha256, told, write_json, write_tensors
from sae.errors import CheckpointError

logger = logging.getLogger(__name__)

STATE_FILE = "state.safetensors"
MANIFEST_FILE = "manifest.json"
PREFIX = "step-"


class Checkpoint(NamedTuple):
    """Tensors by name, and whatever else as JSON."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write the checkpoint of a step, then remove all but the newest keep ones.

    folder: the run's checkpoints/. Returns: the checkpoint's folder.
    """
    final = folder / f"{PREFIX}{step:06d}"
    temporary = folder / f".{final.name}.tmp"
    with told(temporary):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    digest = write_tensors(temporary / STATE_FILE, checkpoint.tensors)
    body = {"step": step, "files": {STATE_FILE: digest}, "values": checkpoint.values}
    write_json(temporary / MANIFEST_FILE, {"body": body, "sha256": _digest(body)})
    if final.exists():
        with told(final):
            shutil.rmtree(final)
    commit(temporary, final)
    sweep_checkpoints(folder, step, keep=keep)
    return final


def load_newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; None if there is none at all.

    Raises: CheckpointError if there are some, but all are damaged.
    """
    problems = []
    for path in reversed(_checkpoints(folder)):
        try:
            return _load(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("checkpoint %s is damaged and passed over: %s", path, error)
            problems.append(f"{path.name}: {error}")
    if not problems:
        return None
    raise CheckpointError(
        f"no checkpoint in {folder} can be used ({'; '.join(problems)}); start over with "
        "resume=False, or restore one"
    )


def sweep_checkpoints(folder: Path, step: int, *, keep: int) -> None:
    """Remove all but the newest keep checkpoints up to a step, and what unfinished ones left.

    Those of later steps go too: they were damaged, and passed over.
    """
    kept = [path for path in _checkpoints(folder) if _step(path) <= step][-keep:]
    _remove(folder, [path for path in _checkpoints(folder) if path not in kept])


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints, and what unfinished ones left."""
    _remove(folder, _checkpoints(folder))


def _load(path: Path) -> Checkpoint:
    manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
    body = manifest["body"]
    if manifest["sha256"] != _digest(body):
        raise CheckpointError(f"{MANIFEST_FILE} isn't what was written")
    for name, digest in body["files"].items():
        if sha256(path / name) != digest:
            raise CheckpointError(f"{name} isn't what was written: its hash differs")
    return Checkpoint(load_file(path / STATE_FILE), body["values"])


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoints by step, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdigit()]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name[len(PREFIX) :])


def _remove(folder: Path, checkpoints: list[Path]) -> None:
    """Remove checkpoints, and what unfinished ones left behind."""
    with told(folder):
        for path in [*checkpoints, *folder.glob(f".{PREFIX}*.tmp")]:
            shutil.rmtree(path)
        if folder.exists():
            fsync(folder)
