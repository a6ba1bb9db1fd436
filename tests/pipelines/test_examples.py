"""Every example and every benchmark runs."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from tests.pipelines.conftest import SmallRun

ROOT = Path(__file__).parent.parent.parent


def call(script: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a script as `python script arguments` does."""
    path = ROOT / script
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    monkeypatch.syspath_prepend(str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


def test_planted_truth_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call("examples/planted_truth.py", monkeypatch=monkeypatch)
    assert float(capsys.readouterr().out.split("%")[0]) >= 95


def test_steer_by_word(
    small_run: SmallRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ("--run", small_run.sae, "--db", small_run.db, "--prompt", "The river")
    call("examples/steer_by_word.py", "a", *places, monkeypatch=monkeypatch)
    assert "feature " in capsys.readouterr().out


@pytest.mark.parametrize("script", ["harvest", "train", "index"])
def test_benchmarks_print_one_json_object_a_line(
    script: str,
    small_run: SmallRun,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments: dict[str, tuple[object, ...]] = {
        "harvest": (
            *("--model", small_run.model, "--dataset", small_run.text, "--dtypes", "float32"),
            *("--layer", 1, "--tokens", 512, "--ctx-len", 32, "--hookpoints", 2),
        ),
        "train": ("--d-model", 32, "--d-sae", 64, "--k", 4, "--batch", 128),
        "index": ("--acts", small_run.acts, "--sae", small_run.sae),
    }
    call(
        f"benchmarks/{script}.py",
        *("--json", "--repeat", 1, *arguments[script]),
        monkeypatch=monkeypatch,
    )
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) >= 2
    for line in lines:
        assert line["benchmark"] == script
        assert line["machine"]["cores"] >= 1


def test_every_example_and_benchmark_is_called_here() -> None:
    text = Path(__file__).read_text()
    for script in (ROOT / "examples").glob("*.py"):
        assert script.name in text
    for script in (ROOT / "benchmarks").glob("*.py"):
        assert script.stem in text or script.stem == "machine"
