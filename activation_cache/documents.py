"""Text sources: where documents come from, one at a time, in a fixed order.

In: what the user names as `data`: "demo", a `.jsonl`, `.txt` or `.parquet` file, a folder of such
files, a dataset on the Hugging Face hub, a `datasets` object, or any iterable of texts. Out: a
`Corpus`, which can be read again from any document on: that is how a harvest goes on where it was.
"""

import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from .errors import CorpusError
from .hub import hub_answers
from .wikipedia import PROSE_VERSION, demo_articles, demo_articles_file

FILE_SUFFIXES = (".jsonl", ".txt", ".parquet")
TXT_DOCUMENT_CHARS = 8_192
"""A document of a `.txt` file is cut at the next paragraph after so many characters, and at the
next line after eight times as many."""
_HASHED_BYTES = 1 << 26


class Document(NamedTuple):
    """A text and where it is from (a title, or `file:number`)."""

    text: str
    source: str


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order.

    name: what the user called it. revision: what exactly it is: a hash of the files, or the
    dataset's commit or fingerprint; "unknown" for a plain iterable. Document i is always the same.
    """

    name: str
    revision: str
    _open: Callable[[], Iterator[Document]]

    def documents(self, start: int = 0) -> Iterator[Document]:
        """The documents from number `start` on."""
        return itertools.islice(self._open(), start, None)


def open_corpus(
    data: Any,
    *,
    text_column: str = "text",
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
) -> Corpus:
    """Open a text source; nothing is read but what tells whether it can be.

    data: "demo", a path, a hub dataset's id, a `datasets` object, or an iterable of str or of
        dicts with `text_column`. A harvest is continued from a list or another iterable that starts
        anew each time; of a generator, give a fresh one that yields the same.
    split, subset, revision: of a hub dataset.
    Raises: CorpusError when it does not exist or has no such column (the message lists those
        there are).
    """
    if isinstance(data, Corpus):
        return data
    if not isinstance(data, str | Path):
        return _from_object(data, text_column)
    name, path = str(data), Path(data).expanduser()
    if name == "demo":
        revision = f"{_files_revision([demo_articles_file()])}/prose{PROSE_VERSION}"
        return Corpus(name, revision, _demo_documents)
    try:
        files = _text_files(path)
    except OSError as error:  # no file's name is so long
        raise CorpusError(
            f"data {name[:40]!r}... is no path: {error.strerror}. Give texts themselves as a list"
        ) from error
    if files:
        return _from_files(name, files, text_column)
    if path.suffix in (*FILE_SUFFIXES, ".json", ".csv", ".gz", ".zst") and not path.is_dir():
        wanted = f"expected {', '.join(FILE_SUFFIXES)}" if path.exists() else "no such file"
        raise CorpusError(f"can't read the text file {name!r}: {wanted}")
    return _from_hub(name, text_column, split, subset, revision)


def _demo_documents() -> Iterator[Document]:
    return (Document(text, title) for title, text in demo_articles())


def _text_files(path: Path) -> list[Path]:
    if path.is_file() and path.suffix in FILE_SUFFIXES:
        return [path]
    if path.is_dir():
        return sorted(f for f in path.rglob("*") if f.suffix in FILE_SUFFIXES and f.is_file())
    return []


def _from_files(name: str, files: list[Path], text_column: str) -> Corpus:
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet, ".txt": _read_txt}

    def documents() -> Iterator[Document]:
        for file in files:
            try:
                yield from readers[file.suffix](file, text_column)
            except (OSError, pa.ArrowException) as error:
                raise CorpusError(f"can't read {file}: {_first_line(error)}") from error

    next(documents(), None)  # a missing column or a torn first line is told now, not in an hour
    return Corpus(name, _files_revision(files), documents)


def _read_jsonl(file: Path, text_column: str) -> Iterator[Document]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:  # not JSON, or not UTF-8
                raise CorpusError(
                    f"{file}:{number} is not JSON ({error}): expected one object a line"
                ) from error
            yield Document(_text_of(row, text_column, f"{file}:{number}"), f"{file.name}:{number}")


def _read_parquet(file: Path, text_column: str) -> Iterator[Document]:
    with pq.ParquetFile(file) as table:
        columns = table.schema_arrow.names
        if text_column not in columns:
            raise CorpusError(_no_column(str(file), text_column, columns))
        number = itertools.count(1)
        for batch in table.iter_batches(batch_size=256, columns=[text_column]):
            for row in batch.to_pylist():
                where = f"{file.name}:{next(number)}"
                yield Document(_text_of(row, text_column, where), where)


def _read_txt(file: Path, _: str) -> Iterator[Document]:
    """Documents stand apart by two blank lines; very long ones are cut."""
    with file.open(encoding="utf-8-sig", errors="replace") as f:
        lines, size, number, blank = list[str](), 0, 0, 0
        for line in itertools.chain(f, ["\n", "\n", "\n"]):
            blank = 0 if line.strip() else blank + 1
            is_long = size >= TXT_DOCUMENT_CHARS * (1 if blank else 8)
            if size and (blank >= 2 or is_long):
                number += 1
                yield Document("".join(lines).strip("\n"), f"{file.name}:{number}")
                lines, size = [], 0
            lines.append(line)
            size += len(line.strip())


def _from_object(data: Any, text_column: str) -> Corpus:
    if isinstance(data, Mapping):
        raise CorpusError(
            f"data is a {type(data).__name__} of {', '.join(map(str, data))}: give one of them"
        )
    if not isinstance(data, Iterable):
        raise CorpusError(
            f"data is {type(data).__name__}: expected a path, a hub dataset, or texts"
        )
    name = str(getattr(getattr(data, "info", None), "dataset_name", None) or type(data).__name__)
    columns = getattr(data, "column_names", None)
    if isinstance(columns, list) and columns and text_column not in columns:
        raise CorpusError(_no_column(name, text_column, columns))
    revision = str(getattr(data, "_fingerprint", "unknown"))
    if isinstance(data, list | tuple):
        digest = xxhash.xxh3_128()
        for item in data:
            digest.update(_text_of(item, text_column, name).encode())
        revision = f"xxh3:{digest.hexdigest()}"
    return Corpus(name, revision, lambda: _rows(data, text_column, name))


def _rows(rows: Iterable[Any], text_column: str, name: str) -> Iterator[Document]:
    if inspect.isgenerator(rows) and inspect.getgeneratorstate(rows) != inspect.GEN_CREATED:
        raise CorpusError(
            "data is a generator that has been read from: its documents can't be counted from the "
            "first one on. Give a fresh generator, or a list"
        )
    numbered = enumerate(rows, 1)
    while True:
        try:
            number, row = next(numbered)
        except StopIteration:
            return
        except OSError as error:  # the network, most likely
            raise CorpusError(
                f"can't read on in {name}: {_first_line(error)}. What was committed is safe: run "
                "it again"
            ) from error
        yield Document(_text_of(row, text_column, name), f"{name}:{number}")


def _from_hub(
    name: str, text_column: str, split: str, subset: str | None, revision: str | None
) -> Corpus:
    """A hub dataset or a local dataset folder, streamed by `datasets` in its own order."""
    import datasets

    unknown = (
        f"unknown data {name!r}: it is no .jsonl, .txt or .parquet file, no folder of them, "
        "and not to be had from the Hugging Face hub ({}). Check the path or the name"
    )
    if not Path(name).expanduser().exists() and not hub_answers():
        raise CorpusError(unknown.format("it can't be reached"))
    try:
        rows = datasets.load_dataset(name, subset, split=split, revision=revision, streaming=True)
        columns = rows.column_names
    except (OSError, ValueError, RuntimeError) as error:
        raise CorpusError(unknown.format(_first_line(error))) from error
    if columns and text_column not in columns:
        raise CorpusError(_no_column(name, text_column, columns))
    resolved = _hub_revision(rows) or revision or "unknown"
    label = ":".join(part for part in (name, subset, split) if part)
    return Corpus(label, resolved, lambda: _rows(rows, text_column, label))


def _hub_revision(rows: Any) -> str | None:
    """The commit that stands in the checksummed addresses of a hub dataset, where it does."""
    checksums = getattr(rows.info, "download_checksums", None) or {}
    found = (re.search(r"@([0-9a-f]{40})/", str(address)) for address in checksums)
    return next((match[1] for match in found if match), None)


def _text_of(row: Any, text_column: str, where: str) -> str:
    if isinstance(row, str):
        return _valid_unicode(row)
    if not isinstance(row, Mapping):
        raise CorpusError(f"{where}: expected a text or a dict, found {type(row).__name__}")
    if text_column not in row:
        raise CorpusError(_no_column(where, text_column, list(row)))
    text = row[text_column]
    if not isinstance(text, str | None):
        raise CorpusError(
            f"{where}: column {text_column!r} holds {type(text).__name__}: expected text"
        )
    return _valid_unicode(text or "")


def _valid_unicode(text: str) -> str:
    """JSON may hold halves of characters, which no tokenizer takes: U+FFFD in their place."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _no_column(where: str, text_column: str, columns: Iterable[str]) -> str:
    return (
        f"{where} has no column {text_column!r}: it has {', '.join(map(str, columns))}. "
        "Name the column that holds the text with --text-column"
    )


def _files_revision(files: list[Path]) -> str:
    """Hash of names, sizes and contents; of a very large file its first 64 MiB."""
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
        with file.open("rb") as f:
            digest.update(f.read(_HASHED_BYTES))
    return f"xxh3:{digest.hexdigest()}"
