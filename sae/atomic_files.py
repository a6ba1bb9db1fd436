"""Files that are there whole or not at all: written aside, fsynced, renamed, the folder fsynced."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.errors import StorageError

READ_BYTES = 2**20
# As safetensors calls them.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Tell in one line, with a name, what the system has against reading or writing path.

    Raises: StorageError instead of OSError.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path}: {error.strerror or error}; make room or look at the disk, then do the same "
            "again: it goes on from what was saved"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    temporary = _beside(path)
    with told(temporary):
        temporary.write_text(text, encoding="utf-8")
    commit(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; NaN and infinities are refused."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file atomically, tensor by tensor. Returns: its sha256.

    Not with safetensors' own writer: a process killed in it leaves a file of a random name.
    """
    temporary, digest = _beside(path), hashlib.sha256()
    with told(temporary), temporary.open("wb") as file:
        for part in _safetensors(tensors):
            digest.update(part)
            file.write(part)
    commit(temporary, path)
    return digest.hexdigest()


def commit(temporary: Path, path: Path) -> None:
    """Make a finished temporary file or folder durable under its name."""
    with told(path):
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
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield _is_locked(descriptor, path)
    finally:
        os.close(descriptor)


def _beside(path: Path) -> Path:
    """Where a file is written before it has its name; left-overs are simply overwritten."""
    with told(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.tmp")


def _is_locked(descriptor: int, path: Path) -> bool:
    try:
        with told(path):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except StorageError as error:
        if isinstance(error.__cause__, BlockingIOError):
            return False
        raise
    return True


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file, piece by piece: the largest dtypes first, so that all are aligned."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, end = dict[str, Any](), 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data
