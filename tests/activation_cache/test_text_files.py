"""Files are skipped into exactly and cheaply, and an edit changes their revision."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from activation_cache import CorpusError, open_corpus, text_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of every kind, with blank lines, empty files, and row groups of uneven sizes."""
    folder = tmp_path_factory.mktemp("texts")
    rows = [{"text": f"row {i % 9}", "n": i % 2} for i in range(30)]
    lines = [json.dumps(row) + "\n" + "\n \t\n" * (i % 3 == 0) for i, row in enumerate(rows)]
    (folder / "a.jsonl").write_text("\n" + "".join(lines[:7]))
    (folder / "b.jsonl").write_text("\n\n")
    _write_parquet(folder / "c.parquet", rows[7:19], [1, 4, 5, 2])
    _write_parquet(folder / "d.parquet", [], [])
    (folder / "e.jsonl").write_text("".join(lines[19:24]).rstrip())
    _write_parquet(folder / "f.parquet", rows[24:], [6])
    return folder


def _write_parquet(file: Path, rows: list[dict[str, Any]], groups: list[int]) -> None:
    schema = pa.schema({"text": pa.string(), "n": pa.int64()})
    with pq.ParquetWriter(file, schema, compression="none") as writer:
        for size in groups:
            writer.write_table(pa.Table.from_pylist(rows[:size], schema), row_group_size=size)
            rows = rows[size:]


@pytest.mark.parametrize(
    "filters",
    [{}, {"only": {"n": "1"}}, {"drop_duplicates": True}],
    ids=["all", "only", "distinct"],
)
def test_every_rank_reads_on_from_every_number(folder: Path, filters: dict[str, Any]) -> None:
    corpus = open_corpus(folder, **filters)
    whole = list(corpus.numbered())
    if not filters:
        assert [(n, d.text) for n, d in whole] == [(i, f"row {i % 9}") for i in range(30)]
        assert whole[6][1].source == "a.jsonl:12"
        assert whole[9][1].source == "c.parquet:3"
    for world_size in range(1, 5):
        for rank in range(world_size):
            own = [pair for pair in whole if pair[0] % world_size == rank]
            for start in range(32):
                left = [pair for pair in own if pair[0] >= start]
                assert list(corpus.numbered(start, rank=rank, world_size=world_size)) == left


def test_txt_is_numbered_like_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n\n".join("abcde"))
    (tmp_path / "b.jsonl").write_text('{"text": "f"}\n')
    own = open_corpus(tmp_path).numbered(2, rank=1, world_size=2)
    assert [(n, d.text, d.source) for n, d in own] == [(3, "d", "a.txt:4"), (5, "f", "b.jsonl:1")]


def test_skipped_lines_are_not_parsed(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n{"text": \n\n{"text": "c"}\n{"text": "d"}\n')
    corpus = open_corpus(file)
    assert [(n, d.text) for n, d in corpus.numbered(2)] == [(2, "c"), (3, "d")]
    assert [n for n, _ in corpus.numbered(rank=0, world_size=2)] == [0, 2]
    with pytest.raises(CorpusError, match=r"a\.jsonl:2 is not JSON"):
        list(corpus.numbered(1))


def test_skipped_row_groups_are_not_read(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    _write_parquet(file, [{"text": f"row {i}", "n": i} for i in range(6)], [2, 2, 2])
    corpus = open_corpus(file)
    torn = pq.ParquetFile(file).metadata.row_group(1).column(0).dictionary_page_offset
    data = bytearray(file.read_bytes())
    data[torn : torn + 8] = b"\xff" * 8
    file.write_bytes(data)
    assert [(n, d.text) for n, d in corpus.numbered(4)] == [(4, "row 4"), (5, "row 5")]
    with pytest.raises(CorpusError, match="can't read "):
        list(corpus.numbered(3))


def test_missing_column_of_a_later_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "n": 1}\n')
    _write_parquet(tmp_path / "b.parquet", [{"text": "b", "n": 1}], [1])
    (tmp_path / "c.jsonl").write_text('{"text": "c"}\n')
    corpus = open_corpus(tmp_path, only={"n": "1"})
    with pytest.raises(CorpusError) as raised:
        list(corpus.numbered())
    assert str(raised.value) == (
        f"{tmp_path / 'c.jsonl'}:1 has no column 'n' for only={{'n': '1'}}: it has text"
    )


@given(st.integers(0, 1 << 45))
def test_hashed_pieces_are_bounded_and_lie_apart(size: int) -> None:
    pieces = text_files._hashed_pieces(size)
    ends = [start + n_bytes for start, n_bytes in pieces]
    assert all(end <= after for end, (after, _) in zip(ends, pieces[1:], strict=False))
    if size <= 192 << 20:
        assert [start for start, _ in pieces] == [0, *ends][: len(pieces)]
        assert [*ends, 0][-2 if ends else -1] >= size
    else:
        assert sum(n_bytes for _, n_bytes in pieces) == 192 << 20
        assert (pieces[0], ends[-1]) == ((0, 64 << 20), size)
        gaps = [after - end for end, (after, _) in zip(ends, pieces[1:], strict=False)]
        assert max(gaps) - min(gaps) <= 1


def test_edits_of_large_files_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_END_BYTES": 20, "_PIECE_BYTES": 2, "_HASHED_WHOLE_BYTES": 168}.items():
        monkeypatch.setattr(text_files, name, value)
    file, found = tmp_path / "a.txt", []
    file.write_bytes(b"x" * 400)
    before = text_files.files_revision([file])
    assert text_files.files_revision([file]) == before
    for place in range(400):
        file.write_bytes(b"x" * place + b"y" + b"x" * (399 - place))
        if text_files.files_revision([file]) != before:
            found.append(place)
    assert len(found) == 168
    assert found[:20] == list(range(20))
    assert found[-20:] == list(range(380, 400))
    file.write_bytes(b"x" * 401)
    assert text_files.files_revision([file]) != before
