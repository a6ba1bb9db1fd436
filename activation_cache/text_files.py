"""Text files -> rows: `.jsonl`, `.txt` and `.parquet`, one or a folder of them.

In: paths. Out: a `Source` whose documents are numbered through all files in the order of their
names. What lies before the first wanted document is skipped as cheaply as is exact: row groups of
a `.parquet` by its metadata, lines of a `.jsonl` without parsing them.
"""

import itertools
import json
from collections.abc import Generator, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from .errors import CorpusError
from .rows import Columns, Document, Rows, Share, Source, first_line

FILE_SUFFIXES = (".jsonl", ".txt", ".parquet")
TXT_DOCUMENT_CHARS = 8_192
"""A document of a `.txt` file is cut at the next paragraph after so many characters, and at the
next line after eight times as many."""
_END_BYTES = 1 << 26
_PIECE_BYTES = 1 << 20
_N_PIECES = 64
_HASHED_WHOLE_BYTES = 2 * _END_BYTES + _N_PIECES * _PIECE_BYTES
_BATCH_ROWS = 256

_Reading = Generator[tuple[int, Document | None], None, int]
"""The rows of one file; returns the number that the next file's first document has."""


def text_files(path: Path) -> list[Path]:
    """The text files that `path` is or holds. Raises: OSError for what can't be a path."""
    if path.is_file() and path.suffix in FILE_SUFFIXES:
        return [path]
    if path.is_dir():
        return sorted(f for f in path.rglob("*") if f.suffix in FILE_SUFFIXES and f.is_file())
    return []


def open_files(name: str, files: list[Path], columns: Columns) -> Source:
    """Raises: CorpusError for a missing column, a torn first row, or a filter on `.txt`."""
    for file in files:
        if file.suffix == ".txt":
            columns.refuse_filter(str(file))
    next(_read_files(files, columns, Share()), None)  # told now, not in an hour
    return Source(name, files_revision(files), lambda share: _read_files(files, columns, share))


def files_revision(files: list[Path]) -> str:
    """Hash of names, sizes and contents.

    A file of up to 192 MiB is hashed whole. Of a larger one the first and last 64 MiB are, and 64
    pieces of 1 MiB spread evenly between them: 192 MiB again, so that the time is bounded. An edit
    that keeps the size of such a file and lies between the pieces is not found.
    """
    digest = xxhash.xxh3_128()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as f:
            for start, n_bytes in _hashed_pieces(size):
                f.seek(start)
                digest.update(f.read(n_bytes))
    return f"xxh3:{digest.hexdigest()}"


def _hashed_pieces(size: int) -> list[tuple[int, int]]:
    """(start, bytes) of what stands for a file of `size` bytes."""
    if size <= _HASHED_WHOLE_BYTES:
        return [(start, _END_BYTES) for start in range(0, size, _END_BYTES)]
    gap = (size - _HASHED_WHOLE_BYTES) / (_N_PIECES + 1)  # between pieces, and at both ends
    spread = [
        (_END_BYTES + round(gap * (i + 1)) + i * _PIECE_BYTES, _PIECE_BYTES)
        for i in range(_N_PIECES)
    ]
    return [(0, _END_BYTES), *spread, (size - _END_BYTES, _END_BYTES)]


def _read_files(files: list[Path], columns: Columns, share: Share) -> Rows:
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet, ".txt": _read_txt}
    number = 0
    for file in files:
        try:
            number = yield from readers[file.suffix](file, columns, share, number)
        except (OSError, pa.ArrowException) as error:
            raise CorpusError(f"can't read {file}: {first_line(error)}") from error


def _read_jsonl(file: Path, columns: Columns, share: Share, number: int) -> _Reading:
    wanted = share.next(number)
    with file.open("rb") as lines:
        for place, line in enumerate(lines, 1):
            if line.isspace():
                continue
            if number == wanted:
                yield number, _json_document(line, columns, file, place)
                wanted += share.world_size
            number += 1
    return number


def _json_document(line: bytes, columns: Columns, file: Path, place: int) -> Document | None:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise CorpusError(
            f"{file}:{place} is not JSON ({error}): expected one object a line"
        ) from error
    return columns.document(row, f"{file}:{place}", f"{file.name}:{place}")


def _read_parquet(file: Path, columns: Columns, share: Share, number: int) -> _Reading:
    with pq.ParquetFile(file) as table:
        columns.require(table.schema_arrow.names, str(file))
        before_first = number - 1  # rows of a file count from 1
        groups = list(range(table.num_row_groups))
        while groups and number + table.metadata.row_group(groups[0]).num_rows <= share.start:
            number += table.metadata.row_group(groups.pop(0)).num_rows
        for batch in table.iter_batches(_BATCH_ROWS, groups, columns.names) if groups else ():
            places = range(share.next(number) - number, len(batch), share.world_size)
            rows = batch.take(pa.array(places, type=pa.int64())).to_pylist()
            for place, row in zip(places, rows, strict=True):
                where = f"{file.name}:{number + place - before_first}"
                yield number + place, columns.document(row, where, where)
            number += len(batch)
    return number


def _read_txt(file: Path, columns: Columns, share: Share, number: int) -> _Reading:
    for place, text in enumerate(_cut_txt(file), 1):
        if number in share:
            yield number, columns.document(text, str(file), f"{file.name}:{place}")
        number += 1
    return number


def _cut_txt(file: Path) -> Iterator[str]:
    """Documents stand apart by two blank lines; very long ones are cut."""
    with file.open(encoding="utf-8-sig", errors="replace") as f:
        lines, size, blank = list[str](), 0, 0
        for line in itertools.chain(f, ["\n", "\n", "\n"]):
            blank = 0 if line.strip() else blank + 1
            is_long = size >= TXT_DOCUMENT_CHARS * (1 if blank else 8)
            if size and (blank >= 2 or is_long):
                yield "".join(lines).strip("\n")
                lines, size = [], 0
            lines.append(line)
            size += len(line.strip())
