"""Torn files, flipped bits, full disks, killed writers: found, named, and gone on from."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
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


def _read_all(folder: Path) -> None:
    cache = ActivationCache.open(folder)
    for hookpoint in cache.hookpoints:
        for _ in cache.batches(hookpoint, 64):
            pass
        for _ in cache.chunks(hookpoint):
            pass
    list(cache.documents())


def _verify(folder: Path) -> None:
    ActivationCache.open(folder).verify()


def _flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def _expect_named(file: Path, read: Callable[[], None]) -> None:
    with pytest.raises(CacheError) as raised:
        read()
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", FILES)
def test_flipped_bit_is_found_and_the_file_named(acts: Path, kind: str) -> None:
    file = acts / FILES[kind]
    n_bits = 8 * file.stat().st_size
    whole = file.read_bytes()
    first = range(0, 8 * 40, 17)  # a header's length and its first entries
    spread = range(0, n_bits, n_bits // 40 + 1)
    for bit in sorted({*first, *spread, n_bits - 1}):
        if whole[bit // 8] in b" \n" and kind in ("record", "manifest"):
            continue  # white space between the values of JSON says nothing
        _flip(file, bit)
        _expect_named(file, lambda: _verify(acts))
        file.write_bytes(whole)
    _flip(file, n_bits // 2)
    _expect_named(file, lambda: _read_all(acts))


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_truncated_file_is_found_and_named(acts: Path, kind: str, fraction: float) -> None:
    file = acts / FILES[kind]
    size = file.stat().st_size
    os.truncate(file, min(int(size * fraction), size - 2))  # JSON ends in a line break
    _expect_named(file, lambda: _verify(acts))
    _expect_named(file, lambda: _read_all(acts))


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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 240 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=240k", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_real_disk_that_fills_up(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path, small_disk: Path
) -> None:
    whole = _harvest(tiny_lm, tiny_corpus, tmp_path / "whole", n_tokens=600)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(90_000))

    def fill(_: Any) -> None:
        with suppress(OSError), (small_disk / "more").open("ab") as more:
            more.write(bytes(8_000))

    with pytest.raises(DiskFull):
        _harvest(tiny_lm, tiny_corpus, small_disk / "acts", n_tokens=600, on_progress=fill)
    ActivationCache.open(small_disk / "acts").verify()
    ballast.unlink()
    (small_disk / "more").unlink()
    assert _harvest(tiny_lm, tiny_corpus, small_disk / "acts", n_tokens=600).verify() == (
        whole.n_bytes
    )
    assert _shards(small_disk / "acts") == _shards(tmp_path / "whole")


# -- a killed writer -----------------------------------------------------------------------------

_WRITER = """
import sys, time, json
import torch
from activation_cache import LanguageModel, harvest
torch.set_num_threads(1)
model, texts, out, options = sys.argv[1:]
lm = LanguageModel.load(model)
lm.name = "tiny"
harvest(lm, json.load(open(texts)), out=out, on_progress=lambda _: time.sleep(0.02),
        **json.loads(options))
"""


def test_killed_writer_is_gone_on_from(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    tiny_lm.model.save_pretrained(tmp_path / "model")
    tiny_lm.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.json").write_text(json.dumps(tiny_corpus))
    lm = LanguageModel.load(tmp_path / "model")
    lm.name = "tiny"
    _harvest(lm, tiny_corpus, tmp_path / "whole")
    out = tmp_path / "acts"
    arguments = [str(tmp_path / "model"), str(tmp_path / "texts.json"), str(out), json.dumps(SMALL)]
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, *arguments])
    deadline = time.monotonic() + 60
    while not (out / "shards" / "000002.json").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert writer.poll() is None
    writer.send_signal(signal.SIGKILL)
    assert writer.wait() == -signal.SIGKILL

    committed = ActivationCache.open(out)
    committed.verify()
    assert not committed.manifest.is_complete
    _harvest(lm, tiny_corpus, out)
    assert _shards(out) == _shards(tmp_path / "whole")
