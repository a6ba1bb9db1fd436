"""Feature: everything the database holds about one feature, shown as a page.

In: a feature's id. Out: a frozen record with its statistics, contexts, tokens, logits, histogram
and neighbours; in notebooks and terminals its contexts are shaded by activation.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from .pages import Rows
from .shading import html_block, html_text, shaded_html, shaded_text
from .token_text import quoted, visible

_SHOWN_CONTEXTS = 10
_BARS = " ▁▂▃▄▅▆▇█"


class Context(NamedTuple):
    """One place where a feature fires, and the text around it.

    kind: "top", "quantile" or "negative" (a neighbour's context in which the feature is silent).
    rank: from 1, by act. quantile: of the act among the feature's acts, 0 to 1; None for other
    kinds. position: of the active token in its document. peak: its index in
    token_ids, tokens and acts. acts: the feature's act on each token.
    """

    kind: str
    rank: int
    quantile: float | None
    doc_id: int
    position: int
    act: float
    token: str
    peak: int
    text: str
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    acts: tuple[float, ...]


class TokenLift(NamedTuple):
    """A token that a feature fires on. lift: P(active | token) / P(active), smoothed.

    n_active: rows of the token on which the feature fires. n_total: rows of the token.
    """

    token_id: int
    token: str
    n_active: int
    n_total: int
    mean_act: float
    lift: float


class LogitEffect(NamedTuple):
    """A token and what one unit of the feature's act adds to its logit."""

    token_id: int
    token: str
    logit: float


class HistogramBin(NamedTuple):
    """n acts in lo <= act < hi; bins that hold none are left out."""

    lo: float
    hi: float
    n: int


class Coactivation(NamedTuple):
    """Another feature that is active on the same tokens. npmi: 0 by chance, 1 always together."""

    feature_id: int
    n_both: int
    npmi: float
    label: str | None


class Neighbor(NamedTuple):
    """Another feature of the same SAE and the cosine of the two directions."""

    feature_id: int
    cosine: float
    label: str | None


@dataclass(frozen=True)
class Feature:
    """One feature of one SAE. density: fraction of the indexed tokens on which it fires.

    mean_act (over those) and max_act are None if it never fired.
    """

    sae_id: int
    feature_id: int
    sae_name: str
    hookpoint: str
    label: str | None
    label_method: str | None
    density: float
    n_active: int
    mean_act: float | None
    max_act: float | None
    is_dead: bool
    top: tuple[Context, ...]
    quantiles: tuple[Context, ...]
    negatives: tuple[Context, ...]
    tokens: tuple[TokenLift, ...]
    tokens_before: tuple[TokenLift, ...]
    tokens_after: tuple[TokenLift, ...]
    promoted: tuple[LogitEffect, ...]
    suppressed: tuple[LogitEffect, ...]
    histogram: tuple[HistogramBin, ...]
    neighbors: tuple[Neighbor, ...]
    coactivations: tuple[Coactivation, ...]

    def __repr__(self) -> str:
        return f"Feature({self.feature_id}, {self.shown_label!r}, {self._statistics()})"

    @property
    def shown_label(self) -> str:
        """The label, safe to show; what to say where there is none."""
        return visible(self.label) if self.label else "never active in the indexed text"

    def _statistics(self) -> str:
        if self.is_dead:
            return "dead"
        return (
            f"density {self.density:.3%}, {self.n_active:,} activations, "
            f"mean {self.mean_act:.3g}, max {self.max_act:.3g}"
        )

    def _lines(self) -> list[tuple[str, str]]:
        """(name, text) of what is shown beside the contexts; the text is safe, but no HTML."""
        lines = [
            ("tokens", _lifts(self.tokens)),
            ("after", _lifts(self.tokens_before[:5])),
            ("before", _lifts(self.tokens_after[:5])),
            ("promotes", ", ".join(f"{quoted(t.token)} {t.logit:+.2f}" for t in self.promoted)),
            ("suppresses", ", ".join(f"{quoted(t.token)} {t.logit:+.2f}" for t in self.suppressed)),
            ("acts", sparkline(self.histogram)),
            ("near", "; ".join(_other_text(n, n.cosine) for n in self.neighbors[:5])),
            ("together", "; ".join(_other_text(c, c.npmi) for c in self.coactivations[:5])),
        ]
        return [(name, text) for name, text in lines if text]

    def _context_groups(self) -> list[tuple[str, tuple[Context, ...]]]:
        groups = [("strongest", self.top[:_SHOWN_CONTEXTS]), ("by quantile", self.quantiles)]
        return [(name, contexts) for name, contexts in groups if contexts]

    def _repr_html_(self) -> str:
        parts = [
            f"<b>feature {self.feature_id}</b> {html_text(self.shown_label)}",
            html_text(f"{self.sae_name} at {self.hookpoint}; {self._statistics()}"),
        ]
        parts += [f"<i>{name}</i> {html_text(text)}" for name, text in self._lines()]
        for name, contexts in self._context_groups():
            parts.append(f"<i>{name}</i>")
            for c in contexts:
                shaded = shaded_html(c.tokens, c.acts, peak=c.peak, highest=self.max_act)
                parts.append(f"{_strength(c)} {shaded}")
        return html_block(*parts)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text.assemble((f"feature {self.feature_id}", "bold"), f"  {self.shown_label}")
        yield Text(f"{visible(self.sae_name)} at {self.hookpoint}; {self._statistics()}", "dim")
        for name, text in self._lines():
            yield Text.assemble((f"{name:>11}  ", "italic"), text)
        for name, contexts in self._context_groups():
            yield Text(name, "italic")
            for c in contexts:
                shaded = shaded_text(c.tokens, c.acts, peak=c.peak, highest=self.max_act)
                yield Text(f"{_strength(c)}  ") + shaded


def features_of(
    sae: Mapping[str, Any], rows: Mapping[str, Rows], vocabulary: Sequence[str]
) -> dict[int, Feature]:
    """Features of one SAE, by id.

    sae: its row of `saes`. rows: what `Pages` read of them. vocabulary: each token's text.
    """
    grouped = {name: _by_feature(found) for name, found in rows.items()}
    return {
        feature_id: _feature(
            sae, {name: of[feature_id] for name, of in grouped.items()}, vocabulary
        )
        for feature_id in grouped["features"]
    }


def _feature(
    sae: Mapping[str, Any],
    rows: Mapping[str, Rows],
    vocabulary: Sequence[str],
) -> Feature:
    """rows: of each table, those of the feature."""
    names = Feature.__dataclass_fields__
    contexts = [_context(row, vocabulary) for row in rows["contexts"]]
    logits, nearby = rows["feature_logits"], rows["feature_nearby_tokens"]
    bins = (HistogramBin(row["lo"], row["hi"], row["n"]) for row in rows["feature_histogram"])
    return Feature(
        **{name: value for name, value in rows["features"][0].items() if name in names},
        sae_name=sae["name"],
        hookpoint=sae["hookpoint"],
        top=tuple(c for c in contexts if c.kind == "top"),
        quantiles=tuple(c for c in contexts if c.kind == "quantile"),
        negatives=tuple(c for c in contexts if c.kind == "negative"),
        tokens=_token_lifts(rows["feature_tokens"], vocabulary),
        tokens_before=_token_lifts((row for row in nearby if row["place"] == -1), vocabulary),
        tokens_after=_token_lifts((row for row in nearby if row["place"] == 1), vocabulary),
        promoted=_effects(logits, 1, vocabulary),
        suppressed=_effects(logits, -1, vocabulary),
        histogram=tuple(sorted(bins)),
        neighbors=tuple(
            Neighbor(row["neighbor_id"], row["cosine"], row["label"]) for row in rows["neighbors"]
        ),
        coactivations=tuple(
            Coactivation(row["other_id"], row["n_both"], row["npmi"], row["label"])
            for row in rows["coactivations"]
        ),
    )


def _by_feature(found: Rows) -> dict[int, Rows]:
    """Rows of each feature, by rank where they have one."""
    grouped = defaultdict[int, Rows](list)
    for row in sorted(found, key=lambda row: row.get("rank", 0)):
        grouped[row["feature_id"]].append(row)
    return grouped


def sparkline(histogram: Sequence[HistogramBin]) -> str:
    """The histogram as bars between its lowest and its highest bin: `0.016 ▁▅█▂ 0.13`."""
    if not histogram:
        return ""
    most = max(b.n for b in histogram)
    bars = []
    for i, b in enumerate(histogram):
        if i and b.lo > histogram[i - 1].hi:
            bars.append(_BARS[0])
        bars.append(_BARS[max(1, round(b.n / most * (len(_BARS) - 1)))])
    return f"{histogram[0].lo:.2g} {''.join(bars)} {histogram[-1].hi:.2g}"


def _context(row: dict[str, Any], vocabulary: Sequence[str]) -> Context:
    lists = {
        "token_ids": tuple(row["token_ids"]),
        "tokens": tuple(map(vocabulary.__getitem__, row["token_ids"])),
        "acts": tuple(row["acts"]),
    }
    return Context(**{name: row[name] for name in Context._fields if name in row} | lists)


def _token_lifts(
    rows: Iterable[dict[str, Any]], vocabulary: Sequence[str]
) -> tuple[TokenLift, ...]:
    shown = TokenLift._fields[2:]
    return tuple(
        TokenLift(row["token_id"], vocabulary[row["token_id"]], *(row[name] for name in shown))
        for row in rows
    )


def _effects(
    logits: Iterable[dict[str, Any]], sign: int, vocabulary: Sequence[str]
) -> tuple[LogitEffect, ...]:
    return tuple(
        LogitEffect(row["token_id"], vocabulary[row["token_id"]], row["logit"])
        for row in logits
        if row["sign"] == sign
    )


def _lifts(tokens: Sequence[TokenLift]) -> str:
    return ", ".join(f"{quoted(t.token)} {t.lift:.3g}x" for t in tokens)


def _other_text(other: Neighbor | Coactivation, how_near: float) -> str:
    label = f" {visible(other.label)}" if other.label else ""
    return f"{other.feature_id} ({how_near:.2f}){label}"


def _strength(context: Context) -> str:
    place = "" if context.quantile is None else f" q{context.quantile:.2f}"
    return f"{context.act:7.3g}{place}"
