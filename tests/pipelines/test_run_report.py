"""Reports of runs: what stands on the page, what the figures show, and what wandb is told."""

import html
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from pipelines.feature_statistics import feature_statistics, max_cosines
from pipelines.run_figures import draw_curves, draw_features, style, thinned
from pipelines.run_record import read_runs
from pipelines.trackers import WandbTracker
from sae import SAE, Metrics, Report
from tests.pipelines.conftest import Outcome, SmallRun

Saebase = Callable[..., Outcome]
matplotlib = pytest.importorskip("matplotlib")


def text_of(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<svg.*?</svg>", "", page, flags=re.S)))


def test_the_page_holds_settings_and_evaluation_and_needs_nothing_else(
    saebase: Saebase, small_run: SmallRun, tmp_path: Path
) -> None:
    outcome = saebase("report", small_run.sae, "--out", tmp_path / "r.html")
    assert outcome.status == 0, outcome.err
    page = (tmp_path / "r.html").read_text()
    words = text_of(page).split()
    report = Report.read(small_run.sae / "report.json")
    assert words[words.index("d_sae") + 1] == "96"
    assert f"{report.fvu:.4g}" in words
    assert "untrained.reconstruction.fvu" in words
    assert page.count("<svg") == 2
    links = re.findall(r'(?:src|href)="(?!#)([^"]*)"', page)
    assert not [link for link in links if not link.startswith("data:")]
    assert "<script" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:xlink:href="|url\()#([^")]+)', page))
    assert used <= set(ids)


def test_several_runs_share_the_axes(saebase: Saebase, small_run: SmallRun, tmp_path: Path) -> None:
    shutil.copytree(small_run.sae, tmp_path / "other")
    (tmp_path / "other" / "config.json").unlink()  # as if it were still training
    (tmp_path / "other" / "report.json").unlink()
    runs = read_runs([small_run.sae, tmp_path / "other"])
    assert [run.name for run in runs] == ["run", "other"]
    assert runs[0].features is not None
    assert runs[1].features is None
    assert runs[1].settings["d_sae"] == 96  # from its checkpoint
    figure = matplotlib.figure.Figure()
    with matplotlib.rc_context(style()):
        draw_curves(figure, runs)
    fvu = next(axes for axes in figure.axes if axes.get_title("left") == "FVU")
    assert [len(line.get_xdata()) for line in fvu.lines] == [4, 4]
    assert fvu.lines[0].get_ydata()[-1] == runs[0].metrics[-1].fvu
    for suffix, magic in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        file = tmp_path / f"both{suffix}"
        assert saebase("report", small_run.sae, tmp_path / "other", "--out", file).status == 0
        assert file.read_bytes().startswith(magic)


def test_histograms_count_every_feature(small_run: SmallRun) -> None:
    runs = read_runs([small_run.sae])
    figure = matplotlib.figure.Figure()
    draw_features(figure, runs)
    for axes in figure.axes:
        assert axes.patches[0].get_data().values.sum() == pytest.approx(100)
        assert axes.get_xlabel()


def test_statistics_are_those_of_the_weights(small_run: SmallRun) -> None:
    sae = SAE.load(small_run.sae)
    found = feature_statistics(sae)
    cosines = sae.W_dec @ sae.W_dec.T - 2 * torch.eye(sae.d_sae)
    assert torch.allclose(found.max_cosine, cosines.amax(1), atol=1e-5)
    assert len(found.log10_density) + found.n_never_active == sae.d_sae
    sampled = max_cosines(sae.W_dec.detach(), n_compared=10)
    assert torch.allclose(sampled[[0, -1]], found.max_cosine[[0, -1]], atol=1e-5)


def test_long_curves_are_thinned_to_means() -> None:
    lines = [
        Metrics(i, 10 * i, float(i % 2), *(0.0 for _ in range(8)), 0, 1.0, 1.0) for i in range(4000)
    ]
    x, y = thinned(lines, lambda m: m.loss)
    assert len(x) == 400
    assert np.all(y == 0.5)
    assert x[0] == 45


def test_wandb_gets_curves_histograms_and_the_evaluation(
    small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    logged: list[tuple[dict[str, Any], int | None]] = []

    class Run:
        """Takes what a run in wandb would."""

        summary: ClassVar[dict[str, Any]] = {}

        def log(self, values: dict[str, Any], step: int | None = None) -> None:
            logged.append((values, step))

        def finish(self) -> None: ...

    monkeypatch.setattr(wandb, "init", lambda **_: Run())
    tracker = WandbTracker("p", "n", {})
    lines = (small_run.sae / "metrics.jsonl").read_text().splitlines()
    tracker.metrics(Metrics(**json.loads(lines[0])))
    tracker.sae(SAE.load(small_run.sae))
    tracker.report(Report.read(small_run.sae / "report.json"))
    assert logged[0][1] == 10
    assert logged[0][0]["train/dead_fraction"] == 0
    names = {f"features/{n}" for n in ("log10_density", "max_act", "max_decoder_cosine")}
    histograms = {k: v for k, v in logged[1][0].items() if isinstance(v, wandb.Histogram)}
    assert names <= set(histograms)
    assert sum(histograms["features/max_decoder_cosine"].histogram) == 96
    assert Run.summary["eval/untrained.reconstruction.fvu"] > 0
