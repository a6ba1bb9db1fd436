"""Files that are there whole or not at all: written aside, fsynced, renamed, the folder fsynced."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

READ_BYTES = 2**20


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    temporary = _beside(path)
    temporary.write_text(text, encoding="utf-8")
    commit(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; NaN and infinities are refused."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write a safetensors file atomically. Returns: its sha256."""
    temporary = _beside(path)
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary)
    digest = sha256(temporary)
    commit(temporary, path)
    return digest


def commit(temporary: Path, path: Path) -> None:
    """Make a finished temporary file or folder durable under its name."""
    fsync(temporary)
    temporary.replace(path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Wait until a file or a folder's entries are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hash of a file's bytes, as hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Hold the lock that a file is, which a dead process gives up. Yields: whether it was free."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _beside(path: Path) -> Path:
    """Where a file is written before it has its name; left-overs are simply overwritten."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.tmp")
