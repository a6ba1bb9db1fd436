"""HTML: one page of features that needs nothing but itself: no script, no font, no server.

Everything that a model or a person wrote passes through `html_text`, and the page's own policy
forbids scripts and requests: token text can't become markup, nor markup act.
"""

from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from ..errors import ExportError
from ..feature import Coactivation, Context, Feature, HistogramBin, LogitEffect, Neighbor, TokenLift
from ..feature_rows import Pair
from ..shading import html_text, shades
from ..token_text import quoted
from .chosen import CHOSEN, Chosen
from .destination import new_file

# A feature takes about 20 kB, and browsers grow slow at tens of megabytes.
MAX_FEATURES = 1000
_N_OPEN = 10
_FAINTEST = 0.04
# Above this share of the colour, text on it is dark in the dark scheme too.
_BRIGHT = 0.55
_BLOCK = 1024


class _Listed(NamedTuple):
    """A feature in the table of contents."""

    sae_id: int
    feature_id: int
    sae_name: str
    hookpoint: str
    model: str
    label: str | None
    density: float


def write_html(chosen: Chosen, out: Path, overwrite: bool) -> None:
    """The page, feature by feature. Raises: ExportError for more features than a browser takes."""
    if len(chosen.ids) > MAX_FEATURES:
        raise ExportError(
            f"a page of {len(chosen.ids):,} features is more than a browser takes: choose "
            f"{MAX_FEATURES:,} at most (--features SQL)"
        )
    listed = _listed(chosen)
    on_page = {(each.sae_id, each.feature_id) for each in listed}
    with new_file(out, overwrite=overwrite) as file:
        file.write(_head(chosen, listed).encode())
        for i, page in enumerate(chosen.db.pages(chosen.ids)):
            file.write("".join(f"{part}\n" for part in _section(page, on_page)).encode())
            chosen.tell(i + 1)
        file.write(b"</main>\n</body>\n</html>\n")


def _listed(chosen: Chosen) -> list[_Listed]:
    return [_Listed(*row) for block in chosen.blocks(_BLOCK) for row in chosen.ask(_LISTED, block)]


def _head(chosen: Chosen, listed: Sequence[_Listed]) -> str:
    n = f"{len(listed):,} feature{'' if len(listed) == 1 else 's'}"
    style = (files(__package__) / "static_page.css").read_text(encoding="utf-8")
    items = "\n".join(_item(each) for each in listed)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="saebase">
<title>{html_text(f"{n} of {chosen.db.name}")}</title>
<style>
{style}</style>
</head>
<body>
<nav aria-label="Features">
<ol>
{items}
</ol>
</nav>
<main>
<header>
<h1>{n}</h1>
{_sources(listed)}
<p class="key"><span class="t" style="--a:.2">weak</span><span class="t" style="--a:.6">to</span>\
<span class="t hi" style="--a:1">strong</span> share of the feature's largest activation; \
<span class="peak">underlined</span>: the token the context was chosen for</p>
</header>
"""


def _sources(listed: Sequence[_Listed]) -> str:
    sources = dict.fromkeys((each.sae_name, each.hookpoint, each.model) for each in listed)
    return "\n".join(
        f"<p>{html_text(f'{name} at {hookpoint} of {model}')}</p>"
        for name, hookpoint, model in sources
    )


def _item(each: _Listed) -> str:
    label = html_text(each.label) if each.label else "<i>never active</i>"
    return (
        f'<li><a href="#{_anchor(each.sae_id, each.feature_id)}"><b>{each.feature_id}</b> '
        f'<span>{label}</span><span class="d">{each.density:.3%}</span></a></li>'
    )


def _section(page: Feature, on_page: set[Pair]) -> Iterator[str]:
    """A feature as HTML, part by part."""
    yield f'<section id="{_anchor(page.sae_id, page.feature_id)}">'
    yield f"<h2><b>{page.feature_id}</b> {html_text(page.shown_label)}</h2>"
    yield f'<p class="where">{html_text(f"{page.sae_name} at {page.hookpoint}")}</p>'
    yield _statistics(page)
    highest = page.max_act
    yield from _contexts("strongest contexts", page.top[:_N_OPEN], highest, is_open=True)
    yield '<div class="cards">'
    yield _card("active on", _lifts(page.tokens))
    yield _card("token before", _lifts(page.tokens_before))
    yield _card("token behind", _lifts(page.tokens_after))
    yield _card("promotes", _effects(page.promoted))
    yield _card("suppresses", _effects(page.suppressed))
    yield _card("nearest directions", _others(page, page.neighbors, on_page))
    yield _card("active together with", _others(page, page.coactivations, on_page))
    yield "</div>"
    yield from _contexts("further strong contexts", page.top[_N_OPEN:], highest)
    yield from _contexts("contexts over all strengths", page.quantiles, highest)
    yield from _contexts("near misses: a neighbour is active, it is not", page.negatives, highest)
    yield "</section>"


def _statistics(page: Feature) -> str:
    figures = [("density", f"{page.density:.3%}"), ("activations", f"{page.n_active:,}")]
    if page.mean_act is not None and page.max_act is not None:
        figures += [("mean", f"{page.mean_act:.3g}"), ("largest", f"{page.max_act:.3g}")]
    if page.label_method:
        figures.append(("label by", html_text(page.label_method)))
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures)
    return f'<dl class="figures">{cells}{_histogram(page.histogram)}</dl>'


def _histogram(bins: Sequence[HistogramBin]) -> str:
    """A bar for each bin, as wide as the bin and as high as its share of the fullest one."""
    if not bins:
        return ""
    lowest, highest, most = bins[0].lo, bins[-1].hi, max(b.n for b in bins)
    scale = 160 / (highest - lowest)
    bars = []
    for b in bins:
        height = max(30 * b.n / most, 1)
        bars.append(
            f'<rect x="{(b.lo - lowest) * scale:.1f}" y="{32 - height:.1f}" '
            f'width="{max((b.hi - b.lo) * scale - 1, 0.5):.1f}" height="{height:.1f}">'
            f"<title>{b.lo:.3g} to {b.hi:.3g}: {b.n:,}</title></rect>"
        )
    return (
        f'<div><dt>activations by strength</dt><dd><span class="end">{lowest:.3g}</span>'
        '<svg width="160" height="32" role="img" aria-label="Histogram of activations">'
        f'{"".join(bars)}</svg><span class="end">{highest:.3g}</span></dd></div>'
    )


def _card(title: str, rows: Sequence[str]) -> str:
    if not rows:
        return ""
    return f'<div class="card"><h3>{title}</h3><ul>{"".join(rows)}</ul></div>'


def _lifts(tokens: Sequence[TokenLift]) -> list[str]:
    return [_row(f"<code>{html_text(quoted(t.token))}</code>", f"{t.lift:.3g}×") for t in tokens]


def _effects(effects: Sequence[LogitEffect]) -> list[str]:
    return [_row(f"<code>{html_text(quoted(e.token))}</code>", f"{e.logit:+.2f}") for e in effects]


def _others(
    page: Feature, others: Sequence[Neighbor] | Sequence[Coactivation], on_page: set[Pair]
) -> list[str]:
    rows = []
    for other in others:
        text = f"<b>{other.feature_id}</b> {html_text(other.label or '')}"
        if (page.sae_id, other.feature_id) in on_page:
            text = f'<a href="#{_anchor(page.sae_id, other.feature_id)}">{text}</a>'
        near = other.cosine if isinstance(other, Neighbor) else other.npmi
        rows.append(_row(text, f"{near:.2f}"))
    return rows


def _row(text: str, figure: str) -> str:
    return f"<li><span>{text}</span><span>{figure}</span></li>"


def _contexts(
    title: str, contexts: Sequence[Context], highest: float | None, *, is_open: bool = False
) -> Iterator[str]:
    if not contexts:
        return
    yield f"<details{' open' if is_open else ''}><summary>{title} ({len(contexts)})</summary>"
    for context in contexts:
        quantile = "" if context.quantile is None else f" · q{context.quantile:.2f}"
        yield (
            f'<p class="c"><span class="act">{context.act:.3g}{quantile}</span>'
            f"<span>{_shaded(context, highest)}</span></p>"
        )
    yield "</details>"


def _shaded(context: Context, highest: float | None) -> str:
    shaded = zip(context.tokens, context.acts, shades(context.acts, highest), strict=True)
    return "".join(
        _token(token, act, shade, is_peak=i == context.peak)
        for i, (token, act, shade) in enumerate(shaded)
    )


def _token(token: str, act: float, shade: float, *, is_peak: bool) -> str:
    names = ["peak"] if is_peak else []
    style = ""
    if shade >= _FAINTEST:
        names += ["t", "hi"] if shade > _BRIGHT else ["t"]
        style = f' style="--a:{0.12 + 0.88 * shade:.2f}"'
    if not names:
        return html_text(token)
    return f'<span class="{" ".join(names)}"{style} title="{act:.4g}">{html_text(token)}</span>'


def _anchor(sae_id: int, feature_id: int) -> str:
    return f"f-{sae_id}-{feature_id}"


_LISTED = f"""
WITH {CHOSEN}
SELECT sae_id, feature_id, name, hookpoint, model, label, density
FROM chosen JOIN features USING (sae_id, feature_id) JOIN saes USING (sae_id) ORDER BY place
"""
