"""Every kind of text source, and what is said of those that can't be read."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_cache import CorpusError, open_corpus
from activation_cache.wikipedia import prose_of

TEXTS = ["First note.", "Zweite Notiz, über Füchse.", "第三"]


def _jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: t, "n": 1}) + "\n" for t in texts))
    return path


def _parquet(path: Path, texts: list[Any], column: str = "text") -> Path:
    pq.write_table(pa.table({column: texts, "n": [1] * len(texts)}), path)
    return path


def _texts(data: Any, start: int = 0, **options: Any) -> list[str]:
    return [d.text for d in open_corpus(data, **options).documents(start)]


def _error(data: Any, **options: Any) -> str:
    with pytest.raises(CorpusError) as raised:
        list(open_corpus(data, **options).documents())
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_every_source_gives_the_same_documents(tmp_path: Path) -> None:
    rows = [{"text": t} for t in TEXTS]
    txt = tmp_path / "c.txt"
    txt.write_text("\n\n\n".join(TEXTS))
    sources: list[Any] = [
        str(_jsonl(tmp_path / "a.jsonl", TEXTS)),
        _parquet(tmp_path / "b.parquet", TEXTS),
        txt,
        TEXTS,
        tuple(rows),
        datasets.Dataset.from_list(rows),
        datasets.Dataset.from_list(rows).to_iterable_dataset(),
    ]
    for source in sources:
        assert _texts(source) == TEXTS
        assert _texts(source, start=2) == TEXTS[2:]
    assert _texts(iter(TEXTS)) == TEXTS
    assert _texts(t for t in TEXTS) == TEXTS


def test_folder_is_read_in_the_order_of_its_files(tmp_path: Path) -> None:
    _jsonl(tmp_path / "2.jsonl", TEXTS[1:])
    (tmp_path / "1.txt").write_text(TEXTS[0])
    (tmp_path / "ignored.csv").write_text("x")
    corpus = open_corpus(tmp_path)
    assert [(d.text, d.source) for d in corpus.documents()] == [
        (TEXTS[0], "1.txt:1"),
        (TEXTS[1], "2.jsonl:1"),
        (TEXTS[2], "2.jsonl:2"),
    ]


def test_revision_changes_with_the_text(tmp_path: Path) -> None:
    file = _jsonl(tmp_path / "a.jsonl", TEXTS)
    before = open_corpus(file).revision
    assert open_corpus(file).revision == before
    _jsonl(file, [*TEXTS[:2], "第四"])
    assert open_corpus(file).revision != before
    assert open_corpus(TEXTS).revision != open_corpus(TEXTS[:2]).revision


def test_missing_column_lists_the_columns(tmp_path: Path) -> None:
    listed = "has no column 'body': it has text, n. Name the column that holds the text with"
    jsonl, parquet = _jsonl(tmp_path / "a.jsonl", TEXTS), _parquet(tmp_path / "b.parquet", TEXTS)
    assert _error(jsonl, text_column="body").startswith(f"{jsonl}:1 {listed}")
    assert _error(parquet, text_column="body").startswith(f"{parquet} {listed}")
    dataset = datasets.Dataset.from_dict({"text": TEXTS, "n": [1, 2, 3]})
    with pytest.raises(CorpusError, match=f"{listed} --text-column"):
        open_corpus(dataset, text_column="body")  # at once, before anything is read
    with pytest.raises(CorpusError, match="has no column 'body': it has text"):
        open_corpus([{"text": "a"}], text_column="body")


def test_broken_line_is_named_by_file_and_number(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "a"}\n\n{"text": \n{"text": "b"}\n')
    assert _error(file).startswith(f"{file}:3 is not JSON (")
    file.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert _error(file).startswith(f"{file}:2 is not JSON ('utf-8' codec")
    file.write_text('{"text": "a"}\n[1]\n')
    assert _error(file) == f"{file}:2: expected a text or a dict, found list"
    file.write_text('{"text": ["a", "b"]}\n')
    assert _error(file) == f"{file}:1: column 'text' holds list: expected text"


def test_halves_of_characters_and_missing_texts_are_mended(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('\ufeff{"text": "a\\ud83d"}\n{"text": null}\n{"text": "\\ud83d\\ude42"}\n')
    assert _texts(file) == ["a\ufffd", "", "🙂"]
    assert _texts(["a\ud83d"]) == ["a\ufffd"]
    assert open_corpus(["a\ud83d"]).revision.startswith("xxh3:")


def test_torn_parquet_is_named(tmp_path: Path) -> None:
    file = _parquet(tmp_path / "a.parquet", TEXTS)
    file.write_bytes(file.read_bytes()[:-20])
    assert _error(file).startswith(f"can't read {file}: ")
    numbers = _parquet(tmp_path / "b.parquet", [1, 2])
    assert _error(numbers) == "b.parquet:1: column 'text' holds int: expected text"


def test_long_txt_is_cut_at_paragraphs_and_then_at_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    paragraph = "\n".join("x" * 99 for _ in range(30)) + "\n"
    file.write_text("\n".join([paragraph] * 10))
    documents = _texts(file)
    assert [len(d.replace("\n", "")) for d in documents] == [8910, 8910, 8910, 2970]
    file.write_text("x" * 99 + "\n" * 1 + ("y" * 99 + "\n") * 2000)
    sizes = [len(d.replace("\n", "")) for d in _texts(file)]
    assert sum(sizes) == 99 * 2001
    assert max(sizes) < 66_000


def test_objects_that_are_no_texts_are_refused() -> None:
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS})})
    assert _error(splits) == "data is a DatasetDict of train: give one of them"
    assert _error(7) == "data is int: expected a path, a hub dataset, or texts"
    assert _error([1]) == "list: expected a text or a dict, found int"


def test_generator_that_was_read_from_is_refused() -> None:
    generator = (t for t in TEXTS)
    next(generator)
    assert "generator that has been read from" in _error(generator)


def test_failing_network_is_told_and_not_mistaken_for_the_end() -> None:
    class Flaky:
        def __iter__(self) -> Iterator[str]:
            yield "a"
            raise ConnectionResetError("connection reset by peer")

    assert _error(Flaky()) == (
        "can't read on in Flaky: connection reset by peer. What was committed is safe: run it again"
    )


def test_unknown_names_are_told_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    start = time.perf_counter()
    assert _error("nobody/no-such-data") == (
        "unknown data 'nobody/no-such-data': it is no .jsonl, .txt or .parquet file, no folder of "
        "them, and not to be had from the Hugging Face hub (it can't be reached). Check the path "
        "or the name"
    )
    assert _error("no/such.jsonl") == "can't read the text file 'no/such.jsonl': no such file"
    (tmp_path / "a.csv").write_text("text\n")
    assert _error(tmp_path / "a.csv").endswith("expected .jsonl, .txt, .parquet")
    assert _error("A text in the place of a path. " * 200) == (
        "data 'A text in the place of a path. A text in'... is no path: File name too long. Give "
        "texts themselves as a list"
    )
    assert time.perf_counter() - start < 2
    (tmp_path / "empty").mkdir()
    assert _error(tmp_path / "empty").startswith(f"unknown data {str(tmp_path / 'empty')!r}")


LANGUAGES = ["en", "de", "en", "en", "fr", None, "en", "de", "en"]
ROWS = [
    {"text": t, "language": g, "score": n, "is_good": n < 2}
    for n, (t, g) in enumerate(zip("abacabbca", LANGUAGES, strict=True))
]


def _sources_of_rows(tmp_path: Path) -> list[Any]:
    jsonl, parquet = tmp_path / "a.jsonl", tmp_path / "b.parquet"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), parquet, row_group_size=2)
    dataset = datasets.Dataset.from_list(ROWS)
    return [jsonl, parquet, ROWS, dataset, dataset.to_iterable_dataset(num_shards=2)]


def _numbered(data: Any, *, start: int = 0, **options: Any) -> list[tuple[int, str]]:
    return [(n, d.text) for n, d in open_corpus(data, **options).numbered(start)]


def test_only_keeps_matching_rows_and_their_numbers(tmp_path: Path) -> None:
    english = [(n, row["text"]) for n, row in enumerate(ROWS) if row["language"] == "en"]
    for source in _sources_of_rows(tmp_path):
        assert _numbered(source, only={"language": "en"}) == english
        assert _numbered(source, only={"language": "en"}, start=3) == english[2:]
        assert _numbered(source, only={"language": "en", "text": "b"}) == [(6, "b")]
        assert _numbered(source, only={"score": "7"}) == [(7, "c")]
        assert _numbered(source, only={"is_good": "true"}) == [(0, "a"), (1, "b")]
        assert _numbered(source, only={"is_good": True}) == [(0, "a"), (1, "b")]
        assert _numbered(source, only={"language": "None"}) == []
        assert open_corpus(source, only={}).only == {}


def test_duplicates_are_left_out_wherever_reading_begins(tmp_path: Path) -> None:
    distinct = [(0, "a"), (1, "b"), (3, "c")]
    english = [(0, "a"), (3, "c"), (6, "b")]  # the first "b" that is English
    for source in _sources_of_rows(tmp_path):
        for start in range(len(ROWS) + 2):
            left = [pair for pair in distinct if pair[0] >= start]
            assert _numbered(source, drop_duplicates=True, start=start) == left
            filters: dict[str, Any] = {"only": {"language": "en"}, "drop_duplicates": True}
            left = [pair for pair in english if pair[0] >= start]
            assert _numbered(source, **filters, start=start) == left


def test_ranks_that_read_everything_drop_each_others_duplicates() -> None:
    corpus = open_corpus(list("abacabbca"), drop_duplicates=True)
    ranks = [list(corpus.numbered(rank=rank, world_size=2)) for rank in range(2)]
    assert [[(n, d.text) for n, d in rank] for rank in ranks] == [[(0, "a")], [(1, "b"), (3, "c")]]


def test_filter_by_an_unknown_column_lists_the_columns(tmp_path: Path) -> None:
    jsonl, parquet, rows, dataset, stream = _sources_of_rows(tmp_path)
    for source, name in [
        (jsonl, f"{jsonl}:1"),
        (parquet, str(parquet)),
        (rows, "list"),
        (dataset, "Dataset"),
        (stream, "IterableDataset"),
    ]:
        with pytest.raises(CorpusError) as raised:  # at once, before anything is read
            open_corpus(source, only={"lang": "en"})
        assert str(raised.value) == (
            f"{name} has no column 'lang' for only={{'lang': 'en'}}: it has text, language, score, "
            "is_good"
        )


def test_filter_on_a_source_without_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("a")
    for source, what in [
        (tmp_path / "c.txt", str(tmp_path / "c.txt")),
        (tmp_path, str(tmp_path / "c.txt")),
        (TEXTS, "list"),
        ((t for t in TEXTS), "generator"),
        ("demo", "data 'demo'"),
    ]:
        assert _error(source, only={"language": "en"}) == (
            f"{what} has no columns that only={{'language': 'en'}} could look at: leave `only` "
            "out, or give rows with columns (.jsonl, .parquet, dicts, a dataset)"
        )
    assert _error(ROWS, only="en") == (
        "only='en': expected columns with values, such as only={'language': 'en'}"
    )


def test_filters_of_a_corpus_stand_where_it_was_opened() -> None:
    corpus = open_corpus(ROWS, only={"language": "en"})
    assert open_corpus(corpus) is corpus
    assert open_corpus(corpus, only={"language": "en"}) is corpus
    assert _error(corpus, only={"language": "de"}).startswith(
        "list was opened with only={'language': 'en'}, drop_duplicates=False, now it is only={'lang"
    )
    assert "drop_duplicates=True: give the filters to" in _error(corpus, drop_duplicates=True)


def test_what_the_filters_left_is_told() -> None:
    def left(data: Any, min_doc_tokens: int | None = None, **options: Any) -> str:
        corpus = open_corpus(data, **options)
        list(corpus.numbered())
        return str(corpus.nothing_left(min_doc_tokens))

    empty = "list is empty: no document holds a token"
    assert left([]) == left(["", ""]) == left([], 20, only={"language": "xx"}) == empty
    assert left(ROWS * 200, 20, only={"language": "xx"}) == (
        "list: none of its 1,800 documents passes only={'language': 'xx'}, min_doc_tokens=20: "
        "loosen a filter"
    )
    assert (
        left(ROWS, 20) == "list: none of its 9 documents passes min_doc_tokens=20: loosen a filter"
    )
    rows = [{"text": "", "language": "en"}, *ROWS[4:]]
    assert left(rows[:3], only={"language": "en"}) == (
        "list: of its 3 documents 1 pass only={'language': 'en'}, and none of them holds a token: "
        "loosen the filter"
    )
    corpus = open_corpus(ROWS, only={"language": "xx"})
    list(corpus.numbered(rank=1, world_size=2))
    assert str(corpus.nothing_left()).startswith("list: none of rank 1's 4 documents passes only=")


def test_impossible_ranks_are_refused() -> None:
    for options in ({"rank": 2, "world_size": 2}, {"rank": -1}, {"start": -1}, {"world_size": 0}):
        with pytest.raises(CorpusError, match="expected start >= 0 and 0 <= rank < world_size"):
            open_corpus(TEXTS).numbered(**options)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from("abcd"), max_size=30), st.integers(1, 5), st.booleans())
def test_any_resume_of_any_rank_loses_and_repeats_nothing(
    texts: list[str], world_size: int, drop_duplicates: bool
) -> None:
    corpus = open_corpus(texts, drop_duplicates=drop_duplicates)
    whole = list(corpus.numbered())
    for rank in range(world_size):
        own = [pair for pair in whole if pair[0] % world_size == rank]
        for start in range(len(texts) + 2):
            left = [pair for pair in own if pair[0] >= start]
            assert list(corpus.numbered(start, rank=rank, world_size=world_size)) == left


def test_revision_of_texts_tells_where_one_ends() -> None:
    assert open_corpus(["ab", "c"]).revision != open_corpus(["a", "bc"]).revision
    german = [{**row, "language": "de"} for row in ROWS]
    filters = {"only": {"language": "en"}}
    assert open_corpus(ROWS).revision == open_corpus(german).revision
    assert open_corpus(ROWS, **filters).revision != open_corpus(german, **filters).revision


def test_wikitext_becomes_prose() -> None:
    pytest.importorskip("mwparserfromhell")
    wikitext = (
        "{{Infobox|x=1}}'''Ann''' was [[painter|a painter]].<ref>Book</ref>\n"
        "[[File:x.jpg|thumb|left]]\n\n==Life==\nShe lived.\n==References==\nNone.\n"
    )
    assert prose_of(wikitext) == "Ann was a painter.\n\nLife\nShe lived."
