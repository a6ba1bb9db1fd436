"""`RunRecord`s -> figures: curves of training, and histograms of features. Several share the axes.

matplotlib is optional (`saebase[plots]`) and imported by need; pyplot's global state is not used.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from sae import Metrics

from .run_record import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
"""Okabe and Ito's, told apart by all kinds of sight."""
STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.8,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "svg.hashsalt": "saebase",
}
WIDTH_INCHES = 12.0
_N_POINTS = 400
_N_BINS = 60


class Curve(NamedTuple):
    """One panel: its title, the axis' label, what is drawn of a line of metrics, and how."""

    title: str
    label: str
    value: Callable[[Metrics], float]
    is_log: bool = False


CURVES = (
    Curve(
        "Loss", "error and penalties / variance", lambda m: m.loss + m.penalty + m.aux_loss, True
    ),
    Curve("FVU", "fraction of variance unexplained", lambda m: m.fvu, True),
    Curve("L0", "active features a row", lambda m: m.l0),
    Curve("Dead features", "% of all", lambda m: 100 * m.dead_fraction),
    Curve("Learning rate", "learning rate", lambda m: m.lr),
    Curve("Sparsity coefficient", "weight of the penalty", lambda m: m.coefficient),
    Curve("Gradient norm", "L2, before clipping", lambda m: m.grad_norm, True),
    Curve("Speed", "tokens / s", lambda m: m.tokens_per_s),
)


def style() -> Any:
    """matplotlib's settings, for rc_context."""
    return STYLE


def colour_of(index: int) -> str:
    """Of a run: the same in every panel."""
    return COLOURS[index % len(COLOURS)]


def draw_curves(figure: "Figure", runs: Sequence[RunRecord]) -> None:
    """The panels over tokens, two rows of three; what no run has (a coefficient) is left out."""
    drawn = [c for c in CURVES if any(c.value(m) for run in runs for m in run.metrics)]
    chosen = [c for c in CURVES if c in drawn or c.title == "Dead features"][:6]
    panels = figure.subplots(2, 3).flat
    unit, factor = _unit_of(max(run.metrics[-1].n_tokens for run in runs))
    for axes, curve in zip(panels, chosen, strict=False):
        for index, run in enumerate(runs):
            x, y = thinned(run.metrics, curve.value)
            axes.plot(x / factor, y, color=colour_of(index), label=_literal(run.name))
        if curve.is_log and all(curve.value(m) > 0 for run in runs for m in run.metrics):
            _log_axis(axes)
        else:
            axes.set_ylim(0, None if any(curve.value(m) for r in runs for m in r.metrics) else 1)
        axes.set_title(curve.title)
        axes.set_ylabel(curve.label)
        axes.set_xlabel(f"tokens{unit}")
        axes.margins(x=0.01)


def draw_features(figure: "Figure", runs: Sequence[RunRecord]) -> None:
    """Histograms of densities, cosines, maxima and norms, of the runs that are finished."""
    found = [(i, run.features) for i, run in enumerate(runs) if run.features is not None]
    density, cosine, maximum, norm = figure.subplots(1, 4)
    never = [f"{f.n_never_active:,}" for _, f in found]
    _histogram(density, [(i, f.log10_density) for i, f in found])
    density.set_title("Density of features")
    density.set_xlabel(f"log10 of the fraction of rows\n(never active: {', '.join(never)})")
    _histogram(cosine, [(i, f.max_cosine) for i, f in found])
    cosine.set_title("Nearest neighbours")
    cosine.set_xlabel("cosine with the most similar\nother decoder row")
    _histogram(maximum, [(i, f.max_act.clamp(min=1e-12).log10()) for i, f in found])
    maximum.set_title("Largest activations")
    maximum.set_xlabel("log10 of a feature's maximum")
    _norms(norm, found)
    density.set_ylabel("% of features")


def draw_legend(figure: "Figure", runs: Sequence[RunRecord]) -> None:
    """Colours of the runs, where there are several."""
    if len(runs) > 1:
        labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(*labels, loc="outside upper left", ncols=4)


def _unit_of(n_tokens: int) -> tuple[str, float]:
    """How to count tokens, so that few digits stand on the axis."""
    for unit, factor in ((", billions", 1e9), (", millions", 1e6), (", thousands", 1e3)):
        if n_tokens >= 2 * factor:
            return unit, factor
    return "", 1.0


def thinned(
    metrics: Sequence[Metrics], value: Callable[[Metrics], float]
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and values; of many lines, means over as many neighbours as it takes."""
    x = np.array([m.n_tokens for m in metrics], dtype=float)
    y = np.array([value(m) for m in metrics], dtype=float)
    n_each = -(-len(x) // _N_POINTS)
    starts = np.arange(0, len(x), n_each)
    counts = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def _norms(axes: "Axes", found: Sequence[tuple[int, Any]]) -> None:
    """Decoder norms by place of a crosscoder; of others all are 1, and the encoder's are drawn."""
    has_places = any(len(f.decoder_norms) > 1 for _, f in found)
    if not has_places:
        _histogram(axes, [(i, f.encoder_norms) for i, f in found])
        axes.set_title("Encoder norms")
        axes.set_xlabel("L2 norm of a feature's column\n(decoder rows have norm 1)")
        return
    series = [(place, norms) for _, f in found[:1] for place, norms in f.decoder_norms.items()]
    _histogram(axes, [(i + 1, norms) for i, (_, norms) in enumerate(series)])
    for line, (place, _) in zip(axes.patches, series, strict=False):
        line.set_label(_literal(place))
    axes.legend(fontsize=7)
    axes.set_title("Decoder norms by place")
    axes.set_xlabel("L2 norm of a row's part")


def _histogram(axes: "Axes", series: Sequence[tuple[int, torch.Tensor]]) -> None:
    """Shares of the features in bins that all series have in common."""
    values = [(i, each.float().cpu().numpy()) for i, each in series if len(each)]
    if not values:
        axes.text(0.5, 0.5, "none yet", ha="center", transform=axes.transAxes)
        return
    low = min(float(each.min()) for _, each in values)
    high = max(float(each.max()) for _, each in values)
    edges = np.linspace(low, high if high - low > 1e-6 else low + 0.01, _N_BINS + 1)
    for index, each in values:
        counts, _ = np.histogram(each, edges)
        shares = 100 * counts / len(each)
        is_alone = len(values) == 1
        axes.stairs(shares, edges, color=colour_of(index), fill=is_alone, linewidth=1.4)
    axes.set_ylim(bottom=0)


def _log_axis(axes: "Axes") -> None:
    """Logarithmic, with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=9))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _literal(text: str) -> str:
    """Text in which matplotlib reads no formula."""
    return text.replace("$", r"\$")
