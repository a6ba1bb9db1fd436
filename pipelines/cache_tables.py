"""`CacheStatistics` -> what `saebase cache stats` prints: sentences and tables.

Tables are split, and long cells set in lines, so that a log file of 80 columns holds them whole.
"""

import math
from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from activation_cache import CacheStatistics
from activation_cache.row_totals import ChannelValue
from activation_cache.statistics import QUANTILES, HookpointStatistics, PlaceNorms

_FEW = 3
"""Up to so many hookpoints are told in full."""


def statistics_lines(found: CacheStatistics, acts: str) -> list[str]:
    """What is in the cache as a whole, what was read of it, and what storing it rounded."""
    disk = found.disk
    documents = f"{found.n_documents:,} documents"
    if math.isfinite(found.median_document_tokens):
        documents += f" (median {found.median_document_tokens:,.0f} tokens)"
    part = "all rows"
    if found.n_rows_read < found.n_tokens:
        part = f"the first {found.n_rows_read:,} rows (--n-rows 0 reads all)"
    return [
        f"{acts}: {found.n_tokens:,} tokens of {documents}",
        f"{disk.n_bytes / 1e6:,.1f} MB in {disk.n_shards:,} shards, "
        f"{disk.bytes_per_token:,.0f} bytes a token",
        f"figures below are of {part}; norms are L2 norms of rows",
        rounding_line(found),
        *_non_finite_lines(found),
    ]


def rounding_line(found: CacheStatistics) -> str:
    """What storing did to the values."""
    stored = f"stored in {found.storage_dtype}"
    if found.rounding is None:
        return f"{stored}: the FVU that this added stands in the table of disk use"
    if found.rounding == 0:
        return f"{stored}; the model computes in {found.model_dtype}: storing rounded nothing"
    limits = ""
    if found.storage_dtype == "float16":
        limits = "; below 6.1e-5 in size by up to 3.0e-8, above 65,504 to infinity"
    return (
        f"{stored}; the model computes in {found.model_dtype}: a value was rounded by at most "
        f"2^{math.log2(found.rounding):.0f} ({found.rounding:.2%}) of itself{limits}"
    )


def statistics_tables(found: CacheStatistics, width: int) -> Iterator[RenderableType]:
    """The tables in order. width: columns that there are."""
    yield disk_table(found)
    yield norms_table(found.hookpoints)
    if sum(max(len(h.hookpoint), 20) + 2 for h in found.hookpoints) + 9 <= width:
        yield places_table(found.hookpoints)
    else:
        yield from medians_by_place(found.hookpoints, width)
    massive = [h for h in found.hookpoints if h.massive.n_rows]
    if massive:
        yield massive_table(massive)
        yield tokens_table(massive)
    yield ordinary_table(found.hookpoints)


def disk_table(found: CacheStatistics) -> Table:
    """Bytes by stream; for int8, what it cost."""
    table = _table("disk", "MB", "share", "bytes a token")
    fvus = {h.hookpoint: h.quantization_fvu for h in found.hookpoints}
    if found.rounding is None:
        table.add_column("FVU of storing", justify="right", no_wrap=True)
    for stream, n_bytes in found.disk.by_stream.items():
        share = n_bytes / max(found.disk.n_bytes, 1)
        cells = [f"{n_bytes / 1e6:,.1f}", f"{share:.1%}", f"{n_bytes / found.n_tokens:,.0f}"]
        fvu = fvus.get(stream)
        if found.rounding is None:
            cells.append("" if fvu is None else f"{fvu:.2e}")
        table.add_row(Text(stream), *cells)
    return table


def norms_table(hookpoints: Sequence[HookpointStatistics]) -> Table:
    """Quantiles of the norms, a line for each hookpoint."""
    table = _table("norms", *(_share(share) for share in QUANTILES), padding=1)
    for h in hookpoints:
        table.add_row(Text(h.hookpoint), *map(compact, h.norm_quantiles.values()))
    return table


def places_table(hookpoints: Sequence[HookpointStatistics]) -> Table:
    """Median norm by place in the block, with the 5% and 95% quantiles; a column a hookpoint."""
    table = _table("at place", *(h.hookpoint for h in hookpoints))
    for label, norms in places_of(hookpoints).items():
        cells = [f"{compact(p.median)} ({compact(p.low)}-{compact(p.high)})" for p in norms]
        table.add_row(label, *cells)
    return _captioned(table, "norms by place in the block: median (5%-95%)")


def medians_by_place(hookpoints: Sequence[HookpointStatistics], width: int) -> Iterator[Table]:
    """Median norm by place in the block, a line for each hookpoint, in tables that fit `width`."""
    places = places_of(hookpoints)
    name_width = max(len("median norm at place"), *(len(h.hookpoint) for h in hookpoints))
    fit = max((width - name_width) // (2 + max(5, *map(len, places))), 2)
    for first in range(0, len(places), fit):
        labels = list(places)[first : first + fit]
        table = _table("median norm at place", *labels)
        for number, h in enumerate(hookpoints):
            table.add_row(
                Text(h.hookpoint), *(compact(places[label][number].median) for label in labels)
            )
        yield table


def massive_table(hookpoints: Sequence[HookpointStatistics]) -> Table:
    """How many rows are massive, where they stand, and in which channels."""
    table = _table("massive rows", "above", "rows", "at place 0")
    table.add_column("channel: share, mean", no_wrap=True)
    for h in hookpoints:
        rows = h.massive
        channels = "\n".join(f"{c.channel}: {c.share:.1%}, {c.mean:+,.0f}" for c in rows.channels)
        counted = f"{rows.n_rows:,} ({rows.share:.2%})"
        cells = (compact(rows.limit), counted, f"{rows.at_first_place:.1%}", channels)
        table.add_row(Text(h.hookpoint), *cells)
    return _captioned(table, "share: of the summed squared norms of the massive rows")


def tokens_table(hookpoints: Sequence[HookpointStatistics]) -> Table:
    """The tokens on which massive rows stand."""
    n_shown = 8 if len(hookpoints) <= _FEW else 4
    table = _table("massive rows", "distinct tokens")
    table.add_column("most frequent token ids (rows)")
    for h in hookpoints:
        tokens = ", ".join(f"{t.token_id} ({t.n_rows:,})" for t in h.massive.tokens[:n_shown])
        table.add_row(Text(h.hookpoint), f"{h.massive.n_distinct_tokens:,}", tokens)
    return table


def ordinary_table(hookpoints: Sequence[HookpointStatistics]) -> Table:
    """Where the ordinary rows lie: mean, and the channels that stand out."""
    n_shown = 8 if len(hookpoints) <= _FEW else 3
    table = _table("other rows", "RMS norm", "mean row", "mean |value|", "variance")
    for h in hookpoints:
        table.add_row(
            Text(h.hookpoint),
            compact(math.sqrt(h.mean_squared_norm)),
            f"{h.mean_row:.1%}",
            _channels(h.largest_mean_abs[:n_shown]),
            _channels(h.largest_variance[:n_shown]),
        )
    return _captioned(
        table,
        "mean row: its norm over the RMS norm. Channels with the largest mean |value| and "
        "variance, and how many times that of the median channel",
    )


def places_of(hookpoints: Sequence[HookpointStatistics]) -> dict[str, list[PlaceNorms]]:
    """`0`, `1`, ..., `4-7`, ... -> the norms there, a hookpoint each; no numbers without a row."""
    known = [{(p.first_place, p.last_place): p for p in h.norms_by_place} for h in hookpoints]
    found = {}
    for first, last in sorted(set().union(*known)):
        none = PlaceNorms(first, last, 0, math.nan, math.nan, math.nan)
        label = f"{first}" if first == last else f"{first}-{last}"
        found[label] = [norms.get((first, last), none) for norms in known]
    return found


def compact(value: float) -> str:
    """A number in five characters or so: `0.0171`, `1.71`, `171`, `1,709`, `24.4k`, `104k`."""
    if not math.isfinite(value):
        return "none" if math.isnan(value) else "inf"
    for unit, factor, least in (("G", 1e9, 1e9), ("M", 1e6, 1e6), ("k", 1e3, 1e4)):
        if abs(value) >= least:
            scaled = value / factor
            digits = f"{scaled:,.1f}" if abs(scaled) < 100 else f"{scaled:,.0f}"
            return digits.removesuffix(".0") + unit
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _non_finite_lines(found: CacheStatistics) -> Iterator[str]:
    for h in found.hookpoints:
        if h.n_non_finite:
            yield (
                f"{h.hookpoint}: {h.n_non_finite:,} rows whose norm is infinite or no number; "
                "nothing uses them"
            )


def _channels(values: Sequence[ChannelValue]) -> str:
    return "\n".join(
        f"{c.channel}: {compact(c.value):>5} {compact(round(c.over_median, 1)):>5}x" for c in values
    )


def _share(share: float) -> str:
    return "max" if share == 1 else f"{100 * share:g}%"


def _captioned(table: Table, caption: str) -> Table:
    table.caption, table.caption_justify = caption, "left"
    return table


def _table(title: str, *columns: str, padding: int = 2) -> Table:
    """A table without lines: names to the left, numbers to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, padding, 0, 0))
    table.add_column(title, overflow="fold")
    for column in columns:
        table.add_column(Text(column), justify="right", no_wrap=True)
    return table
