"""One row of a text source -> a document, and which rows are whose.

In: rows (texts or dicts) of any source. Out: numbered documents, or None in the place of one that a
filter leaves out: it keeps its number, so that numbering never depends on filters. `documents` puts
a `Corpus` together from what stands here; `text_files` and `hub_datasets` read rows.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from .errors import CorpusError

_Row = TypeVar("_Row")
_NO_FILTER: Mapping[str, str] = MappingProxyType({})


class Document(NamedTuple):
    """A text and where it is from (a title, or `file:number`)."""

    text: str
    source: str


Rows = Iterator[tuple[int, Document | None]]
"""Documents with their numbers, ascending; None for one that a filter leaves out."""


class Share(NamedTuple):
    """What one rank reads: the numbers from `start` on that leave `rank` when divided by
    `world_size`."""

    start: int = 0
    rank: int = 0
    world_size: int = 1

    def next(self, number: int) -> int:
        """The lowest number of the share that is `number` or more."""
        first = max(self.start, number)
        return first + (self.rank - first) % self.world_size

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and self.next(number) == number


class Source(NamedTuple):
    """Where documents come from.

    name: what the user called it. revision: what exactly it is, see `Corpus`. read: the rows of a
    share. has_own_files: whether each rank of so many reads files of its own, and sees no others.
    """

    name: str
    revision: str
    read: Callable[[Share], Rows]
    has_own_files: Callable[[int], bool] = lambda _: False


class Columns(NamedTuple):
    """The columns that matter. text: holds the text. only: column -> the value, as text, that a
    row must have there to be kept."""

    text: str
    only: Mapping[str, str] = _NO_FILTER

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys([self.text, *self.only]))

    def require(self, there: Iterable[Any], where: str) -> None:
        """Raises: CorpusError that lists the columns `there`, if one of ours is missing."""
        there = list(there)
        missing = next((name for name in self.names if name not in there), None)
        if missing is None:
            return
        listed = ", ".join(map(str, there))
        if missing == self.text:
            raise CorpusError(
                f"{where} has no column {missing!r}: it has {listed}. "
                "Name the column that holds the text with --text-column"
            )
        raise CorpusError(
            f"{where} has no column {missing!r} for only={dict(self.only)}: it has {listed}"
        )

    def refuse_filter(self, what: str) -> None:
        """Raises: CorpusError if there is a filter, as `what` has no columns."""
        if self.only:
            raise CorpusError(
                f"{what} has no columns that only={dict(self.only)} could look at: leave `only` "
                "out, or give rows with columns (.jsonl, .parquet, dicts, a dataset)"
            )

    def document(self, row: Any, where: str, source: str) -> Document | None:
        """The document in `row`, or None if `only` leaves it out. Raises: CorpusError that says
        `where`, for a row that is no text and no dict with our columns."""
        if isinstance(row, str):
            self.refuse_filter(where)
            return Document(_valid_unicode(row), source)
        if not isinstance(row, Mapping):
            raise CorpusError(f"{where}: expected a text or a dict, found {type(row).__name__}")
        if self.text not in row or (self.only and not row.keys() >= self.only.keys()):
            self.require(row, where)
        if self.only and not all(_has_value(row[name], v) for name, v in self.only.items()):
            return None
        text = row[self.text]
        if not isinstance(text, str | None):
            raise CorpusError(
                f"{where}: column {self.text!r} holds {type(text).__name__}: expected text"
            )
        return Document(_valid_unicode(text or ""), source)


def as_text(value: Any) -> str:
    """A value as `only` compares it: 3 is "3", true is "true" as in JSON."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def share_of(rows: Iterable[_Row], share: Share) -> Iterator[tuple[int, _Row]]:
    """The rows of a share with their numbers; the others are read and dropped."""
    first = share.next(0)
    numbers = itertools.count(first, share.world_size)
    return zip(numbers, itertools.islice(rows, first, None, share.world_size), strict=False)


def documents_of(rows: Iterator[tuple[int, Any]], columns: Columns, name: str) -> Rows:
    """Numbered rows -> documents. Raises: CorpusError where reading on fails."""
    while True:
        try:
            number, row = next(rows)
        except StopIteration:
            return
        except OSError as error:  # the network, most likely
            raise CorpusError(
                f"can't read on in {name}: {first_line(error)}. What was committed is safe: run "
                "it again"
            ) from error
        yield number, columns.document(row, name, f"{name}:{number + 1}")


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _has_value(value: Any, wanted: str) -> bool:
    return value is not None and as_text(value) == wanted


def _valid_unicode(text: str) -> str:
    """JSON may hold halves of characters, which no tokenizer takes: U+FFFD in their place."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
