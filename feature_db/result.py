"""Result: the rows of a query, as pandas, polars, Arrow or plain tuples, shown well anywhere."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .errors import FeatureDBError
from .shading import html_block, html_table, html_text, shaded_html, shaded_text
from .token_text import visible

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl

    from .feature_set import FeatureSet

_SHOWN_ROWS = 30
_SHOWN_CHARACTERS = 120
_SHOWN_ITEMS = 8
# Columns of `contexts` that say nothing more beside the shaded text.
_SHOWN_BY_SHADING = {"acts", "peak", "text", "token_ids"}


class Result:
    """Rows of a query, all in memory.

    Iterating gives tuples; `len` is the number of rows. Where the columns `token_ids` (or `tokens`)
    and `acts` are both there, they are shown as text shaded by activation, and the other forms of
    it left out.
    """

    def __init__(
        self,
        table: pa.Table,
        vocabulary: Sequence[str] = (),
        features: "Callable[[pa.Table], FeatureSet] | None" = None,
    ) -> None:
        """vocabulary: each token's text, where `token_ids` are to be shown so. features: makes a
        set of features of the rows."""
        self._table, self._vocabulary, self._features = table, vocabulary, features

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self._table.column_names)

    def arrow(self) -> pa.Table:
        """As an Arrow table."""
        return self._table

    def df(self) -> "pd.DataFrame":
        """As a pandas frame."""
        return self._table.to_pandas()

    def pl(self) -> "pl.DataFrame":
        """As a polars frame. Raises: FeatureDBError if polars isn't installed."""
        try:
            import polars
        except ImportError:
            raise FeatureDBError(
                "polars isn't installed: pip install 'saebase[polars]', or use .df() or .arrow()"
            ) from None
        frame = polars.from_arrow(self._table)
        assert isinstance(frame, polars.DataFrame)
        return frame

    def features(self) -> "FeatureSet":
        """The features that these rows name in sae_id and feature_id, each once, in order.

        Raises: NotFoundError without a column feature_id.
        """
        if self._features is None:
            raise FeatureDBError("these rows are of no open database: pass them to db.features")
        return self._features(self._table)

    def fetchall(self) -> list[tuple[Any, ...]]:
        """As a list of tuples."""
        return list(self)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter(_tuples(self._table))

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __repr__(self) -> str:
        return f"Result({len(self)} rows; columns {', '.join(self.columns)})"

    def _repr_html_(self) -> str:
        names, rows = self._shown()
        cells = [[_html_cell(value) for value in row] for row in rows]
        return html_block(html_table(names, cells), *map(html_text, self._footer()))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        names, rows = self._shown()
        table = Table(*(escape(visible(name)) for name in names))
        for row in rows:
            table.add_row(*(_text_cell(value) for value in row))
        yield table
        for line in self._footer():
            yield Text(line, style="dim")

    def _shown(self) -> tuple[list[str], list[list[Any]]]:
        """The first rows, with `tokens` and `acts` joined into a column of `_Shaded` cells."""
        names, rows = (
            self.columns,
            [list(row) for row in _tuples(self._table.slice(0, _SHOWN_ROWS))],
        )
        if self._vocabulary and names.count("token_ids") == 1 and "tokens" not in names:
            at = names.index("token_ids")
            names[at] = "tokens"
            for row in rows:
                row[at] = [self._vocabulary[token_id] for token_id in row[at]]
        if {"tokens", "acts"} <= set(names) and names.count("tokens") == names.count("acts") == 1:
            tokens, acts = names.index("tokens"), names.index("acts")
            peak = names.index("peak") if "peak" in names else None
            for row in rows:
                if _can_be_shaded(row[tokens], row[acts]):
                    row[tokens] = _Shaded(
                        row[tokens], row[acts], None if peak is None else row[peak]
                    )
            kept = [i for i in range(len(names)) if names[i] not in _SHOWN_BY_SHADING]
            return [names[i] for i in kept], [[row[i] for i in kept] for row in rows]
        return names, rows

    def _footer(self) -> list[str]:
        return [f"{_SHOWN_ROWS} of {len(self)} rows"] if len(self) > _SHOWN_ROWS else []


class _Shaded:
    def __init__(self, tokens: Sequence[str], acts: Sequence[float], peak: int | None) -> None:
        self.tokens, self.acts, self.peak = tokens, acts, peak


def cell(value: Any) -> str:
    """A value as short, safe text: numbers to four digits, long text and lists cut."""
    if value is None:
        return "—"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        more = ", …" if len(value) > _SHOWN_ITEMS else ""
        return f"[{', '.join(cell(item) for item in value[:_SHOWN_ITEMS])}{more}]"
    text = visible(str(value))
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def _html_cell(value: Any) -> str:
    if isinstance(value, _Shaded):
        return shaded_html(value.tokens, value.acts, peak=value.peak)
    return html_text(cell(value))


def _text_cell(value: Any) -> Text:
    if isinstance(value, _Shaded):
        return shaded_text(value.tokens, value.acts, peak=value.peak)
    return Text(cell(value))


def _can_be_shaded(tokens: Any, acts: Any) -> bool:
    return isinstance(tokens, list) and isinstance(acts, list) and len(tokens) == len(acts)


def _tuples(table: pa.Table) -> Iterator[tuple[Any, ...]]:
    if not table.num_columns:
        return iter(())
    return zip(*(column.to_pylist() for column in table.columns), strict=True)
