"""A feature a line: JSON with everything that its page shows, or CSV that a spreadsheet opens."""

import csv
import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..feature import Feature

if TYPE_CHECKING:
    from ..database import FeatureDB

# With these a spreadsheet takes a cell for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_SHOWN = 5
COLUMNS = (
    "sae_id",
    "feature_id",
    "label",
    "label_method",
    "density",
    "n_active",
    "mean_act",
    "max_act",
    "is_dead",
    "tokens",
    "promoted",
    "suppressed",
    "neighbors",
    "context",
)


def write_jsonl(
    db: "FeatureDB",
    path: Path,
    ids: Sequence[tuple[int, int]],
    on_exported: Callable[[int, int], None],
) -> None:
    """One JSON object a feature; compressed where the name wanted ends in .gz."""
    with _opened(path) as file:
        for n, page in enumerate(db.pages(ids), 1):
            line = json.dumps(plain(page), ensure_ascii=False)
            file.write(line + "\n")
            on_exported(n, len(ids))


def write_csv(
    db: "FeatureDB",
    path: Path,
    ids: Sequence[tuple[int, int]],
    on_exported: Callable[[int, int], None],
) -> None:
    """A header and one line a feature. Tokens and neighbours are the first five, as JSON lists."""
    with _opened(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for n, page in enumerate(db.pages(ids), 1):
            writer.writerow([_cell(value) for value in _flat(page)])
            on_exported(n, len(ids))


def plain(value: Any) -> Any:
    """A feature, or a part of one, as dicts, lists, numbers and text."""
    if isinstance(value, Feature):
        return {name: plain(getattr(value, name)) for name in Feature.__dataclass_fields__}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: plain(each) for name, each in value._asdict().items()}
    if isinstance(value, tuple | list):
        return [plain(each) for each in value]
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    return value


def _flat(page: Feature) -> list[Any]:
    lists = (
        [token.token for token in page.tokens[:_SHOWN]],
        [token.token for token in page.promoted[:_SHOWN]],
        [token.token for token in page.suppressed[:_SHOWN]],
        [near.feature_id for near in page.neighbors[:_SHOWN]],
    )
    first = [getattr(page, name) for name in COLUMNS[:9]]
    context = page.top[0].text if page.top else None
    return [*first, *(json.dumps(each, ensure_ascii=False) for each in lists), context]


def _cell(value: Any) -> Any:
    """Text that begins as a formula would gets a quote before it, as spreadsheets do themselves."""
    if isinstance(value, str) and value.startswith(_FORMULA):
        return f"'{value}"
    return value


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    if ".gz" in path.suffixes:
        with gzip.open(path, "wt", 6, encoding="utf-8", newline="") as file:
            yield file
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            yield file
