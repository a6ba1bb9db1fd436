"""Chosen features as one HTML file by itself: styles inside, no script, nothing fetched."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..feature_set import FeatureSet
from ..shading import html_text

if TYPE_CHECKING:
    from ..database import FeatureDB
    from ..feature import Feature

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --faint: #8888; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 0; }
.about { color: GrayText; }
nav table { border-collapse: collapse; width: 100%; }
nav td, nav th { text-align: left; padding: .15rem .6rem .15rem 0; }
nav tr { border-bottom: 1px solid var(--line); }
nav td.n, nav th.n { text-align: right; font-variant-numeric: tabular-nums; }
section { border-top: 2px solid var(--line); margin-top: 2rem; padding-top: 1rem; }
a { color: LinkText; text-decoration: none; } a:hover { text-decoration: underline; }
@media print { nav { page-break-after: always; } section { page-break-inside: avoid; } }
"""


def write_page(
    db: "FeatureDB",
    path: Path,
    ids: Sequence[tuple[int, int]],
    on_exported: Callable[[int, int], None],
) -> None:
    """A list of the features, then everything about each."""
    with path.open("w", encoding="utf-8") as file:
        file.write(_head(db, len(ids)))
        table = FeatureSet(db, ids).table().fetchall()
        file.write(
            "<nav><table><tr><th class=n>feature</th><th>label</th><th class=n>density</th></tr>"
        )
        for sae_id, feature_id, label, density, *_ in table:
            file.write(
                f'<tr><td class=n><a href="#{_anchor(sae_id, feature_id)}">{feature_id}</a></td>'
                f"<td>{html_text(label or '—')}</td><td class=n>{density:.3%}</td></tr>\n"
            )
        file.write("</table></nav>\n")
        for n, page in enumerate(db.pages(ids), 1):
            file.write(_section(page))
            on_exported(n, len(ids))
        file.write("</body></html>\n")


def _head(db: "FeatureDB", n: int) -> str:
    saes = db.saes().arrow().to_pylist()
    about = "; ".join(f"{sae['name']}: {sae['model']} at {sae['hookpoint']}" for sae in saes)
    title = f"{n:,} features of {db.path.name}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">"
        f"<title>{html_text(title)}</title><style>{_STYLE}</style></head>\n<body>"
        f"<h1>{html_text(title)}</h1><p class=about>{html_text(about)}. Contexts are shaded by "
        "activation; the active token is underlined.</p>\n"
    )


def _section(page: "Feature") -> str:
    anchor = _anchor(page.sae_id, page.feature_id)
    return f'<section id="{anchor}">{page._repr_html_()}</section>\n'


def _anchor(sae_id: int, feature_id: int) -> str:
    return f"f{sae_id}-{feature_id}"
