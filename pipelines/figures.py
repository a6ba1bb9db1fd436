"""`CacheStatistics` -> one drawing, as a .png or .svg file.

Four panels: norms by place in the block, norms by hookpoint, massive channels, disk. Up to six
hookpoints are drawn side by side, each in its colour; more are drawn over the model's layers.
matplotlib is optional (`saebase[plots]`) and imported by need; pyplot's global state is not used.
"""

import importlib.util
import io
import itertools
import math
import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from activation_cache import CacheStatistics
from activation_cache.durable import written
from activation_cache.manifest import Fingerprint
from activation_cache.statistics import HookpointStatistics

from .cache_tables import compact, places_of
from .errors import PipelineError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
_FEW = 6
_MOST_BARS = 36
_N_CHANNELS = 8
_DPI = 130
_LIMIT: dict[str, Any] = {"linestyle": "--", "linewidth": 1}


class Place(NamedTuple):
    """A hookpoint on the axis of layers: x, and the `site` that all layers have (`resid_post`)."""

    x: float
    site: str


def require_plot(file: Path, *, flag: str = "--plot", suffixes: Sequence[str] = SUFFIXES) -> None:
    """Raises: PipelineError if `file` can't be drawn into: said before any work is done."""
    if file.suffix.lower() not in suffixes:
        raise PipelineError(f"{flag} {file}: expected a name that ends in {' or '.join(suffixes)}")
    if not file.parent.is_dir():
        raise PipelineError(f"{flag} {file}: there is no folder {file.parent}; make it first")
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise PipelineError(f"{flag} {file}: can't be written; choose another file")
    if importlib.util.find_spec("matplotlib") is None:
        raise PipelineError(f"{flag} needs matplotlib: pip install 'saebase[plots]'")


def write_figure(figure: "Figure", file: Path) -> None:
    """Draw `figure` into `file`, whole or not at all. Raises: CacheError if it can't be written."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format=file.suffix.lower().removeprefix("."), dpi=_DPI)
    with written(file) as out:
        out.write(drawn.getbuffer())


def statistics_figure(found: CacheStatistics, fingerprint: Fingerprint) -> "Figure":
    """The four panels. fingerprint: names the model and the text in the title."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 10), layout="constrained")
    by_place, by_hookpoint, massive, disk = figure.subplots(2, 2).flat
    hookpoints = found.hookpoints
    if len(hookpoints) <= _FEW:
        _norms_by_place(by_place, hookpoints)
        _norm_histograms(by_hookpoint, hookpoints)
        _massive_bars(massive, hookpoints)
        figure.legend(*by_place.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    else:
        _medians_by_place(by_place, hookpoints)
        _norms_over_layers(by_hookpoint, hookpoints)
        _massive_over_layers(massive, hookpoints)
    _disk(disk, found)
    rows = f"{found.n_tokens:,} rows"
    if found.n_rows_read < found.n_tokens:
        rows = f"the first {found.n_rows_read:,} of {rows}"
    names = f"{fingerprint.model} over {fingerprint.data}"
    title = f"{names}: {rows}, stored in {found.storage_dtype}"
    figure.suptitle(_literal(textwrap.fill(title, 120)))
    for axes in (by_place, by_hookpoint, massive, disk):
        axes.grid(visible=True, alpha=0.25)
        axes.set_axisbelow(True)
    return figure


# -- up to six hookpoints: side by side ----------------------------------------------------------


def _norms_by_place(axes: "Axes", hookpoints: Sequence[HookpointStatistics]) -> None:
    """Median with a band from 5% to 95%, and the limit of the massive, in a colour each."""
    places = places_of(hookpoints)
    x = range(len(places))
    for number, h in enumerate(hookpoints):
        norms, colour = [row[number] for row in places.values()], f"C{number}"
        label = _literal(f"{h.hookpoint} (median {compact(h.median_norm)})")
        axes.plot(x, [p.median for p in norms], marker="o", ms=4, color=colour, label=label)
        low, high = [p.low for p in norms], [p.high for p in norms]
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        if math.isfinite(h.massive.limit):
            axes.axhline(h.massive.limit, color=colour, **_LIMIT)
    axes.plot([], [], color="grey", label="massive above", **_LIMIT)
    axes.set_title("Norms by place in the block: median, 5% to 95%")
    _places_axis(axes, list(places))


def _norm_histograms(axes: "Axes", hookpoints: Sequence[HookpointStatistics]) -> None:
    """Share of the rows in each eighth of an octave."""
    for number, h in enumerate(hookpoints):
        histogram, colour = h.norm_histogram, f"C{number}"
        if not histogram.counts:
            continue
        shares = [count / sum(histogram.counts) for count in histogram.counts]
        axes.stairs(shares, histogram.edges, color=colour, linewidth=1.5)
        if math.isfinite(h.massive.limit):
            axes.axvline(h.massive.limit, color=colour, **_LIMIT)
    axes.set_title("Norms of all rows")
    axes.set_ylabel("share of the rows in a bin of 1/8 octave")
    axes.set_xlabel("L2 norm of a row")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    _log_norms(axes, "x")


def _massive_bars(axes: "Axes", hookpoints: Sequence[HookpointStatistics]) -> None:
    """A bar a channel, the hookpoints one after another."""
    x, ticks, labels = 0, list[int](), list[str]()
    n_bars = sum(len(h.massive.channels) for h in hookpoints)
    for number, h in enumerate(hookpoints):
        channels = h.massive.channels
        if not channels:
            continue
        at = list(range(x, x + len(channels)))
        bars = axes.bar(at, [c.mean for c in channels], color=f"C{number}")
        if n_bars <= 12:
            notes = [f"{compact(c.mean)}\n{c.share:.0%}" for c in channels]
            axes.bar_label(bars, notes, fontsize=8, padding=2)
        ticks, labels = ticks + at, labels + [str(c.channel) for c in channels]
        x += len(channels) + 1
    axes.set_title("Massive channels: mean value, share of massive rows' squared norm")
    if not labels:
        _say(axes, "no row is of massive norm")
        return
    axes.set_xticks(ticks, labels, fontsize=8, rotation=90 if n_bars > 12 else 0)
    spare = max(8 - x, 2) / 2
    axes.set_xlim(-0.5 - spare, x - 1.5 + spare)
    axes.margins(y=0.2)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("channel")
    axes.set_ylabel("mean value in massive rows")
    axes.yaxis.set_major_formatter(_number)


# -- more: over the layers -----------------------------------------------------------------------


def places_on_layers(names: Sequence[str]) -> list[Place]:
    """Where hookpoints stand on the axis of layers. A name without a number stands before the
    first layer (`embed`) or after the last."""
    layers = [_LAYER.fullmatch(name) for name in names]
    numbers = [int(found["layer"]) for found in layers if found]
    before, after = min(numbers, default=0) - 1, max(numbers, default=-1) + 1
    places = []
    for name, found in zip(names, layers, strict=True):
        if found:
            places.append(Place(int(found["layer"]), (found["prefix"] or "") + found["site"]))
        elif "embed" in name:
            places.append(Place(before, name))
        else:
            places.append(Place(after, name))
            after += 1
    return places


_LAYER = re.compile(r"(?:layers\.|(?P<prefix>.*?\.))(?P<layer>\d+)\.(?P<site>.+)")


def _medians_by_place(axes: "Axes", hookpoints: Sequence[HookpointStatistics]) -> None:
    """A line a hookpoint, coloured by layer, dashed by site."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    places, at = places_of(hookpoints), places_on_layers(_names(hookpoints))
    xs, sites = [p.x for p in at], list(dict.fromkeys(p.site for p in at))
    scale, colours = Normalize(min(xs), max(xs)), colormaps["viridis"]
    styles = dict(zip(sites, itertools.cycle(("-", "--", ":", "-.")), strict=False))
    for number, place in enumerate(at):
        medians, style = [row[number].median for row in places.values()], styles[place.site]
        colour = colours(scale(place.x))
        axes.plot(range(len(places)), medians, color=colour, linewidth=1.2, linestyle=style)
    axes.set_title("Norms by place in the block: median of each hookpoint")
    _places_axis(axes, list(places))
    axes.figure.colorbar(ScalarMappable(scale, colours), ax=axes, label="layer", pad=0.01)
    if len(sites) > 1:
        for site, style in styles.items():
            axes.plot([], [], color="grey", linestyle=style, label=_literal(site))
        axes.legend(fontsize=8)


def _norms_over_layers(axes: "Axes", hookpoints: Sequence[HookpointStatistics]) -> None:
    """Median, band from 1% to 99%, maximum and limit, in a colour each site."""
    for number, (site, xs, found) in enumerate(_by_site(hookpoints)):
        colour, quantiles = f"C{number % 10}", [h.norm_quantiles for h in found]
        medians, marker = [q[0.5] for q in quantiles], "o" if len(xs) == 1 else ""
        axes.plot(xs, medians, marker=marker, ms=4, color=colour, label=f"{site}: median")
        low, high = [q[0.01] for q in quantiles], [q[0.99] for q in quantiles]
        axes.fill_between(xs, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(xs, [q[1.0] for q in quantiles], color=colour, linewidth=0.8, marker=".", ms=3)
        axes.plot(xs, [h.massive.limit for h in found], color=colour, **_LIMIT)
    axes.fill_between([], [], [], color="grey", alpha=0.2, label="1% to 99%")
    axes.plot([], [], color="grey", linewidth=0.8, marker=".", ms=3, label="maximum")
    axes.plot([], [], color="grey", label="massive above", **_LIMIT)
    axes.set_title("Norms by layer")
    axes.set_ylabel("L2 norm of a row")
    _log_norms(axes, "y")
    _layers_axis(axes, hookpoints)
    axes.legend(fontsize=8)


def _massive_over_layers(axes: "Axes", hookpoints: Sequence[HookpointStatistics]) -> None:
    """Mean value of the largest massive channels over the layers, a line each."""
    axes.set_title("Massive channels: mean value in massive rows")
    lines: dict[tuple[str, int], dict[float, float]] = {}
    for site, xs, found in _by_site(hookpoints):
        for x, h in zip(xs, found, strict=True):
            for c in h.massive.channels:
                lines.setdefault((site, c.channel), {})[x] = c.mean
    if not lines:
        _say(axes, "no row is of massive norm")
        return
    largest = sorted(lines, key=lambda key: -max(map(abs, lines[key].values())))[:_N_CHANNELS]
    n_sites = len({site for site, _ in lines})
    for site, channel in largest:
        means = lines[site, channel]
        label = f"{site} {channel}" if n_sites > 1 else f"channel {channel}"
        axes.plot([*means], [*means.values()], marker="o", ms=3, linewidth=1, label=label)
    _signed_log(axes, [mean for key in largest for mean in lines[key].values()])
    axes.set_ylabel("mean value")
    _layers_axis(axes, hookpoints)
    left_out = len(lines) - len(largest)
    title = f"{left_out} smaller ones not drawn" if left_out else None
    axes.legend(fontsize=8, title=title, title_fontsize=8)


def _by_site(
    hookpoints: Sequence[HookpointStatistics],
) -> list[tuple[str, list[float], list[HookpointStatistics]]]:
    """(site, x of its layers in order, their statistics), a line each."""
    lines: dict[str, list[tuple[float, HookpointStatistics]]] = {}
    for place, h in zip(places_on_layers(_names(hookpoints)), hookpoints, strict=True):
        lines.setdefault(place.site, []).append((place.x, h))
    found = []
    for site, points in lines.items():
        points.sort(key=lambda point: point[0])
        found.append((_literal(site), [x for x, _ in points], [h for _, h in points]))
    return found


# -- for both ------------------------------------------------------------------------------------


def _disk(axes: "Axes", found: CacheStatistics) -> None:
    """A bar a stream; where they are too many, a bar a site."""
    sizes = found.disk.by_stream
    if len(sizes) > _MOST_BARS:
        sites = [place.site for place in places_on_layers(list(sizes))]
        sizes = dict.fromkeys(sites, 0)
        for site, n_bytes in zip(sites, found.disk.by_stream.values(), strict=True):
            sizes[site] += n_bytes
    at = range(len(sizes))
    small = len(sizes) > 12
    names = _names(found.hookpoints) if len(found.hookpoints) <= _FEW else []
    colours = {name: f"C{number}" for number, name in enumerate(names)}
    bars = axes.barh(
        at,
        [n_bytes / 1e6 for n_bytes in sizes.values()],
        color=[colours.get(name, "0.5") for name in sizes],
    )
    notes = [f"{n_bytes / 1e6:,.1f}" for n_bytes in sizes.values()]
    axes.bar_label(bars, notes, fontsize=6 if small else 8, padding=3)
    axes.set_yticks(at, [_literal(name) for name in sizes], fontsize=6 if small else 8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("MB on disk")
    axes.xaxis.set_major_formatter(_number)
    per_token = f"{found.disk.bytes_per_token:,.0f} bytes a token"
    axes.set_title(f"Disk: {found.disk.n_bytes / 1e6:,.1f} MB, {per_token}")


def _places_axis(axes: "Axes", labels: list[str]) -> None:
    axes.set_xticks(range(len(labels)), labels, fontsize=8, rotation=30 if len(labels) > 9 else 0)
    axes.set_xlabel("place in the block (tokens before this one)")
    axes.set_ylabel("L2 norm of a row")
    _log_norms(axes, "y")


def _layers_axis(axes: "Axes", hookpoints: Sequence[HookpointStatistics]) -> None:
    """Numbers of layers, and the names of what is no layer."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    names = _names(hookpoints)
    places = places_on_layers(names)
    others = {p.x: name for p, name in zip(places, names, strict=True) if p.site == name}
    axes.set_xlabel("layer")
    axes.set_xlim(min(p.x for p in places) - 0.7, max(p.x for p in places) + 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}" if x >= 0 else ""))
    if others:
        axes.set_xticks([*others], [_literal(n) for n in others.values()], minor=True, rotation=60)
        axes.tick_params(axis="x", which="minor", labelsize=7)


def _log_norms(axes: "Axes", which: str) -> None:
    """A logarithmic axis with plain numbers, as many as there is room for."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis: Axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    low, high = axis.get_view_interval()
    subs = (1.0, 2.0, 5.0) if high < 3e3 * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(_number)
    axis.set_minor_formatter(NullFormatter())


def _signed_log(axes: "Axes", values: Sequence[float]) -> None:
    """A logarithmic axis for values of either sign."""
    sizes = [abs(value) for value in values if value]
    if sizes and max(sizes) > 30 * min(sizes):
        axes.set_yscale("symlog", linthresh=10 ** math.floor(math.log10(min(sizes))))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.yaxis.set_major_formatter(_number)


def _say(axes: "Axes", text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
    axes.set_xticks([])
    axes.set_yticks([])


def _names(hookpoints: Sequence[HookpointStatistics]) -> list[str]:
    return [h.hookpoint for h in hookpoints]


def _literal(text: str) -> str:
    """Text in which matplotlib reads no formula."""
    return text.replace("$", r"\$")


def _number(value: float, _: float) -> str:
    """What stands at a tick."""
    return compact(value)
