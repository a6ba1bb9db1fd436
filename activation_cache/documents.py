"""Text sources: where documents come from, one at a time, in a fixed order.

In: what the user names as `data`: "demo", a `.jsonl`, `.txt` or `.parquet` file, a folder of such
files, a dataset on the Hugging Face hub, a `datasets` object, or any iterable of texts. Out: a
`Corpus`, which can be read again from any document on, whole or as one of several ranks: that is
how a harvest goes on where it was.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from .errors import CorpusError
from .hub_datasets import is_dataset, open_dataset, open_hub
from .rows import Columns, Document, Rows, Share, Source, as_text, documents_of, share_of
from .text_files import FILE_SUFFIXES, files_revision, open_files, text_files
from .wikipedia import PROSE_VERSION, demo_articles, demo_articles_file

__all__ = ["Corpus", "Document", "open_corpus"]


@dataclass
class _Count:
    """Documents of the latest reading: those there were, and those that passed the filters."""

    part: str = "its"
    n_read: int = 0
    n_passed: int = 0


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, each with a fixed number; one that is left out keeps its own.

    only: column -> value; rows with another value are left out. drop_duplicates: a text that was
    seen before is left out.
    """

    source: Source
    only: Mapping[str, str]
    drop_duplicates: bool
    _count: _Count = field(default_factory=_Count, repr=False, compare=False)

    @property
    def name(self) -> str:
        """What the user called it."""
        return self.source.name

    @property
    def revision(self) -> str:
        """What exactly it is, before filters: a hash of the files, or the dataset's commit or
        fingerprint; "unknown" for a plain iterable."""
        return self.source.revision

    def documents(self, start: int = 0) -> Iterator[Document]:
        """The documents from number `start` on."""
        return (document for _, document in self.numbered(start))

    def numbered(
        self, start: int = 0, *, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[int, Document]]:
        """The documents of one rank with their numbers, from the first number >= `start` on.

        A rank's numbers leave `rank` when divided by `world_size`. With all ranks every document
        comes once. Reading on from any number yields what an uninterrupted reading had yielded.
        Streams of `datasets` whose number of files divides by `world_size` are read by files, each
        rank its own: there a document's number depends on `world_size`.

        Duplicates are found among all documents, those before `start` too, which are therefore
        read again; a rank that reads files of its own finds only the duplicates within them. Every
        text kept takes about 100 bytes of memory.

        Raises: CorpusError for a rank there can't be; while reading, for rows that can't be read.
        """
        if start < 0 or not 0 <= rank < world_size:
            raise CorpusError(
                f"start={start}, rank={rank}, world_size={world_size}: expected start >= 0 and "
                "0 <= rank < world_size"
            )
        share = Share(start, rank, world_size)
        rows = self._distinct(share) if self.drop_duplicates else self.source.read(share)
        part = "its" if world_size == 1 else f"rank {rank}'s"
        return self._passing(rows, part)

    def nothing_left(self, min_doc_tokens: int | None = None) -> CorpusError:
        """Why the latest reading, done from 0 to its end, gave no token: no document holds one, or
        the filters leave none. min_doc_tokens: that of the `Packing`, a filter like `only`."""
        count = self._count
        filters = [f"only={dict(self.only)}"] if self.only else []
        filters += [f"min_doc_tokens={min_doc_tokens}"] if min_doc_tokens else []
        if not filters or not count.n_read:
            return CorpusError(f"{self.name} is empty: no document holds a token")
        if count.n_passed and not min_doc_tokens:
            return CorpusError(
                f"{self.name}: of {count.part} {count.n_read:,} documents {count.n_passed:,} pass "
                f"{filters[0]}, and none of them holds a token: loosen the filter"
            )
        return CorpusError(
            f"{self.name}: none of {count.part} {count.n_read:,} documents passes "
            f"{', '.join(filters)}: loosen a filter"
        )

    def _passing(self, rows: Rows, part: str) -> Iterator[tuple[int, Document]]:
        count = self._count
        count.part, count.n_read, count.n_passed = part, 0, 0
        for number, document in rows:
            count.n_read += 1
            if document is not None:
                count.n_passed += 1
                yield number, document

    def _distinct(self, share: Share) -> Rows:
        """The rows of a share, None in the place of a text that came before, wherever it did."""
        own_files = self.source.has_own_files(share.world_size)
        seen: set[bytes] = set()
        for number, document in self.source.read(share._replace(start=0) if own_files else Share()):
            is_new = True
            if document is not None:
                digest = xxhash.xxh3_128_digest(document.text.encode())
                is_new = digest not in seen
                seen.add(digest)
            if number in share:
                yield number, document if is_new else None


def open_corpus(
    data: Any,
    *,
    text_column: str = "text",
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    only: Mapping[str, str] | None = None,
    drop_duplicates: bool = False,
) -> Corpus:
    """Open a text source; nothing is read but what tells whether it can be.

    data: "demo", a path, a hub dataset's id, a `datasets` object, or an iterable of str or of
        dicts with `text_column`. A harvest is continued from a list or another iterable that starts
        anew each time; of a generator, give a fresh one that yields the same. A `Corpus` comes back
        as it is.
    split, subset, revision: of a hub dataset.
    only: `{"language": "en"}` keeps the rows with that value in that column; of several columns all
        must match. Values are compared as text (3 is "3", true is "true"); null matches nothing.
    drop_duplicates: leave out a text that came before, see `Corpus.numbered`.
    Raises: CorpusError when it does not exist, has no such column (the message lists those there
        are), or has no columns to filter by.
    """
    only = _checked_filter(only)
    if isinstance(data, Corpus):
        _require_filters(data, only, drop_duplicates)
        return data
    columns = Columns(text_column, only)
    if isinstance(data, str | Path):
        source = _from_name(data, columns, split, subset, revision)
    else:
        source = _from_object(data, columns)
    return Corpus(source, only, drop_duplicates)


def _checked_filter(only: Any) -> dict[str, str]:
    if not isinstance(only, Mapping | None):
        raise CorpusError(
            f"only={only!r}: expected columns with values, such as only={{'language': 'en'}}"
        )
    return {str(column): as_text(value) for column, value in (only or {}).items()}


def _require_filters(corpus: Corpus, only: Mapping[str, str], drop_duplicates: bool) -> None:
    """Raises: CorpusError where filters are asked of a corpus that was opened without them."""
    if (only and only != corpus.only) or (drop_duplicates and not corpus.drop_duplicates):
        raise CorpusError(
            f"{corpus.name} was opened with only={dict(corpus.only)}, "
            f"drop_duplicates={corpus.drop_duplicates}, now it is only={dict(only)}, "
            f"drop_duplicates={drop_duplicates}: give the filters to open_corpus(path, ...)"
        )


def _from_name(
    data: str | Path, columns: Columns, split: str, subset: str | None, revision: str | None
) -> Source:
    name, path = str(data), Path(data).expanduser()
    if name == "demo":
        columns.refuse_filter("data 'demo'")
        version = f"{files_revision([demo_articles_file()])}/prose{PROSE_VERSION}"
        return Source(name, version, _read_demo)
    try:
        files = text_files(path)
    except OSError as error:  # no file's name is so long
        raise CorpusError(
            f"data {name[:40]!r}... is no path: {error.strerror}. Give texts themselves as a list"
        ) from error
    if files:
        return open_files(name, files, columns)
    if path.suffix in (*FILE_SUFFIXES, ".json", ".csv", ".gz", ".zst") and not path.is_dir():
        wanted = f"expected {', '.join(FILE_SUFFIXES)}" if path.exists() else "no such file"
        raise CorpusError(f"can't read the text file {name!r}: {wanted}")
    return open_hub(name, columns, split, subset, revision)


def _read_demo(share: Share) -> Rows:
    return share_of((Document(text, title) for title, text in demo_articles()), share)


def _from_object(data: Any, columns: Columns) -> Source:
    if isinstance(data, Mapping):
        raise CorpusError(
            f"data is a {type(data).__name__} of {', '.join(map(str, data))}: give one of them"
        )
    if not isinstance(data, Iterable):
        raise CorpusError(
            f"data is {type(data).__name__}: expected a path, a hub dataset, or texts"
        )
    name = str(getattr(getattr(data, "info", None), "dataset_name", None) or type(data).__name__)
    if is_dataset(data):
        return open_dataset(data, name, columns)
    revision = "unknown"
    if isinstance(data, list | tuple):
        revision = _texts_revision(data, columns, name)
    return Source(name, revision, lambda share: _read_iterable(data, share, columns, name))


def _texts_revision(texts: Iterable[Any], columns: Columns, name: str) -> str:
    """Hash of all texts that pass `only`, and of where they stand. Raises: CorpusError for what
    is no text."""
    digest = xxhash.xxh3_128()
    for item in texts:
        document = columns.document(item, name, name)
        text = None if document is None else document.text.encode()
        digest.update(b"-" if text is None else b"%d:%b" % (len(text), text))
    return f"xxh3:{digest.hexdigest()}"


def _read_iterable(rows: Iterable[Any], share: Share, columns: Columns, name: str) -> Rows:
    if inspect.isgenerator(rows) and inspect.getgeneratorstate(rows) != inspect.GEN_CREATED:
        raise CorpusError(
            "data is a generator that has been read from: its documents can't be counted from the "
            "first one on. Give a fresh generator, or a list"
        )
    return documents_of(share_of(rows, share), columns, name)
