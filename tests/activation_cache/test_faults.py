"""Missing files, newer formats, full disks: found, named, and gone on from.

Killed writers, failing system calls, flipped bits, torn files and races: `test_fault_campaign`.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from activation_cache import (
    ActivationCache,
    CacheCorrupt,
    CacheError,
    DiskFull,
    LanguageModel,
    harvest,
)
from activation_cache.manifest import MANIFEST

HOOKPOINT = "layers.1.resid_post"
SMALL: dict[str, Any] = {
    "hookpoints": [HOOKPOINT],
    "n_tokens": 100_000,
    "ctx_len": 16,
    "batch_blocks": 4,
    "shard_bytes": 16_384,
    "storage_dtype": "float32",
}
FILES = {
    "activations": f"shards/000001.{HOOKPOINT}.safetensors",
    "tokens": "shards/000001.tokens.safetensors",
    "record": "shards/000001.json",
    "manifest": MANIFEST,
}


@pytest.fixture
def acts(tiny_cache: ActivationCache, tmp_path: Path) -> Path:
    """A cache that may be damaged."""
    return Path(shutil.copytree(tiny_cache.path, tmp_path / "acts"))


def _verify(folder: Path) -> None:
    ActivationCache.open(folder).verify()


def _expect_named(file: Path, read: Callable[[], None]) -> None:
    with pytest.raises(CacheError) as raised:
        read()
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", FILES)
def test_missing_file_is_found_and_named(acts: Path, kind: str) -> None:
    (acts / FILES[kind]).unlink()
    named = acts if kind == "manifest" else acts / FILES[kind]
    _expect_named(named, lambda: _verify(acts))


def test_missing_last_shard_is_found(acts: Path, tiny_cache: ActivationCache) -> None:
    last = acts / "shards" / f"{tiny_cache.manifest.n_shards - 1:06d}.json"
    last.unlink()
    _expect_named(last, lambda: _verify(acts))


def test_newer_format_asks_for_an_upgrade(acts: Path) -> None:
    raw = json.loads((acts / MANIFEST).read_text())
    (acts / MANIFEST).write_text(json.dumps(raw | {"format_version": 2, "new": "field"}))
    with pytest.raises(CacheError) as raised:
        ActivationCache.open(acts)
    assert not isinstance(raised.value, CacheCorrupt)
    assert str(raised.value) == (
        f"{acts / MANIFEST} has cache format 2, this saebase reads up to 1: upgrade saebase"
    )


def test_verify_counts_the_bytes(tiny_cache: ActivationCache) -> None:
    on_disk = sum(f.stat().st_size for f in tiny_cache.path.rglob("*.safetensors"))
    assert tiny_cache.verify() == on_disk == tiny_cache.n_bytes


# -- disk full -----------------------------------------------------------------------------------


def _harvest(lm: LanguageModel, texts: list[str], out: Path, **options: Any) -> ActivationCache:
    return harvest(lm, texts, out=out, **{**SMALL, **options})


def _shards(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted((folder / "shards").iterdir())}


def test_too_little_space_is_told_before_anything_is_written(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    with pytest.raises(DiskFull) as raised:
        _harvest(tiny_lm, tiny_corpus, tmp_path / "acts", n_tokens=10**13)
    assert str(raised.value).startswith("disk full: the cache needs 1,480,000.00 GB more and ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_disk_that_fills_up_leaves_what_was_committed(
    tiny_lm: LanguageModel,
    tiny_corpus: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
) -> None:
    _harvest(tiny_lm, tiny_corpus, tmp_path / "whole")
    real, n_calls = getattr(os, call), 0
    fail_at = {"posix_fallocate": 6, "pwrite": 60, "fsync": 24}[call]

    def fails_later(*args: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls >= fail_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    out = tmp_path / "acts"
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails_later)
        with pytest.raises(DiskFull) as raised:
            _harvest(tiny_lm, tiny_corpus, out)
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith(
        "What was committed is safe: free some space and run it again"
    )
    assert 0 < ActivationCache.open(out).verify() < ActivationCache.open(tmp_path / "whole").n_bytes
    _harvest(tiny_lm, tiny_corpus, out)
    assert _shards(out) == _shards(tmp_path / "whole")


def test_system_without_reservation_still_writes(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    _harvest(tiny_lm, tiny_corpus[:5], tmp_path / "a").verify()
    monkeypatch.delattr(os, "posix_fallocate")
    _harvest(tiny_lm, tiny_corpus[:5], tmp_path / "b").verify()
