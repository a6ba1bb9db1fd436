"""Harvesting: rows equal direct capture, interruptions don't show, mistakes are told in a line."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from activation_cache import (
    ActivationCache,
    CacheBusy,
    CacheError,
    CacheMismatch,
    CorpusError,
    HarvestConfig,
    HarvestProgress,
    HookpointError,
    LanguageModel,
    harvest,
    open_corpus,
)
from activation_cache.durable import locked

HOOKPOINTS = ["layers.1.resid_post", "layers.0.mlp_acts"]
SMALL: dict[str, Any] = {
    "n_tokens": 100_000,
    "ctx_len": 16,
    "batch_blocks": 4,
    "shard_bytes": 16_384,
    "storage_dtype": "float32",
}


def _harvest(lm: LanguageModel, data: Any, out: Path, **options: Any) -> ActivationCache:
    hookpoints = options.pop("hookpoints", HOOKPOINTS)
    return harvest(lm, data, hookpoints=hookpoints, out=out, **{**SMALL, **options})


def _files(folder: Path) -> dict[str, bytes]:
    """Everything that is committed: shards and their records."""
    return {f.name: f.read_bytes() for f in sorted((folder / "shards").iterdir())}


def _message(raised: pytest.ExceptionInfo[Exception]) -> str:
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("prepend_bos", [None, True])
def test_cached_rows_equal_direct_capture(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path, prepend_bos: bool | None
) -> None:
    cache = _harvest(tiny_lm, tiny_corpus, tmp_path / "acts", prepend_bos=prepend_bos)
    for hookpoint in HOOKPOINTS:
        for chunk in cache.chunks(hookpoint, rows=100):
            for first, last in itertools.pairwise(chunk.block_offsets.tolist()):
                block = chunk.token_ids[first:last]
                direct = tiny_lm.capture(block, [hookpoint]).acts[hookpoint][0]
                torch.testing.assert_close(chunk.acts[first:last], direct, rtol=1e-5, atol=1e-5)
                if prepend_bos:
                    assert block[0] == tiny_lm.tokenizer.bos_token_id
                    assert chunk.positions[first] == -1


def test_documents_come_back_as_they_were(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    texts = ["", *tiny_corpus[:5], "", *tiny_corpus[5:], ""]
    cache = _harvest(tiny_lm, texts, tmp_path / "acts", prepend_bos=True)
    documents = list(cache.documents())
    assert [d.doc_id for d in documents] == [i for i, text in enumerate(texts) if text]
    assert cache.n_documents == len(tiny_corpus)
    for document, text in zip(documents, tiny_corpus, strict=True):
        assert document.source == f"list:{document.doc_id + 1}"
        assert tiny_lm.tokenizer.decode(document.token_ids) == text + "<eos>"


def test_options_shape_the_cache(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    cache = _harvest(
        tiny_lm,
        tiny_corpus,
        tmp_path / "acts",
        hookpoints="layers.1.resid_post",
        max_doc_tokens=5,
        separate_documents=False,
        n_tokens=100,
        storage_dtype="bfloat16",
    )
    assert cache.n_tokens == 112  # rounded up to blocks
    assert not cache.manifest.is_exhausted
    whole = [d.token_ids for d in cache.documents()][:-1]
    assert all(len(ids) == 5 for ids in whole)
    assert tiny_lm.tokenizer.eos_token_id not in itertools.chain.from_iterable(whole)
    assert cache.hookpoints == ("layers.1.resid_post",)


class _StopError(Exception):
    pass


def _stop_at(n_reports: int) -> Callable[[HarvestProgress], None]:
    reports = itertools.count(1)

    def on_progress(_: HarvestProgress) -> None:
        if next(reports) == n_reports:
            raise _StopError

    return on_progress


def test_interrupted_harvest_equals_uninterrupted_one(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    texts = tiny_corpus[:25]
    whole = _harvest(tiny_lm, texts, tmp_path / "whole", prepend_bos=True)
    assert len(_files(tmp_path / "whole")) > 10
    n_reports = -(-whole.n_tokens // 64)
    for n in range(1, n_reports + 1):
        out = tmp_path / f"stopped{n}"
        with pytest.raises(_StopError):
            _harvest(tiny_lm, texts, out, prepend_bos=True, on_progress=_stop_at(n))
        assert not list(out.rglob("*.partial"))
        _harvest(tiny_lm, texts, out, prepend_bos=True)
        assert _files(out) == _files(tmp_path / "whole")


def test_harvest_that_stops_again_and_again_gets_there(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    _harvest(tiny_lm, tiny_corpus, tmp_path / "whole")
    out = tmp_path / "acts"
    for _ in range(100):
        try:
            cache = _harvest(tiny_lm, tiny_corpus, out, on_progress=_stop_at(3))
            break
        except _StopError:
            (out / "shards" / "999999.left.safetensors.partial").write_text("orphan")
            (out / "shards" / "000900.tokens.safetensors").write_text("orphan")
    assert cache.manifest.is_complete
    assert _files(out) == _files(tmp_path / "whole")


def test_complete_cache_is_opened_at_once(
    tiny_model: Callable[[str], Any], tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    first = _harvest(tiny_lm, tiny_corpus, tmp_path)
    stamps = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*")}
    with locked(tmp_path):  # reading waits for nobody
        again = _harvest(tiny_lm, tiny_corpus, tmp_path, on_progress=_stop_at(1))
    assert again.fingerprint_hash == first.fingerprint_hash
    assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.name != ".lock"} == {
        f: t for f, t in stamps.items() if f.name != ".lock"
    }


def test_progress_counts_up_to_the_rows(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    reports: list[HarvestProgress] = []
    cache = _harvest(tiny_lm, tiny_corpus, tmp_path, on_progress=reports.append)
    assert [r.n_tokens for r in reports] == sorted({r.n_tokens for r in reports})
    assert reports[-1].n_tokens == cache.n_tokens
    assert all(r.tokens_per_s > 0 and r.n_tokens_wanted == 100_000 for r in reports)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"ctx_len": 8}, "ctx_len=16, now it is 8"),
        ({"prepend_bos": True}, "bos_id=null, now it is 1"),
        ({"storage_dtype": "bfloat16"}, "storage_dtype=float32, now it is bfloat16"),
        ({"hookpoints": ["embed"]}, "hookpoints="),
        ({"max_doc_tokens": 3}, "max_doc_tokens=null, now it is 3"),
        ({"separate_documents": False}, "separator_id=2, now it is null"),
        ({"keep_first_position": False}, "keep_first_position=true, now it is false"),
        ({"batch_blocks": 2}, "batch_blocks=4, now it is 2"),
    ],
)
@pytest.mark.parametrize("is_complete", [True, False])
def test_mismatch_names_the_field(
    tiny_lm: LanguageModel,
    tiny_corpus: list[str],
    tmp_path: Path,
    change: dict[str, Any],
    field: str,
    is_complete: bool,
) -> None:
    if is_complete:
        _harvest(tiny_lm, tiny_corpus, tmp_path)
    else:
        with pytest.raises(_StopError):
            _harvest(tiny_lm, tiny_corpus, tmp_path, on_progress=_stop_at(6))
    before = _files(tmp_path)
    with pytest.raises(CacheMismatch) as raised:
        _harvest(tiny_lm, tiny_corpus, tmp_path, **change)
    assert _message(raised).startswith(f"{tmp_path} was made with {field}")
    assert _message(raised).endswith(": use the same, or harvest into another folder")
    assert _files(tmp_path) == before


def test_mismatch_of_model_and_text(
    tiny_model: Callable[[str], Any], tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    _harvest(tiny_lm, tiny_corpus, tmp_path)
    other = LanguageModel(tiny_model("qwen2"), tiny_lm.tokenizer, name="tiny-llama")
    with pytest.raises(CacheMismatch, match=r"was made with model_revision=xxh3:"):
        _harvest(other, tiny_corpus, tmp_path)
    with pytest.raises(CacheMismatch, match=r"was made with data_revision=xxh3:"):
        _harvest(tiny_lm, tiny_corpus[:-1], tmp_path)


def test_two_writers_one_wins(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    raised = []

    def meanwhile(_: HarvestProgress) -> None:
        with pytest.raises(CacheBusy) as error:
            _harvest(tiny_lm, tiny_corpus, tmp_path / "acts")
        raised.append(_message(error))

    _harvest(tiny_lm, tiny_corpus, tmp_path / "acts", on_progress=meanwhile).verify()
    assert raised[0].startswith(f"{tmp_path / 'acts'} is being written by process ")


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_empty_corpus_leaves_nothing_behind(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path, texts: list[str]
) -> None:
    with pytest.raises(CorpusError) as raised:
        _harvest(tiny_lm, texts, tmp_path / "new" / "acts")
    assert _message(raised) == "list is empty: no document holds a token"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    with pytest.raises(CorpusError):
        _harvest(tiny_lm, texts, tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


def test_failed_first_call_does_not_bind_the_next(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    with pytest.raises(_StopError):
        _harvest(tiny_lm, tiny_corpus, tmp_path, on_progress=_stop_at(1))
    cache = _harvest(tiny_lm, tiny_corpus[:9], tmp_path, ctx_len=8, hookpoints=["embed"])
    cache.verify()
    assert {f.name.split(".")[1] for f in tmp_path.rglob("*.safetensors")} == {"tokens", "embed"}


def test_mistakes_are_told_before_anything_is_written(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "acts"
    cases: list[tuple[type[Exception], dict[str, Any], str]] = [
        (HookpointError, {"hookpoints": ["layers.9.resid_post"]}, "the model has layers 0 to 2"),
        (CacheError, {"hookpoints": []}, "no hookpoint given"),
        (CacheError, {"storage_dtype": "int3"}, "unknown storage_dtype 'int3': expected float32"),
        (CacheError, {"ctx_len": 500}, "ctx_len=500 is longer than tiny-llama allows (128)"),
        (
            CacheError,
            {"ctx_length": 8},
            "setting ctx_length=8: extra inputs are not permitted; did you mean ctx_len?",
        ),
        (CacheError, {"n_tokens": 0}, "setting n_tokens=0: input should be greater than 0"),
        (CacheError, {"config": HarvestConfig()}, "in the config or as keywords, not in both"),
        (CorpusError, {"text_column": "body"}, "has no column 'body': it has text"),
    ]
    for kind, options, expected in cases:
        with pytest.raises(kind) as raised:
            _harvest(tiny_lm, [{"text": "a"}], out, **options)
        assert expected in _message(raised)
        assert not out.exists()


def test_an_edited_model_is_not_harvested(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    with (
        tiny_lm.edit({"layers.0.resid_post": lambda x: 2 * x}),
        pytest.raises(CacheError, match="tiny-llama is being edited: "),
    ):
        _harvest(tiny_lm, tiny_corpus, tmp_path / "acts")
    assert not (tmp_path / "acts").exists()


def test_foreign_folders_are_left_alone(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(CacheError) as raised:
        _harvest(tiny_lm, tiny_corpus, tmp_path)
    assert _message(raised) == f"{tmp_path} holds other files and no cache: choose an empty folder"
    with pytest.raises(CacheError) as raised:
        _harvest(tiny_lm, tiny_corpus, tmp_path / "thesis.tex")
    assert _message(raised) == f"{tmp_path / 'thesis.tex'} is a file: choose a folder"
    with pytest.raises(CacheError, match="can't make the folder"):
        _harvest(tiny_lm, tiny_corpus, tmp_path / "thesis.tex" / "acts")
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]


def test_unwritable_folder(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # root may write anywhere
    with pytest.raises(CacheError) as raised:
        _harvest(tiny_lm, tiny_corpus, tmp_path / "acts")
    assert _message(raised) == f"can't make the folder {tmp_path / 'acts'}: Permission denied"


def test_faults_of_the_text_are_not_taken_for_faults_of_the_disk(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    class Flaky:
        is_down = True

        def __iter__(self) -> Any:
            yield from tiny_corpus[:20]
            if self.is_down:
                raise ConnectionResetError("connection reset by peer")
            yield from tiny_corpus[20:]

    flaky = Flaky()
    with pytest.raises(CorpusError, match="can't read on in Flaky: connection reset by peer"):
        _harvest(tiny_lm, flaky, tmp_path / "acts")
    flaky.is_down = False
    _harvest(tiny_lm, flaky, tmp_path / "acts")
    _harvest(tiny_lm, tiny_corpus, tmp_path / "whole")
    data = {name: b for name, b in _files(tmp_path / "acts").items() if "safetensors" in name}
    assert data == {n: b for n, b in _files(tmp_path / "whole").items() if "safetensors" in n}


def test_a_corpus_is_taken_too(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    cache = _harvest(tiny_lm, open_corpus(t for t in tiny_corpus), tmp_path)
    assert cache.n_documents == len(tiny_corpus)
    assert cache.provenance(HOOKPOINTS[0])["data"] == "generator"
