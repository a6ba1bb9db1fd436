"""`saebase cache stats`: what it prints, what it draws, and what it refuses before any work."""

import dataclasses
import importlib.util
import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from activation_cache import ActivationCache, CacheStatistics, cache_statistics
from pipelines import figures
from pipelines.cache_tables import compact, rounding_line, statistics_tables
from pipelines.cli import console
from pipelines.figures import places_on_layers, statistics_figure
from tests.pipelines.conftest import Outcome, SmallRun, refused

Saebase = Callable[..., Outcome]
HOOKPOINT = "layers.1.resid_post"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def found(tiny_cache: ActivationCache) -> CacheStatistics:
    return cache_statistics(tiny_cache)


def with_hookpoints(found: CacheStatistics, names: list[str]) -> CacheStatistics:
    """The same figures under other names, with massive channels in all but the first."""
    h = found.hookpoints[0]
    channels = [SimpleNamespace(channel=i, share=0.4, mean=(-9.0) ** i) for i in range(1, 4)]
    massive = dataclasses.replace(h.massive, n_rows=5, share=0.1, at_first_place=0.8)
    massive = dataclasses.replace(massive, channels=tuple(channels))
    hookpoints = [
        dataclasses.replace(h, hookpoint=name, massive=massive if number else h.massive)
        for number, name in enumerate(names)
    ]
    disk = dataclasses.replace(
        found.disk, by_stream={"tokens": 10_000, **dict.fromkeys(names, 200_000)}
    )
    return dataclasses.replace(found, hookpoints=tuple(hookpoints), disk=disk)


# -- printed -------------------------------------------------------------------------------------


def test_it_prints_rows_norms_massive_rows_rounding_and_disk(
    saebase: Saebase, small_run: SmallRun
) -> None:
    cache = ActivationCache.open(small_run.acts)
    outcome = saebase("cache", "stats", small_run.acts)
    assert outcome.status == 0, outcome.err
    assert f"{cache.n_tokens:,} tokens of {cache.n_documents} documents" in outcome.out
    assert f"in {cache.manifest.n_shards} shards" in outcome.out
    assert "figures below are of all rows" in outcome.out
    assert "rounded by at most 2^-8" in outcome.out  # the model computes in float32
    for word in ("disk", "tokens", "99.9%", "16-31", "RMS norm", "mean row", HOOKPOINT):
        assert word in outcome.out, word
    assert "rows (100%)" in outcome.err
    assert "rows (100%)" not in outcome.out


def test_it_says_which_rows_it_read(saebase: Saebase, small_run: SmallRun) -> None:
    part = saebase("cache", "stats", small_run.acts, "--n-rows", 100).out
    assert "the first 100 rows (--n-rows 0 reads all)" in part
    assert "all rows" in saebase("cache", "stats", small_run.acts, "--n-rows", 0).out


def test_json_is_one_object_with_the_same_figures(saebase: Saebase, small_run: SmallRun) -> None:
    cache = ActivationCache.open(small_run.acts)
    outcome = saebase("cache", "stats", small_run.acts, "--format", "json")
    told = json.loads(outcome.out, parse_constant=pytest.fail)
    expected = cache_statistics(cache)
    assert told["n_tokens"] == cache.n_tokens
    assert told["disk"]["n_bytes"] == cache.n_bytes
    (h,) = told["hookpoints"]
    assert h["median_norm"] == expected.hookpoints[0].median_norm
    assert h["norm_quantiles"]["0.5"] == h["median_norm"]
    assert h["massive"]["at_first_place"] is None  # no row is massive
    assert [p["first_place"] for p in h["norms_by_place"]] == [0, 1, 2, 3, 4, 8, 16]


def test_flags_may_stand_in_a_file(saebase: Saebase, small_run: SmallRun, tmp_path: Path) -> None:
    settings = tmp_path / "stats.yaml"
    settings.write_text(f"acts: {small_run.acts}\nn_rows: 64\n")
    outcome = saebase("cache", "stats", "--config", settings)
    assert outcome.status == 0, outcome.err
    assert "the first 64 rows" in outcome.out


@pytest.mark.parametrize("n_hookpoints", [1, 3, 30])
@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_their_columns(found: CacheStatistics, width: int, n_hookpoints: int) -> None:
    names = [f"layers.{i}.resid_post" for i in range(n_hookpoints)]
    many = with_hookpoints(found, names)
    with console.capture() as capture:
        for table in statistics_tables(many, width):
            console.print(table, width=width)
    printed = capture.get()
    assert max(map(len, printed.splitlines())) <= width
    assert "…" not in printed
    for name in names[1:]:  # disk, norms, places (as line or column), massive twice, others
        assert len(re.findall(rf"{re.escape(name)}\b", printed)) >= 6
    assert "3: 40.0%, -729" in printed or n_hookpoints == 1


def test_numbers_are_short_and_true() -> None:
    values = (0.0, 0.01712, 1.714, 17.14, 171.4, 1709.4, 9999.6, 24_360, 99_960, 1.04e6, -2.35e4)
    assert [compact(value) for value in values] == [
        *("0", "0.0171", "1.71", "17.1", "171", "1,709", "10,000", "24.4k", "100k", "1M"),
        "-23.5k",
    ]
    assert compact(math.inf) == "inf"
    assert compact(math.nan) == "none"


def test_rounding_is_told_for_every_storage(found: CacheStatistics) -> None:
    def line(rounding: float | None, storage: str) -> str:
        return rounding_line(dataclasses.replace(found, rounding=rounding, storage_dtype=storage))

    assert line(0.0, "float32").endswith("storing rounded nothing")
    assert "2^-8 (0.39%)" in line(2**-8, "bfloat16")
    assert "65,504" in line(2**-11, "float16")
    assert "FVU" in line(None, "int8")


# -- drawn ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "begins"), [("s.png", PNG), ("s.svg", b"<?xml")])
def test_it_draws_png_and_svg(
    saebase: Saebase, small_run: SmallRun, tmp_path: Path, name: str, begins: bytes
) -> None:
    outcome = saebase("cache", "stats", small_run.acts, "--plot", tmp_path / name)
    assert outcome.status == 0, outcome.err
    drawn = (tmp_path / name).read_bytes()
    assert drawn.startswith(begins)
    assert len(drawn) > 20_000
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_drawing_leaves_json_alone(saebase: Saebase, small_run: SmallRun, tmp_path: Path) -> None:
    plot = tmp_path / "s.png"
    outcome = saebase("cache", "stats", small_run.acts, "--format", "json", "--plot", plot)
    json.loads(outcome.out)
    assert str(plot) in outcome.err
    assert plot.is_file()


NAMES = {
    "one": ["layers.3.resid_post"],
    "three": [f"layers.{i}.resid_post" for i in (2, 8, 15)],
    "thirty": [f"layers.{i}.resid_post" for i in range(30)],
    "two sites": ["embed"]
    + [f"layers.{i}.{site}" for site in ("mlp_out", "resid_post") for i in range(20)]
    + ["final_norm", "model.$x$.gate"],
}


@pytest.mark.parametrize("case", NAMES)
def test_panels_have_labels_and_nothing_overlaps(
    found: CacheStatistics, tiny_cache: ActivationCache, case: str
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    many = with_hookpoints(found, NAMES[case])
    figure = statistics_figure(many, tiny_cache.manifest.fingerprint)
    figure.set_dpi(60)
    FigureCanvasAgg(figure).draw()
    panels = figure.axes[:4]
    for axes in panels:
        assert axes.get_title()
        assert axes.get_xlabel() or axes.texts  # "no row is of massive norm"
        assert axes.get_ylabel() or axes.texts or axes.get_title().startswith("Disk")
        for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
            if all(tick.get_rotation() == 0 for tick in ticks):
                boxes = [tick.get_window_extent() for tick in ticks if tick.get_text()]
                assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes)), axes
    boxes = [axes.get_tightbbox() for axes in panels]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert panels[0].get_yscale() == "log"
    assert panels[1].get_xlabel() == ("L2 norm of a row" if len(NAMES[case]) < 7 else "layer")


def test_hookpoints_stand_on_the_axis_of_layers() -> None:
    names = ["embed", "layers.0.resid_pre", "layers.11.resid_pre", "transformer.h.3.mlp", "norm"]
    assert [tuple(place) for place in places_on_layers(names)] == [
        (-1, "embed"),
        (0, "resid_pre"),
        (11, "resid_pre"),
        (3, "transformer.h.mlp"),
        (12, "norm"),
    ]


# -- refused -------------------------------------------------------------------------------------


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a command that begins to read."""

    def read(*_: Any, **__: Any) -> None:
        pytest.fail("the cache was read")

    monkeypatch.setattr(ActivationCache, "chunks", read)


@pytest.mark.usefixtures("unread")
def test_a_plot_that_can_not_be_made_is_told_before_the_work(
    saebase: Saebase, small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = ("cache", "stats", small_run.acts, "--plot")
    refused(saebase(*stats, tmp_path / "s.pdf"), "s.pdf", ".png or .svg")
    refused(saebase(*stats, tmp_path / "none" / "s.png"), tmp_path / "none")
    (tmp_path / "folder.png").mkdir()
    refused(saebase(*stats, tmp_path / "folder.png"), "folder.png", "can't be written")
    monkeypatch.setattr(figures.os, "access", lambda *_: False)
    refused(saebase(*stats, tmp_path / "s.png"), "s.png", "can't be written")
    assert [file.name for file in tmp_path.iterdir()] == ["folder.png"]


@pytest.mark.usefixtures("unread")
def test_without_matplotlib_the_way_out_is_told(
    saebase: Saebase, small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    plot = tmp_path / "s.png"
    refused(
        saebase("cache", "stats", small_run.acts, "--plot", plot),
        "--plot needs matplotlib: pip install 'saebase[plots]'",
    )


@pytest.mark.usefixtures("unread")
def test_wrong_arguments_are_refused(saebase: Saebase, small_run: SmallRun, tmp_path: Path) -> None:
    refused(saebase("cache", "stats", tmp_path / "none"), tmp_path / "none", "does not exist")
    stats = ("cache", "stats", small_run.acts)
    refused(saebase(*stats, "--hookpoint", "layers.1.resid_pots"), "resid_pots", HOOKPOINT)
    refused(saebase(*stats, "--n-rows", -1), "--n-rows -1", "0 for all")
    refused(saebase(*stats, "--format", "csv"), "csv", "json")
    refused(saebase("cache", "stat"), "stat", "stats")
