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


def test_wikitext_becomes_prose() -> None:
    pytest.importorskip("mwparserfromhell")
    wikitext = (
        "{{Infobox|x=1}}'''Ann''' was [[painter|a painter]].<ref>Book</ref>\n"
        "[[File:x.jpg|thumb|left]]\n\n==Life==\nShe lived.\n==References==\nNone.\n"
    )
    assert prose_of(wikitext) == "Ann was a painter.\n\nLife\nShe lived."
