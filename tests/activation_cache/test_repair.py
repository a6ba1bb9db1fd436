"""`harvest(..., repair=True)`: what is damaged comes back with the same bytes, and nothing else."""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from activation_cache import (
    ActivationCache,
    CacheCorrupt,
    CacheError,
    CacheMismatch,
    CorpusError,
    LanguageModel,
    harvest,
)
from activation_cache.manifest import MANIFEST, MANIFEST_COPY, ShardRecord
from activation_cache.store import LocalStore

HOOKPOINT = "layers.1.resid_post"
SMALL: dict[str, Any] = {
    "hookpoints": [HOOKPOINT],
    "n_tokens": 590,  # nine shards of 64 rows and one of 16, in a text that goes on
    "ctx_len": 16,
    "batch_blocks": 2,
    "shard_bytes": 9_000,
    "storage_dtype": "float32",
}
ACTS = f"shards/000004.{HOOKPOINT}.safetensors"
TOKENS = "shards/000004.tokens.safetensors"
RECORD = "shards/000004.json"
INT8: dict[str, Any] = {"storage_dtype": "int8", "shard_bytes": 2_600}


def _harvest(lm: LanguageModel, texts: Any, out: Path, **options: Any) -> ActivationCache:
    return harvest(lm, texts, out=out, **{**SMALL, **options})


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(f.relative_to(folder)): f.read_bytes()
        for f in sorted(folder.rglob("*"))
        if f.is_file() and f.name != ".lock"
    }


@pytest.fixture(scope="module", params=["float32", "int8"])
def whole(
    request: pytest.FixtureRequest,
    tiny_lm: LanguageModel,
    tiny_corpus: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A finished cache of ten shards. Shared: leave its files as they are."""
    out = tmp_path_factory.mktemp("whole") / "acts"
    cache = _harvest(tiny_lm, tiny_corpus, out, **(INT8 if request.param == "int8" else {}))
    assert [record.n_rows for record in cache.parts[0].records] == [64] * 9 + [16]
    assert not cache.is_exhausted
    return out


@pytest.fixture
def acts(whole: Path, tmp_path: Path) -> Path:
    """A cache that may be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "acts"))


def _repair(lm: LanguageModel, texts: Any, out: Path, **options: Any) -> ActivationCache:
    dtype = INT8 if _is_int8(out) else {}
    return _harvest(lm, texts, out, **{**dtype, "repair": True, **options})


def _is_int8(folder: Path) -> bool:
    found = [f.read_bytes() for f in (folder / MANIFEST, folder / MANIFEST_COPY) if f.exists()]
    return any(b'"storage_dtype": "int8"' in data for data in found)


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 4
    file.write_bytes(data)


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _delete(file: Path) -> None:
    file.unlink()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped": _flip,
    "truncated": _truncate,
    "deleted": _delete,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [ACTS, TOKENS, RECORD, MANIFEST, MANIFEST_COPY])
def test_damaged_file_comes_back_as_it_was(
    tiny_lm: LanguageModel, tiny_corpus: list[str], whole: Path, acts: Path, name: str, damage: str
) -> None:
    DAMAGES[damage](acts / name)
    _repair(tiny_lm, tiny_corpus, acts).verify()
    assert _files(acts) == _files(whole)


def _last_shard(folder: Path) -> int:
    return max(int(f.stem) for f in (folder / "shards").glob("*.json"))


@pytest.mark.parametrize("damage", ["flipped", "deleted"])
@pytest.mark.parametrize(
    "shards",
    [[0], [0, 1, 2], [2, 3, 4], [-1], [-2, -1], [-3, -2, -1], [1, 3, -2], "all"],
    ids=str,
)
def test_records_that_are_lost_come_back(
    tiny_lm: LanguageModel,
    tiny_corpus: list[str],
    whole: Path,
    acts: Path,
    shards: list[int] | str,
    damage: str,
) -> None:
    n = _last_shard(acts) + 1
    for shard in range(n) if isinstance(shards, str) else [s % n for s in shards]:
        DAMAGES[damage](acts / "shards" / f"{shard:06d}.json")
    _repair(tiny_lm, tiny_corpus, acts).verify()
    committed = {name: data for name, data in _files(acts).items() if name.startswith("shards")}
    assert committed == {n: d for n, d in _files(whole).items() if n.startswith("shards")}


def test_many_damages_at_once(
    tiny_lm: LanguageModel, tiny_corpus: list[str], whole: Path, acts: Path
) -> None:
    _flip(acts / f"shards/000000.{HOOKPOINT}.safetensors")
    _delete(acts / "shards/000001.tokens.safetensors")
    _truncate(acts / "shards/000002.json")
    _delete(acts / "shards/000003.json")
    _flip(acts / "shards" / f"{_last_shard(acts):06d}.tokens.safetensors")
    _flip(acts / MANIFEST)
    (acts / "shards" / "000099.x.safetensors.partial").write_text("orphan")
    _repair(tiny_lm, tiny_corpus, acts).verify()
    assert _files(acts) == _files(whole)


@pytest.mark.parametrize("intact", [None, 3])
def test_calibrations_are_found_or_measured_again(
    tiny_lm: LanguageModel, tiny_corpus: list[str], whole: Path, acts: Path, intact: int | None
) -> None:
    """All files of rows are damaged, with one of them intact or none."""
    for shard in range(_last_shard(acts) + 1):
        if shard != intact:
            _truncate(acts / f"shards/{shard:06d}.{HOOKPOINT}.safetensors")
    _repair(tiny_lm, tiny_corpus, acts).verify()
    assert _files(acts) == _files(whole)


def test_calibration_is_read_from_a_shard_whose_rows_are_damaged(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No shard is intact, but what decodes them is: it is not measured again."""
    cache = _harvest(tiny_lm, tiny_corpus, tmp_path / "acts", **INT8)
    before = _files(tmp_path / "acts")
    for shard in range(cache.n_shards):
        file = tmp_path / "acts" / f"shards/{shard:06d}.{HOOKPOINT}.safetensors"
        data = bytearray(file.read_bytes())
        data[1_100] ^= 1  # in the rows
        file.write_bytes(data)

    def refuse(*_: Any) -> None:
        pytest.fail("measured again")

    monkeypatch.setattr("activation_cache.production.calibrate", refuse)
    _repair(tiny_lm, tiny_corpus, tmp_path / "acts").verify()
    assert _files(tmp_path / "acts") == before


def test_repair_of_an_intact_cache_changes_nothing(
    tiny_lm: LanguageModel, tiny_corpus: list[str], acts: Path
) -> None:
    stamps = {f: (f.stat().st_mtime_ns, f.stat().st_ino) for f in acts.rglob("*.*")}
    _repair(tiny_lm, tiny_corpus, acts)
    assert {f: (f.stat().st_mtime_ns, f.stat().st_ino) for f in acts.rglob("*.*")} == stamps | {
        f: (f.stat().st_mtime_ns, f.stat().st_ino) for f in acts.rglob(".lock")
    }


def test_repair_wants_the_same_text_and_model(
    tiny_model: Callable[[str], Any], tiny_lm: LanguageModel, tiny_corpus: list[str], acts: Path
) -> None:
    _flip(acts / ACTS)
    before = _files(acts)
    with pytest.raises(CacheMismatch, match="was made with data_revision=xxh3:"):
        _repair(tiny_lm, tiny_corpus[1:], acts)
    other = LanguageModel(tiny_model("qwen2"), tiny_lm.tokenizer, name="tiny-llama")
    with pytest.raises(CacheMismatch, match="was made with model_revision=xxh3:"):
        _repair(other, tiny_corpus, acts)
    with pytest.raises(CacheMismatch, match="was made with ctx_len=16, now it is 8"):
        _repair(tiny_lm, tiny_corpus, acts, ctx_len=8)
    assert _files(acts) == before


class _StopError(Exception):
    pass


def _stop_at(n_tokens: int) -> Callable[[Any], None]:
    def stop(progress: Any) -> None:
        if progress.n_tokens >= n_tokens:
            raise _StopError

    return stop


def test_repaired_unfinished_cache_goes_on_to_the_end(
    tiny_lm: LanguageModel, tiny_corpus: list[str], whole: Path, tmp_path: Path
) -> None:
    options = INT8 if _is_int8(whole) else {}
    out = tmp_path / "acts"
    with pytest.raises(_StopError):
        _harvest(tiny_lm, tiny_corpus, out, on_progress=_stop_at(500), **options)
    assert _last_shard(out) >= 2  # the writer is a few passes behind
    _flip(out / f"shards/000000.{HOOKPOINT}.safetensors")
    _delete(out / "shards/000001.json")
    cache = _harvest(tiny_lm, tiny_corpus, out, repair=True, **options)
    cache.verify()
    assert cache.is_complete
    shards = {n: d for n, d in _files(whole).items() if n.startswith("shards")}
    assert {n: d for n, d in _files(out).items() if n.startswith("shards")} == shards


@pytest.mark.parametrize("n_replaced", range(0, 12, 3))
def test_killed_repair_is_done_again(
    tiny_lm: LanguageModel,
    tiny_corpus: list[str],
    whole: Path,
    acts: Path,
    n_replaced: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    last = _last_shard(acts)
    for name in (ACTS, "shards/000001.json", f"shards/{last:06d}.json"):
        _flip(acts / name)
    _flip(acts / MANIFEST)
    real, n_done = Path.replace, 0

    def replace(self: Path, target: Path) -> Path:
        nonlocal n_done
        n_done += 1
        if n_done > n_replaced:
            raise _StopError
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(_StopError):
            _repair(tiny_lm, tiny_corpus, acts)
    _repair(tiny_lm, tiny_corpus, acts).verify()
    committed = {n: d for n, d in _files(acts).items() if n.startswith("shards")}
    assert committed == {n: d for n, d in _files(whole).items() if n.startswith("shards")}


def test_shards_of_a_cache_that_grew_are_never_made_longer(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    """A short shard in the middle: rows must not come twice when its record is lost."""
    out = tmp_path / "acts"
    for n_tokens in (140, 155, 400, 590):
        cache = _harvest(tiny_lm, tiny_corpus, out, n_tokens=n_tokens)
    rows = [record.n_rows for record in cache.parts[0].records]
    assert rows[2] + rows[3] < rows[1]
    expected = [(c.token_ids, c.acts) for c in cache.chunks(HOOKPOINT)]
    cases = ([2], [2, 3], [1, 2], [1, 2, 3], [2, 3, 4, 5], range(1, len(rows)), range(len(rows)))
    for lost in cases:
        for shard in lost:
            if (record := out / f"shards/{shard:06d}.json").exists():
                _flip(record)
        again = _repair(tiny_lm, tiny_corpus, out)
        again.verify()
        found = [(c.token_ids, c.acts) for c in again.chunks(HOOKPOINT)]
        for column in (0, 1):
            a, b = (torch.cat([row[column] for row in each]) for each in (found, expected))
            torch.testing.assert_close(a, b)
        ends = [(r.start, r.end) for r in again.parts[0].records]
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ends))


def test_text_that_is_shorter_now_is_told(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    """A generator has no revision: only what it yields tells that it is another."""

    def texts(n: int) -> Iterator[str]:
        return (f"Note {i}. The river crosses the bridge." for i in range(n))

    out = tmp_path / "acts"
    _harvest(tiny_lm, texts(200), out)
    _flip(out / f"shards/{_last_shard(out):06d}.{HOOKPOINT}.safetensors")
    with pytest.raises(CorpusError) as raised:
        _repair(tiny_lm, texts(3), out)
    assert "\n" not in str(raised.value)
    assert "generator" in str(raised.value)


# -- manifests -----------------------------------------------------------------------------------


def test_lost_manifest_never_costs_the_shards(
    tiny_lm: LanguageModel, tiny_corpus: list[str], whole: Path, acts: Path
) -> None:
    """Without --repair nothing is begun anew over shards that are there."""
    before = _files(whole)
    for lost in ([MANIFEST], [MANIFEST, MANIFEST_COPY]):
        for name in lost:
            (acts / name).unlink(missing_ok=True)
        for repair in (False, True) if MANIFEST_COPY in lost else (False,):
            with pytest.raises(CacheCorrupt) as raised:
                _repair(tiny_lm, tiny_corpus, acts, repair=repair)
            assert str(acts / MANIFEST) in str(raised.value)
            assert "\n" not in str(raised.value)
            assert ("--repair" in str(raised.value)) == (MANIFEST_COPY not in lost)
        with pytest.raises(CacheError):
            ActivationCache.open(acts)
        assert {n: d for n, d in _files(acts).items() if n.startswith("shards")} == {
            n: d for n, d in before.items() if n.startswith("shards")
        }


def test_lost_manifest_of_an_added_text_is_told(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    """Its rows must not vanish in silence."""
    out = tmp_path / "acts"
    _harvest(tiny_lm, tiny_corpus[:20], out)
    _harvest(tiny_lm, tiny_corpus[20:], out, extend=True)
    before = _files(out)
    (out / "parts" / "0001" / MANIFEST).unlink()
    with pytest.raises(CacheCorrupt) as raised:
        ActivationCache.open(out)
    assert str(out / "parts" / "0001" / MANIFEST) in str(raised.value)
    assert "--repair" in str(raised.value)
    _repair(tiny_lm, tiny_corpus[20:], out)
    assert _files(out) == before


def test_damage_in_one_part_is_mended_by_its_text(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "acts"
    texts = tiny_corpus[:20], tiny_corpus[20:]
    for text in texts:
        _harvest(tiny_lm, text, out, extend=True)
    before = _files(out)
    for name in (RECORD, f"parts/0001/{RECORD}"):
        _delete(out / name)
    with pytest.raises(CacheCorrupt, match="parts/0001 lacks shard 4"):
        _repair(tiny_lm, texts[0], out)
    _repair(tiny_lm, texts[1], out).verify()
    assert _files(out) == before


def test_old_cache_without_new_fields_opens_verifies_and_goes_on(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    """Format 1 as it was before parts, int8 and the manifest's copy."""
    out = tmp_path / "acts"
    cache = _harvest(tiny_lm, tiny_corpus, out, n_tokens=300)
    name, rows = cache.fingerprint_hash, [c.acts for c in cache.chunks(HOOKPOINT)]
    (out / MANIFEST_COPY).unlink()
    new = {"first_document", "quantization_fvu", "fingerprint", "calibrations", "quantization"}
    for file in [out / MANIFEST, *(out / "shards").glob("*.json")]:
        raw = json.loads(file.read_text())
        kept = {k: v for k, v in raw.items() if k not in new or (isinstance(v, dict) and v)}
        if "fingerprint" in kept:
            for field in ("min_doc_tokens", "only", "drop_duplicates", "rank", "world_size"):
                del kept["fingerprint"][field]
        _write_checked(file, kept)
    old = ActivationCache.open(out)
    old.verify()
    fields = json.loads((out / MANIFEST).read_text())["fingerprint"]
    text = json.dumps(fields, separators=(",", ":"))
    assert old.fingerprint_hash == name == xxhash.xxh3_128_hexdigest(text.encode())
    assert torch.equal(torch.cat([c.acts for c in old.chunks(HOOKPOINT)]), torch.cat(rows))
    _harvest(tiny_lm, tiny_corpus, out, n_tokens=300)
    assert _harvest(tiny_lm, tiny_corpus, out).n_tokens == 592


def _write_checked(file: Path, raw: dict[str, Any]) -> None:
    raw.pop("checksum", None)
    digest = xxhash.xxh3_64_hexdigest(json.dumps(raw, sort_keys=True).encode())
    file.write_text(json.dumps({**raw, "checksum": "xxh3:" + digest}))


def test_record_of_another_cache_is_no_record_of_this_one(
    tiny_lm: LanguageModel, tiny_corpus: list[str], whole: Path, acts: Path
) -> None:
    record = ShardRecord.read(LocalStore(acts), 4)
    (acts / "shards/000005.json").write_bytes((acts / RECORD).read_bytes())
    with pytest.raises(CacheCorrupt, match=f"is the record of shard {record.shard}"):
        ActivationCache.open(acts)
    _repair(tiny_lm, tiny_corpus, acts).verify()
    assert _files(acts) == _files(whole)
