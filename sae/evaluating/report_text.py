"""A report -> lines for a terminal: a table of the SAE beside its baselines, then sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae.evaluating.report import (
        Baseline,
        CrossEntropy,
        Dictionary,
        ProbeScore,
        Probing,
        Reconstruction,
        Report,
    )


def report_lines(report: Report) -> list[str]:
    """See `Report.lines`."""
    rows = [["", "L0", "FVU", "FVU median", "FVU 95%", "cosine", "CE", "CE recovered", "KL"]]
    rows.append(_row_of_sae(report.reconstruction, report.cross_entropy))
    rows += [_row_of_baseline(baseline) for baseline in report.baselines]
    return [*table(rows), *_sentences(report)]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(map(str.rjust, row, widths)).rstrip() for row in rows]


def _row_of_sae(found: Reconstruction, ce: CrossEntropy | None) -> list[str]:
    if ce is None:
        return [*_reconstruction("SAE", found), "-", "-", "-"]
    cells = (_number(value, 3) for value in (ce.spliced, ce.recovered, ce.kl))
    return [*_reconstruction("SAE", found), *cells]


def _row_of_baseline(baseline: Baseline) -> list[str]:
    values = (baseline.spliced, baseline.recovered, baseline.kl)
    cells = (_number(value, 3) for value in values)
    return [*_reconstruction(baseline.name, baseline.reconstruction), *cells]


def _reconstruction(name: str, found: Reconstruction) -> list[str]:
    return [
        name,
        f"{found.l0:.1f}",
        f"{found.fvu:.4f}",
        f"{found.fvu_token_median:.4f}",
        _number(found.fvu_token_quantiles.get("95%"), 4),
        f"{found.cosine:.4f}",
    ]


def _sentences(report: Report) -> Iterator[str]:
    limit = "" if report.max_norm is None else f" (above {report.max_norm:,.0f})"
    yield (
        f"{report.n_rows:,} {report.split} rows of {report.hookpoint}; {report.n_massive:,} of "
        f"massive norm left out{limit}"
    )
    yield (
        f"{report.n_features:,} features: {report.n_dead:,} dead (active in no row), "
        f"{report.n_dense:,} dense (active in more than 10% of rows)"
    )
    if report.dictionary is not None:
        yield from _about_dictionary(report.dictionary)
    if ce := report.cross_entropy:
        yield (
            f"cross-entropy over {ce.n_tokens:,} tokens: clean {ce.clean:.3f}, spliced "
            f"{ce.spliced:.3f}, zero-ablated {ce.zero_ablated:.3f}, mean-ablated "
            f"{ce.mean_ablated:.3f}; recovered of zero-ablation {_number(ce.recovered, 3)}, of "
            f"mean-ablation {_number(ce.recovered_from_mean, 3)}; KL {ce.kl:.3f}"
        )
    if seeds := report.stability:
        yield (
            f"beside {seeds.n_others} of other seeds: {seeds.matched_fraction:.1%} of "
            f"{seeds.n_features:,} features have a one-to-one partner of cosine above 0.7; mean "
            f"cosine with partners {seeds.matched_cosine:.3f}, with the nearest "
            f"{seeds.max_cosine:.3f}"
        )
    if lost := report.absorption:
        yield (
            f"absorption of {lost.n_labels} broad labels: {lost.full:.1%} of rows in full (the "
            f"main feature is silent, another stands in), {lost.fraction:.1%} in the mean; "
            f"{lost.n_main_features:.1f} main features a label"
        )
    if report.probing is not None:
        yield from _about_probing(report.probing, report.baselines)


def _about_probing(probing: Probing, baselines: Sequence[Baseline]) -> Iterator[str]:
    yield (
        f"k-sparse probing, means over {probing.n_labels} labels (test rows, as many positive as "
        "negative)"
    )
    rows = [["", "accuracy", "F1", "AUROC"], _scores("all of x", probing.x)]
    rows += [_scores(f"features, k = {k}", score) for k, score in probing.features.items()]
    rows += [_scores(f"coordinates of x, k = {k}", s) for k, s in probing.coordinates.items()]
    for baseline in baselines:
        if baseline.probing is not None:
            found = baseline.probing.features.items()
            rows += [_scores(f"{baseline.name} features, k = {k}", score) for k, score in found]
    yield from table(rows)


def _scores(name: str, score: ProbeScore) -> list[str]:
    return [name, *(f"{value:.3f}" for value in (score.accuracy, score.f1, score.auroc))]


def _about_dictionary(found: Dictionary) -> Iterator[str]:
    if found.max_cosine_quantiles is None:
        return
    share = found.n_duplicates / max(found.n_compared, 1)
    yield (
        f"duplicates: {found.n_duplicates:,} of {found.n_compared:,} compared ({share:.1%}) have a "
        f"decoder cosine above {found.duplicate_cosine:g} with another; largest cosine: mean "
        f"{found.max_cosine_mean:.3f}, {_spread(found.max_cosine_quantiles)}"
    )
    histogram = found.density_histogram
    bins = zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False)
    shown = ", ".join(f"{low:g}..{high:g}: {count:,}" for low, high, count in bins if count)
    yield f"features by log10 of their density: {shown or 'none is active'}"


def _spread(quantiles: dict[str, float]) -> str:
    return ", ".join(f"{key} {value:.3f}" for key, value in quantiles.items())


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
