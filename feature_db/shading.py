"""Tokens shaded by activation, for notebooks (HTML) and terminals (rich).

Everything passes through `visible`; what goes into HTML is escaped too, so that token text is
never markup. The HTML is self-contained: inline styles, no script, nothing fetched.
"""

from collections.abc import Iterable, Sequence
from html import escape

from rich.text import Text

from .token_text import visible

_FAINTEST = 0.04
_ORANGE = (255, 150, 30)
_STYLE = "font-family:ui-monospace,monospace;font-size:12px;line-height:1.6"
_CELL = "text-align:left;padding:1px 8px;vertical-align:top"


def shades(acts: Sequence[float], highest: float | None = None) -> list[float]:
    """Each act as a fraction of `highest` (the largest of them if left out), from 0 to 1."""
    scale = highest if highest else max(acts, default=0.0)
    if scale <= 0:
        return [0.0] * len(acts)
    return [min(max(float(act) / scale, 0.0), 1.0) for act in acts]


def shaded_html(
    tokens: Sequence[str],
    acts: Sequence[float],
    *,
    peak: int | None = None,
    highest: float | None = None,
) -> str:
    """Tokens as HTML, darker where the act is larger, its value in the tooltip.

    peak: index of a token to underline. highest: the act of full colour.
    """
    parts = []
    for i, (token, act, shade) in enumerate(zip(tokens, acts, shades(acts, highest), strict=True)):
        style = ""
        if shade >= _FAINTEST:
            style = "background:rgba({},{},{},{:.2f});".format(*_ORANGE, 0.15 + 0.85 * shade)
            style += "color:#000;"
        if i == peak:
            style += "border-bottom:2px solid currentColor;"
        shown = html_text(token)
        parts.append(
            f'<span style="{style}" title="{float(act):.4g}">{shown}</span>' if style else shown
        )
    return f'<span style="white-space:pre-wrap">{"".join(parts)}</span>'


def shaded_text(
    tokens: Sequence[str],
    acts: Sequence[float],
    *,
    peak: int | None = None,
    highest: float | None = None,
) -> Text:
    """Tokens for a terminal; the arguments are those of `shaded_html`."""
    text = Text(no_wrap=False, overflow="fold")
    for i, (token, shade) in enumerate(zip(tokens, shades(acts, highest), strict=True)):
        style = "bold underline" if i == peak else ""
        if shade >= _FAINTEST:
            red, green, blue = (round(255 - (255 - c) * (0.15 + 0.85 * shade)) for c in _ORANGE)
            style += f" black on rgb({red},{green},{blue})"
        text.append(visible(token), style=style.strip() or None)
    return text


def html_text(text: str) -> str:
    """Text safe inside HTML and inside attributes: unsafe characters shown, markup escaped."""
    return escape(visible(text), quote=True)


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already; the header is text."""
    head = "".join(f'<th style="{_CELL}">{html_text(name)}</th>' for name in header)
    body = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{cell}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    return f'<table style="{_STYLE};border-collapse:collapse"><tr>{head}</tr>{body}</table>'


def html_block(*parts: str) -> str:
    """HTML parts one under the other in a monospaced block."""
    return f'<div style="{_STYLE}">{"".join(f"<div>{part}</div>" for part in parts)}</div>'
