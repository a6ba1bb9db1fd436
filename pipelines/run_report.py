"""Runs -> one report: a page that needs nothing else, or a drawing.

In: folders of runs or sweeps. Out: an .html file with figures inside and tables beside them, or the
same as a .png or .svg.
"""

import io
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activation_cache.durable import written

from .figures import require_plot
from .run_figures import WIDTH_INCHES, colour_of, draw_curves, draw_features, draw_legend, style
from .run_record import RunRecord, read_runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".html", ".png", ".svg")
_DPI = 100
_MOST_RUNS = 24
_MOST_COLUMNS = 9
_PAGE_CSS = Path(__file__).with_name("report.css")


def require_report(file: Path, flag: str) -> None:
    """Raises: PipelineError if `file` can't be written: said before any work is done."""
    require_plot(file, flag=flag, suffixes=SUFFIXES)


def write_report(folders: Sequence[Path], file: Path) -> None:
    """Read the runs and write their report, whole or not at all.

    Raises: PipelineError for what is no run; CacheError if the file can't be written.
    """
    runs = read_runs(folders)
    is_page = file.suffix.lower() == ".html"
    content = page(runs).encode() if is_page else drawing(runs, file.suffix.lower())
    with written(file) as out:
        out.write(content)


def page(runs: Sequence[RunRecord]) -> str:
    """The report as HTML."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    shown = runs[:_MOST_RUNS]
    parts = [f"<h1>{escape(title)}</h1>", f"<p class=lead>{escape(_lead(runs))}</p>"]
    parts.append(_by_run(_key_figures(shown), shown))
    parts += ["<h2>Training</h2>", _figure(shown, draw_curves, 6.2)]
    if any(run.features is not None for run in shown):
        parts += ["<h2>Features</h2>", _figure(shown, draw_features, 3.3)]
    if evaluated := [run for run in shown if run.evaluation]:
        parts += ["<h2>Evaluation</h2>", _by_name(_rows(evaluated, "evaluation"), evaluated, shown)]
    settings = _rows(shown, "settings")
    differing = {name: row for name, row in settings.items() if len(set(row)) > 1}
    if differing:
        parts += ["<h2>What differs</h2>", _by_run(differing, shown)]
    alike = {name: row[:1] for name, row in settings.items() if name not in differing}
    title_of_rest = "Settings of all" if differing else "Settings"
    parts += [f"<h2>{title_of_rest}</h2>", _by_name(alike, shown[:1], shown)]
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{escape(title)}</title>"
        f"<style>{_PAGE_CSS.read_text(encoding='utf-8')}</style></head><body><main>"
        f"{''.join(parts)}</main></body></html>\n"
    )


def drawing(runs: Sequence[RunRecord], suffix: str) -> bytes:
    """The report as one figure."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    shown = runs[:_MOST_RUNS]
    cells = _cells(shown)
    has_features = any(run.features is not None for run in shown)
    heights = [6.2, 3.3 if has_features else 0.1, 0.19 * len(cells) + 0.2]
    height = sum(heights) + 0.3
    with rc_context(style()):
        figure = Figure(
            figsize=(WIDTH_INCHES, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06)
        )
        curves, features, table = figure.subfigures(3, 1, height_ratios=heights, squeeze=False).flat
        draw_curves(curves, shown)
        draw_legend(curves, shown)
        if has_features:
            draw_features(features, shown)
        _draw_table(table, cells)
        name = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
        title = f"{name}: {_lead(runs)}".replace("$", r"\$")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        return _bytes_of(figure, suffix)


def _figure(runs: Sequence[RunRecord], draw: Any, height: float) -> str:
    """A figure as inline SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with rc_context(style()):
        figure = Figure(
            figsize=(WIDTH_INCHES, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06)
        )
        draw(figure, runs)
        drawn = _bytes_of(figure, ".svg").decode()
    drawn = drawn[drawn.index("<svg") :]
    # Ids are a page's, and each figure has the same ones.
    prefix = draw.__name__
    drawn = re.sub(r'(id="|url\(#|href="#)', rf"\1{prefix}-", drawn)
    return f"<figure>{drawn}</figure>"


def _bytes_of(figure: "Figure", suffix: str) -> bytes:
    drawn = io.BytesIO()
    about = {"Date": None} if suffix == ".svg" else None
    figure.savefig(drawn, format=suffix.removeprefix("."), dpi=_DPI, metadata=about)
    return drawn.getvalue()


def _lead(runs: Sequence[RunRecord]) -> str:
    """What the runs are, in a line."""
    known = [run.settings for run in runs if "architecture" in run.settings]
    kinds = ", ".join(dict.fromkeys(str(each["architecture"]) for each in known))
    places = ", ".join(dict.fromkeys(str(each["place"]) for each in known))
    parts = [f"{kinds} at {places}"] if known else []
    if unfinished := sum(run.features is None for run in runs):
        parts.append(f"{unfinished} of {len(runs)} not finished" if runs[1:] else "not finished")
    if len(runs) > _MOST_RUNS:
        parts.append(f"the first {_MOST_RUNS} of {len(runs)} are shown")
    return "; ".join(parts)


def _key_figures(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """What is looked at first: held-out figures where there are some, else the last of training."""
    rows: dict[str, list[str]] = {}
    for title, name in (
        ("held-out FVU", "reconstruction.fvu"),
        ("held-out L0", "reconstruction.l0"),
        ("cross-entropy recovered", "cross_entropy.recovered"),
    ):
        if any(name in run.evaluation for run in runs):
            rows[title] = [said(run.evaluation.get(name)) for run in runs]
    last = [run.metrics[-1] for run in runs]
    rows["FVU of the last batch"] = [said(m.fvu) for m in last]
    rows["L0 of the last batch"] = [said(m.l0) for m in last]
    rows["dead features"] = [f"{m.dead_fraction:.2%}" for m in last]
    rows["tokens"] = [f"{m.n_tokens:,}" for m in last]
    rows["tokens / s"] = [f"{m.n_tokens / max(m.elapsed_s, 1e-9):,.0f}" for m in last]
    rows["skipped batches"] = [f"{m.n_skipped:,}" for m in last]
    return rows


def _rows(runs: Sequence[RunRecord], which: str) -> dict[str, list[str]]:
    """Every name that one of the runs has, with each run's value."""
    names = dict.fromkeys(name for run in runs for name in getattr(run, which))
    return {name: [said(getattr(run, which).get(name)) for run in runs] for name in names}


def said(value: Any) -> str:
    """A value for a person."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _by_run(rows: dict[str, list[str]], runs: Sequence[RunRecord]) -> str:
    """A row for each run, a column for each name; of one run the figures side by side."""
    if len(runs) == 1:
        figures = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(row[0])}</dd></div>"
            for name, row in rows.items()
        )
        return f"<dl class=figures>{figures}</dl>"
    head = "".join(f"<th>{escape(name)}</th>" for name in rows)
    body = "".join(
        f"<tr>{_heading(run, index)}"
        f"{''.join(f'<td>{escape(row[index])}</td>' for row in rows.values())}</tr>"
        for index, run in enumerate(runs)
    )
    return _scrolling(f"<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody>")


def _by_name(
    rows: dict[str, list[str]], runs: Sequence[RunRecord], among: Sequence[RunRecord]
) -> str:
    """A row for each name, a column for each run; of one column several pieces side by side.

    among: all the runs of the page, whose colours these have.
    """
    if len(runs) == 1:
        pairs = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(row[0])}</dd></div>"
            for name, row in rows.items()
        )
        return f"<dl class=list>{pairs}</dl>"
    head = "".join(_heading(run, among.index(run)) for run in runs)
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
        for name, row in rows.items()
    )
    return _scrolling(f"<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody>")


def _heading(run: RunRecord, index: int) -> str:
    return f'<th><i style="background:{colour_of(index)}"></i>{escape(run.name)}</th>'


def _scrolling(table: str) -> str:
    return f"<div class=scroll><table>{table}</table></div>"


def _cells(runs: Sequence[RunRecord]) -> list[list[str]]:
    """The table of a drawing: of one run all settings, in two columns of names and values; of
    several a row for each, of what differs."""
    rows = {**_key_figures(runs), **_rows(runs, "settings")}
    if len(runs) > 1:
        rows = {name: row for name, row in rows.items() if len(set(row)) > 1}
        names = list(rows)[:_MOST_COLUMNS]
        own = [[run.name, *(rows[name][i] for name in names)] for i, run in enumerate(runs)]
        return [["", *names], *own]
    pairs = [[name, row[0]] for name, row in rows.items()]
    half = -(-len(pairs) // 2)
    pairs += [["", ""]] * (2 * half - len(pairs))
    return [left + right for left, right in zip(pairs[:half], pairs[half:], strict=True)]


def _draw_table(figure: Any, cells: list[list[str]]) -> None:
    axes = figure.subplots()
    axes.axis("off")
    longest = [max(len(row[i]) for row in cells) + 2 for i in range(len(cells[0]))]
    table = axes.table(
        [[cell.replace("$", r"\$") for cell in row] for row in cells],
        edges="horizontal",
        cellLoc="left",
        colWidths=[each / sum(longest) for each in longest],
        bbox=(0, 0, 1, 1),
    )
    table.auto_set_font_size(value=False)
    table.set_fontsize(8)
    for cell in table.get_celld().values():
        cell.set_edgecolor("#dddddd")
        cell.set_linewidth(0.6)
        cell.PAD = 0.02
