"""One cache from several texts or ranks; and what is told before a model is loaded."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from activation_cache import (
    ActivationCache,
    CacheError,
    CacheMismatch,
    CorpusError,
    HarvestProgress,
    LanguageModel,
    harvest,
)

HOOKPOINT = "layers.1.resid_post"
SMALL: dict[str, Any] = {
    "hookpoints": [HOOKPOINT],
    "n_tokens": 100_000,
    "ctx_len": 16,
    "batch_blocks": 4,
    "shard_bytes": 9_000,  # one pass of 64 rows
    "storage_dtype": "float32",
}


def _harvest(lm: Any, data: Any, out: Path, **options: Any) -> ActivationCache:
    return harvest(lm, data, out=out, **{**SMALL, **options})


def _rows(cache: ActivationCache) -> tuple[Tensor, Tensor, Tensor]:
    chunks = list(cache.chunks(HOOKPOINT))
    acts, ids, docs = (
        torch.cat([getattr(c, name) for c in chunks]) for name in ("acts", "token_ids", "doc_ids")
    )
    return acts, ids, docs


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(f.relative_to(folder)): f.read_bytes()
        for f in sorted(folder.rglob("*"))
        if f.is_file() and f.name != ".lock"
    }


def _shards(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in _files(folder).items() if "shards/" in name}


def _message(raised: pytest.ExceptionInfo[Exception]) -> str:
    assert "\n" not in str(raised.value)
    return str(raised.value)


class _StopError(Exception):
    pass


def _stop_at(n_tokens: int) -> Callable[[HarvestProgress], None]:
    def stop(progress: HarvestProgress) -> None:
        if progress.n_tokens >= n_tokens:
            raise _StopError

    return stop


# -- more tokens ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("n_first", [128, 256])
def test_more_tokens_equal_a_fresh_larger_harvest(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path, dtype: str, n_first: int
) -> None:
    options = {"storage_dtype": dtype, "shard_bytes": 9_000 if dtype == "float32" else 2_600}
    first = _harvest(tiny_lm, tiny_corpus, tmp_path / "a", n_tokens=n_first, **options)
    assert first.n_tokens == n_first
    before = _shards(tmp_path / "a")
    grown = _harvest(tiny_lm, tiny_corpus, tmp_path / "a", n_tokens=520, **options)
    _harvest(tiny_lm, tiny_corpus, tmp_path / "b", n_tokens=520, **options)
    assert {name: _shards(tmp_path / "a")[name] for name in before} == before
    assert _shards(tmp_path / "a") == _shards(tmp_path / "b")
    assert grown.n_tokens == 528
    assert grown.is_complete


def test_more_tokens_behind_a_short_shard_are_the_same_tokens(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    for n_tokens in (100, 110, 300):
        grown = _harvest(tiny_lm, tiny_corpus, tmp_path / "a", n_tokens=n_tokens)
    fresh = _harvest(tiny_lm, tiny_corpus, tmp_path / "b", n_tokens=300)
    for a, b in zip(_rows(grown), _rows(fresh), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_hookpoints_may_be_named_in_any_order(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    """A harvest that goes on with them turned round writes the same bytes."""
    places = [HOOKPOINT, "embed"]
    for out, second in (("a", places), ("b", places[::-1])):
        _harvest(tiny_lm, tiny_corpus, tmp_path / out, hookpoints=places, n_tokens=128)
        _harvest(tiny_lm, tiny_corpus, tmp_path / out, hookpoints=second, n_tokens=300)
    assert _shards(tmp_path / "a") == _shards(tmp_path / "b")
    (tmp_path / "b" / "shards" / "000003.embed.safetensors").unlink()
    _harvest(
        tiny_lm, tiny_corpus, tmp_path / "b", hookpoints=second, n_tokens=300, repair=True
    ).verify()
    assert _shards(tmp_path / "a") == _shards(tmp_path / "b")


def test_an_empty_folder_beside_the_shards_stays(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    _harvest(tiny_lm, tiny_corpus, tmp_path, n_tokens=128)
    mine = [tmp_path / name for name in ("aa", "notes", "zz")]
    for folder in mine:
        folder.mkdir()
    _harvest(tiny_lm, tiny_corpus, tmp_path, n_tokens=300)
    assert all(folder.is_dir() for folder in mine)


# -- another text --------------------------------------------------------------------------------


@pytest.fixture
def two(tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path) -> ActivationCache:
    """A cache of two texts of 15 and 25 documents."""
    _harvest(tiny_lm, tiny_corpus[:15], tmp_path / "two")
    return _harvest(tiny_lm, tiny_corpus[15:], tmp_path / "two", extend=True)


def test_two_texts_are_one_cache(
    tiny_lm: LanguageModel, tiny_corpus: list[str], two: ActivationCache, tmp_path: Path
) -> None:
    documents = list(two.documents())
    assert [tiny_lm.tokenizer.decode(d.token_ids) for d in documents] == [
        f"{text}<eos>" for text in tiny_corpus
    ]
    numbers = [d.doc_id for d in documents]
    assert numbers == sorted(set(numbers))
    assert [d.source for d in documents] == [
        *(f"list:{i}" for i in range(1, 16)),
        *(f"list:{i}" for i in range(1, 26)),
    ]
    assert two.is_complete
    assert two.n_documents == 40
    alone = [
        _harvest(tiny_lm, text, tmp_path / f"{len(text)}")
        for text in (tiny_corpus[:15], tiny_corpus[15:])
    ]
    assert torch.equal(_rows(two)[0], torch.cat([_rows(cache)[0] for cache in alone]))
    assert two.n_tokens == sum(cache.n_tokens for cache in alone)
    assert len({two.fingerprint_hash, *(cache.fingerprint_hash for cache in alone)}) == 3
    two.verify()
    acts = list(two.document_acts(HOOKPOINT))
    assert [d.doc_id for d in acts] == numbers
    batches = torch.cat(list(two.batches(HOOKPOINT, 50, split="all")))
    assert len(batches) == two.n_rows(HOOKPOINT, split="all")


def test_a_text_that_is_there_is_not_added_again(
    tiny_lm: LanguageModel, tiny_corpus: list[str], two: ActivationCache
) -> None:
    folder = Path(two.path)
    before = _files(folder)
    for text in (tiny_corpus[:15], tiny_corpus[15:]):
        for extend in (False, True):
            again = _harvest(tiny_lm, text, folder, extend=extend)
            assert again.n_tokens == two.n_tokens
    assert _files(folder) == before


@pytest.mark.parametrize("n", [1, 64, 128, 300])
def test_added_text_that_was_killed_goes_on(
    tiny_lm: LanguageModel, tiny_corpus: list[str], two: ActivationCache, tmp_path: Path, n: int
) -> None:
    out = tmp_path / "killed"
    _harvest(tiny_lm, tiny_corpus[:15], out)
    with pytest.raises(_StopError):
        _harvest(tiny_lm, tiny_corpus[15:], out, extend=True, on_progress=_stop_at(n))
    assert not ActivationCache.open(out).is_complete
    assert _harvest(tiny_lm, tiny_corpus[15:], out, extend=True).is_complete
    assert _shards(out) == _shards(Path(two.path))


def test_added_text_can_get_more_tokens_and_the_first_can_not(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    _harvest(tiny_lm, tiny_corpus[:15], tmp_path, n_tokens=64)
    _harvest(tiny_lm, tiny_corpus[15:], tmp_path, n_tokens=64, extend=True)
    before = _files(tmp_path)
    for extend in (False, True):
        with pytest.raises(CacheMismatch) as raised:
            _harvest(tiny_lm, tiny_corpus[:15], tmp_path, n_tokens=128, extend=extend)
        assert _message(raised) == (
            f"{tmp_path}: another text was added behind this one, so it can't go on to "
            "n_tokens=128; add documents as a text of their own with --extend"
        )
    assert _files(tmp_path) == before
    assert _harvest(tiny_lm, tiny_corpus[15:], tmp_path, n_tokens=128).n_tokens == 64 + 128


def test_text_that_has_ended_can_be_asked_for_more(
    tiny_lm: LanguageModel, tiny_corpus: list[str], two: ActivationCache
) -> None:
    """There is nothing to add, so nothing to refuse."""
    again = _harvest(tiny_lm, tiny_corpus[:15], Path(two.path), n_tokens=200_000)
    assert again.n_tokens == two.n_tokens


def test_nothing_is_added_behind_an_unfinished_text(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    with pytest.raises(_StopError):
        _harvest(tiny_lm, tiny_corpus[:15], tmp_path, on_progress=_stop_at(400))
    before = _files(tmp_path)
    with pytest.raises(CacheMismatch) as raised:
        _harvest(tiny_lm, tiny_corpus[15:], tmp_path, extend=True)
    assert _message(raised) == (
        f"{tmp_path} is not finished: run its harvest again to the end before another text is added"
    )
    assert _files(tmp_path) == before


def test_extending_nothing_is_a_first_harvest(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    _harvest(tiny_lm, tiny_corpus, tmp_path / "a", extend=True)
    _harvest(tiny_lm, tiny_corpus, tmp_path / "b")
    assert _shards(tmp_path / "a") == _shards(tmp_path / "b")


def test_another_text_is_only_added_on_demand(
    tiny_lm: LanguageModel, tiny_corpus: list[str], two: ActivationCache
) -> None:
    with pytest.raises(CacheMismatch, match="was made with data_revision=xxh3:"):
        _harvest(tiny_lm, ["A third text."], Path(two.path))


def test_generators_cannot_be_told_apart(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    """A second one must not be taken for the first, and left out in silence."""

    def texts(first: int) -> Iterator[str]:
        return (text for text in tiny_corpus[first : first + 10])

    _harvest(tiny_lm, texts(0), tmp_path, n_tokens=64)
    with pytest.raises(CacheMismatch) as raised:
        _harvest(tiny_lm, texts(10), tmp_path, extend=True)
    assert _message(raised).startswith(f"{tmp_path} holds a generator, and nothing tells whether ")
    assert _harvest(tiny_lm, texts(0), tmp_path, n_tokens=128).n_tokens == 128
    _harvest(tiny_lm, list(texts(10)), tmp_path, extend=True)


def test_two_columns_are_two_texts(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "The river.", "title": "A small bird"}\n')
    _harvest(tiny_lm, str(rows), tmp_path / "acts")
    cache = _harvest(tiny_lm, str(rows), tmp_path / "acts", text_column="title", extend=True)
    texts = [tiny_lm.tokenizer.decode(d.token_ids) for d in cache.documents()]
    assert texts == ["The river.<eos>", "A small bird<eos>"]


SETTINGS = [
    ({"ctx_len": 8}, "ctx_len=16, now it is 8"),
    ({"storage_dtype": "bfloat16"}, "storage_dtype=float32, now it is bfloat16"),
    ({"hookpoints": ["embed"]}, "hookpoints="),
    ({"keep_first_position": False}, "keep_first_position=true, now it is false"),
    ({"batch_blocks": 2}, "batch_blocks=4, now it is 2"),
]


def _no_model() -> LanguageModel:
    pytest.fail("a model was loaded for what can be told without it")


@pytest.mark.parametrize(("change", "field"), SETTINGS)
def test_texts_with_other_settings_are_refused_before_a_model_is_loaded(
    tiny_lm: LanguageModel,
    tiny_corpus: list[str],
    tmp_path: Path,
    change: dict[str, Any],
    field: str,
) -> None:
    _harvest(tiny_lm, tiny_corpus[:5], tmp_path)
    before = _files(tmp_path)
    with pytest.raises(CacheMismatch) as raised:
        _harvest(_no_model, tiny_corpus[5:], tmp_path, extend=True, **change)
    assert _message(raised).startswith(f"{tmp_path} was made with {field}")
    assert _files(tmp_path) == before


def test_texts_of_another_model_are_refused(
    tiny_model: Callable[[str], Any], tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    _harvest(tiny_lm, tiny_corpus[:5], tmp_path)
    before = _files(tmp_path)
    other = LanguageModel(tiny_model("qwen2"), tiny_lm.tokenizer, name="tiny-llama")
    with pytest.raises(CacheMismatch, match="was made with model_revision="):
        _harvest(other, tiny_corpus[5:], tmp_path, extend=True)
    with pytest.raises(CacheMismatch, match="bos_id=null, now it is 1"):
        _harvest(tiny_lm, tiny_corpus[5:], tmp_path, extend=True, prepend_bos=True)
    assert _files(tmp_path) == before


def test_texts_may_differ_in_which_documents_they_take(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    _harvest(tiny_lm, tiny_corpus[:5], tmp_path)
    cache = _harvest(tiny_lm, tiny_corpus[5:], tmp_path, extend=True, max_doc_tokens=3)
    assert max(len(d.token_ids) for d in list(cache.documents())[5:]) == 4  # with the separator


# -- a loader instead of a model -----------------------------------------------------------------


def test_loader_is_not_called_for_what_can_be_told_without_it(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    foreign, acts = tmp_path / "thesis", tmp_path / "acts"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    _harvest(tiny_lm, tiny_corpus, acts)
    rows = [{"body": text} for text in tiny_corpus]
    cases: list[tuple[type[Exception], Any, Path, dict[str, Any], str]] = [
        (CacheError, tiny_corpus, foreign, {}, "holds other files and no cache"),
        (CorpusError, rows, tmp_path / "new", {}, "has no column 'text': it has body"),
        (CorpusError, "missing.jsonl", tmp_path / "new", {}, "no such file"),
        (CacheMismatch, tiny_corpus[1:], acts, {}, "was made with data_revision="),
        (CacheMismatch, tiny_corpus, acts, {"hookpoints": ["embed"]}, "was made with hookpoints="),
        (
            CacheMismatch,
            tiny_corpus,
            acts,
            {"min_doc_tokens": 3},
            "min_doc_tokens=null, now it is 3",
        ),
        (CacheError, tiny_corpus, tmp_path / "new", {"hookpoints": []}, "no hookpoint given"),
        (CacheError, tiny_corpus, tmp_path / "new", {"ctx_length": 3}, "did you mean ctx_len?"),
        (CacheError, tiny_corpus, tmp_path / "new", {"rank": 3, "world_size": 3}, "rank=3 of"),
        (CacheMismatch, tiny_corpus, acts, {"rank": 1, "world_size": 3}, "begun with world_size=1"),
    ]
    for kind, data, out, options, expected in cases:
        with pytest.raises(kind) as raised:
            _harvest(_no_model, data, out, **options)
        assert expected in _message(raised)
    assert not (tmp_path / "new").exists()


def test_loader_is_called_once(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    calls = []

    def load() -> LanguageModel:
        calls.append(1)
        return tiny_lm

    _harvest(load, tiny_corpus, tmp_path / "acts")
    assert len(calls) == 1
    _harvest(tiny_lm, tiny_corpus, tmp_path / "whole")
    assert _shards(tmp_path / "acts") == _shards(tmp_path / "whole")
    _harvest(load, tiny_corpus, tmp_path / "acts", repair=True)
    assert len(calls) == 2


# -- ranks ---------------------------------------------------------------------------------------

N_RANKS = 3


def _ranks(lm: LanguageModel, texts: list[str], out: Path, **options: Any) -> ActivationCache:
    for rank in range(N_RANKS):
        cache = _harvest(lm, texts, out, rank=rank, world_size=N_RANKS, **options)
    return cache


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_ranks_together_hold_every_document_once(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path, dtype: str
) -> None:
    texts = ["", *tiny_corpus[:20], "", *tiny_corpus[20:]]
    cache = _ranks(tiny_lm, texts, tmp_path / "ranks", storage_dtype=dtype)
    single = _harvest(tiny_lm, texts, tmp_path / "single", storage_dtype=dtype)
    documents = list(cache.documents())
    ranks = [d.doc_id % N_RANKS for d in documents]
    assert ranks == sorted(ranks)  # rank after rank, ascending within each
    for rank in range(N_RANKS):
        mine = [d.doc_id for d in documents if d.doc_id % N_RANKS == rank]
        assert mine == sorted(set(mine))
    by_number = {d.doc_id: (d.source, d.token_ids) for d in documents}
    assert len(by_number) == len(documents)
    assert by_number == {d.doc_id: (d.source, d.token_ids) for d in single.documents()}
    assert cache.is_complete
    cache.verify()
    acts = {d.doc_id: d for d in cache.document_acts(HOOKPOINT)}
    for doc_id, (_, token_ids) in by_number.items():
        assert acts[doc_id].token_ids.tolist() == token_ids
        assert acts[doc_id].positions.tolist() == list(range(len(token_ids)))
    names = {str(r.calibrations) for part in cache.parts for r in part.records}
    assert len(names) == 1  # every rank calibrates on the beginning of the whole text


def test_each_rank_takes_its_share_of_the_tokens(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    cache = _ranks(tiny_lm, tiny_corpus, tmp_path, n_tokens=600)
    shares = [sum(r.n_rows for r in part.records) for part in cache.parts]
    assert shares == [208, 208, 208]  # 200 in whole blocks
    assert not cache.is_exhausted
    more = _ranks(tiny_lm, tiny_corpus, tmp_path, n_tokens=100_000)
    counts = Counter(d.doc_id for d in more.documents())
    assert counts == Counter(range(40))


def test_order_does_not_depend_on_which_rank_ran_first(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    caches = []
    for order in ((0, 1, 2), (2, 0, 1)):
        for rank in order:
            out = tmp_path / f"{order[0]}"
            cache = _harvest(tiny_lm, tiny_corpus, out, rank=rank, world_size=N_RANKS)
        caches.append(cache)
    for a, b in zip(*map(_rows, caches), strict=True):
        assert torch.equal(a, b)
    assert _shards(tmp_path / "0") == _shards(tmp_path / "2")


def test_one_rank_that_was_killed_goes_on(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    _ranks(tiny_lm, tiny_corpus, tmp_path / "whole")
    out = tmp_path / "acts"
    for rank in (0, 2):
        _harvest(tiny_lm, tiny_corpus, out, rank=rank, world_size=N_RANKS)
    with pytest.raises(_StopError):
        _harvest(tiny_lm, tiny_corpus, out, rank=1, world_size=N_RANKS, on_progress=_stop_at(130))
    assert not ActivationCache.open(out).is_complete
    _harvest(tiny_lm, tiny_corpus, out, rank=1, world_size=N_RANKS)
    assert ActivationCache.open(out).is_complete
    assert _shards(out) == _shards(tmp_path / "whole")


def test_text_added_by_ranks_has_numbers_of_its_own(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    _ranks(tiny_lm, tiny_corpus[:15], tmp_path)
    cache = _ranks(tiny_lm, tiny_corpus[15:], tmp_path, extend=True)
    numbers = Counter(d.doc_id for d in cache.documents())
    assert len(numbers) == 40
    assert set(numbers.values()) == {1}
    assert cache.is_complete


def test_cache_is_complete_only_with_all_ranks(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    for rank, expected in ((1, False), (0, False), (2, True)):
        cache = _harvest(tiny_lm, tiny_corpus, tmp_path, rank=rank, world_size=N_RANKS)
        assert cache.is_complete == expected
        assert ActivationCache.open(tmp_path).is_complete == expected


def test_wrong_world_size_is_told(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    _harvest(tiny_lm, tiny_corpus, tmp_path / "ranks", rank=0, world_size=3)
    _harvest(tiny_lm, tiny_corpus, tmp_path / "single")
    before = _files(tmp_path)
    part = tmp_path / "ranks" / "parts" / "0000-rank-0000"
    for out, world_size, where, was in (
        (tmp_path / "ranks", 2, part, 3),
        (tmp_path / "ranks", 1, part, 3),
        (tmp_path / "single", 2, tmp_path / "single", 1),
    ):
        with pytest.raises(CacheMismatch) as raised:
            _harvest(_no_model, tiny_corpus, out, rank=world_size - 1, world_size=world_size)
        assert _message(raised) == (
            f"{where} was begun with world_size={was}, now it is {world_size}: use the same, or "
            "harvest into another folder"
        )
    assert _files(tmp_path) == before


def test_ranks_of_one_harvest_read_one_text(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    _harvest(tiny_lm, tiny_corpus, tmp_path, rank=0, world_size=2)
    with pytest.raises(CacheMismatch, match="0000-rank-0000 was made with data_revision="):
        _harvest(_no_model, tiny_corpus[1:], tmp_path, rank=1, world_size=2)
    with pytest.raises(CacheMismatch, match="0000-rank-0000 was made with max_doc_tokens=null"):
        _harvest(_no_model, tiny_corpus, tmp_path, rank=1, world_size=2, max_doc_tokens=9)


def test_nothing_is_added_before_all_ranks_are_there(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    """A rank that comes late would have the numbers of the added text."""
    for rank in (0, 2):
        _harvest(tiny_lm, tiny_corpus[:15], tmp_path, rank=rank, world_size=3)
    with pytest.raises(CacheMismatch) as raised:
        _harvest(tiny_lm, tiny_corpus[15:], tmp_path, extend=True)
    assert _message(raised) == (
        f"{tmp_path} lacks ranks of its text: run all of them to the end before another text is "
        "added"
    )


def test_ranks_that_begin_at_once_add_the_same_text(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    """Rank 1 comes while rank 0 has made its folder, and nothing in it yet."""
    _harvest(tiny_lm, tiny_corpus[:15], tmp_path)
    (tmp_path / "parts" / "0001-rank-0000" / "shards").mkdir(parents=True)
    for rank in (1, 0):
        cache = _harvest(tiny_lm, tiny_corpus[15:], tmp_path, extend=True, rank=rank, world_size=2)
    assert cache.is_complete
    assert {part.manifest.first_document for part in cache.parts[1:]} == {
        cache.parts[0].next_document
    }
    names = sorted(f.name for f in (tmp_path / "parts").iterdir())
    assert names == ["0001-rank-0000", "0001-rank-0001"]


def test_a_rank_leaves_what_another_one_writes(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    """Sweeping, repairing and ending stay inside a part."""
    foreign: list[Path] = []

    def meanwhile(progress: HarvestProgress) -> None:
        others = list(tmp_path.rglob("0000-rank-0001/shards/*"))
        foreign.extend(f for f in others if f not in foreign)
        options = {"rank": 0, "world_size": 2, "repair": progress.n_tokens > 200}
        _harvest(tiny_lm, tiny_corpus, tmp_path, **options)
        assert all(f.exists() for f in others if f.suffix != ".partial")

    _harvest(tiny_lm, tiny_corpus, tmp_path, rank=1, world_size=2, on_progress=meanwhile).verify()
    assert any(f.suffix == ".partial" for f in foreign)
    assert any(f.suffix == ".json" for f in foreign)
