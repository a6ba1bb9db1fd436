"""Every example and every benchmark runs."""

import argparse
import contextlib
import importlib
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import s3fs
import torch

from activation_cache import ActivationCache
from tests.pipelines.conftest import SmallRun

ROOT = Path(__file__).parent.parent.parent


def call(script: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a script as `python script arguments` does."""
    path = ROOT / script
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    monkeypatch.syspath_prepend(str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.slow
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


@pytest.mark.parametrize("script", ["harvest", "train", "index", "queries", "storage"])
def test_benchmarks_print_one_json_object_a_line(
    script: str,
    small_run: SmallRun,
    tmp_path: Path,
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
        "queries": ("--acts", small_run.acts, "--d-sae", 64, "--n-requests", 3),
        "storage": (
            *("--folder", tmp_path, "--gb", 0.001, "--d-model", 32, "--passes", 2),
            *("--cold", "fadvise", "--only", "write", "in_order", "shuffled"),
        ),
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
    assert not list(tmp_path.iterdir())


def test_architectures_are_compared_at_equal_l0(
    small_run: SmallRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    call(
        "benchmarks/architectures.py",
        *("--acts", small_run.acts, "--hookpoint", "layers.1.resid_post", "--d-sae", 32, "--k", 4),
        *("--batch", 64, "--steps", 3, "--seeds", 0, 1, "--only", "TopK", "Gated"),
        *("--out", tmp_path, "--json"),
        monkeypatch=monkeypatch,
    )
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["what"] for row in rows] == ["TopK", "Gated"]
    assert "to" in rows[0]["FVU"]


@pytest.mark.slow
def test_known_truth_is_scored(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--n-features", 512, "--d-model", 24, "--d-sae", 64, "--k", 4, "--n-steps", 3)
    rows = ("--batch-size", 128, "--n-heldout-rows", 8192, "--architectures", "topk", "relu")
    call("benchmarks/synthetic.py", "--json", *sizes, *rows, monkeypatch=monkeypatch)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["what"] for line in lines] == ["topk", "relu", "untrained topk"]


def test_known_features_are_learnt_from_a_written_world(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ours alone: the peer has an environment of its own."""
    sizes = ["--n-features", 512, "--d-model", 32, "--d-sae", 64, "--k", 4, "--lrs", 3e-3]
    rows = ["--n-steps", 20, "--batch-size", 256, "--n-heldout-rows", 4096]
    ours = ["--worlds", "saebase", "--trainers", "saebase"]
    call("benchmarks/synthetic_peers.py", "--json", *ours, *sizes, *rows, monkeypatch=monkeypatch)
    (line,) = [json.loads(each) for each in capsys.readouterr().out.splitlines()]
    assert line["what"] == "saebase, batch_topk"
    assert 0 < line["matched_cosine"] < 1


def test_counting_is_told_share_by_share(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a process of its own: benchmarks/counting.py."""
    few = ("--n-tokens", 4096, "--d-sae", 256, "--k", 4, "--repeat", 1, "--json")
    call("benchmarks/index.py", "--synthetic", *few, monkeypatch=monkeypatch)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) > 5
    assert {line["benchmark"] for line in lines} == {"index, counting"}


@pytest.mark.filterwarnings("ignore:.*:ResourceWarning:(aiohttp|aiobotocore|asyncio|moto)")
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:(moto|botocore|aiobotocore|s3fs)")
def test_buckets_are_timed_beside_one_file(
    small_run: SmallRun,
    blocks: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("ENDPOINT_URL", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_REGION"):
        monkeypatch.setenv(f"AWS_{name}", "")  # so that what is set there is gone afterwards
    s3fs.S3FileSystem.clear_instance_cache()  # they know the servers of other tests
    few = ("--db", small_run.db, "--n-requests", 3, "--json")
    call("benchmarks/buckets.py", *few, monkeypatch=monkeypatch)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    of = {(row["place"], row["request"]): row for row in rows}
    assert of["S3", "a feature's page, first"]["reads"] > 7
    assert of["S3", "a feature's page, warm"]["reads"] == 0
    assert of["folder", "a feature's page, cold"]["reads"] == 0


def test_many_features_are_made_and_asked(
    small_run: SmallRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = ("--n-features", 1100, "--n-contexts", 3, "--n-requests", 2, "--memory", "500MB")
    places = ("--model", small_run.model, "--db", tmp_path / "scale.duckdb", "--json")
    call("benchmarks/scale.py", *few, *places, monkeypatch=monkeypatch)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["benchmark"] for line in lines} == {"scale", "queries"}


INDEX_FEW = ("--n-tokens", 1024, "--d-sae", 64, "--k", 4, "--n-dashboard", 16, "--repeat", 1)


def test_an_index_beside_peers_needs_their_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = ("--delphi", tmp_path / "python", "--dashboard", tmp_path / "python")
    with pytest.raises(SystemExit, match="make_env"):
        call("benchmarks/index_peers.py", *missing, *INDEX_FEW, monkeypatch=monkeypatch)


@pytest.mark.slow
def test_an_index_beside_one_peer_tells_which_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = ROOT / ".venv-peers/sae-dashboard/bin/python"
    if not python.exists():
        pytest.skip("benchmarks/peers/make_env.sh sae-dashboard wasn't run")
    peers = ("--delphi", tmp_path / "python", "--dashboard", python)
    call("benchmarks/index_peers.py", "--json", *peers, *INDEX_FEW, monkeypatch=monkeypatch)
    told = capsys.readouterr()
    assert f"{tmp_path / 'python'}: no such python, so delphi is left out" in told.err
    lines = [json.loads(line) for line in told.out.splitlines()]
    assert {line["what"].split()[0] for line in lines} == {"saebase", "sae-dashboard"}
    assert all(line["microseconds_per_token"] > 0 for line in lines)


@pytest.mark.parametrize("wrong", [None, "strongest", "density", "blocks", "acts", "tokens"])
def test_what_sae_dashboard_found_is_held_to_the_codes(
    wrong: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    peers = importlib.import_module("index_peers")
    peers.write_codes(tmp_path, argparse.Namespace(n_tokens=1024, d_sae=64, k=4))
    codes, features = np.load(tmp_path / "codes.npz"), np.array([3, 40])
    acts = np.stack([((codes["features"] == f) * codes["acts"]).sum(2) for f in features])
    at = [np.unravel_index(np.argsort(-one[:, 6:-5].ravel())[:20], (4, 245)) for one in acts]
    blocks, places = (np.stack([each[side] for each in at]) for side in (0, 1))
    found = {"strongest": acts.max((1, 2)), "density": (acts > 0).mean((1, 2))}
    found |= {"blocks": blocks, "places": places + 6, "tokens": codes["tokens"][blocks, places + 6]}
    found["acts"] = np.round(acts[[[0], [1]], blocks, places + 6], 4)
    if wrong:
        found[wrong][1] = found[wrong][1] * 0.9 + (wrong == "blocks")
    np.savez(tmp_path / "found.npz", **found)
    with pytest.raises(SystemExit, match="differs") if wrong else contextlib.nullcontext():
        peers.held_to_codes("it", peers.of_dashboard(tmp_path, features, 64))


def test_a_gpu_step_needs_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: benchmarks/gpu.sh measures on it")
    with pytest.raises(SystemExit):
        call("benchmarks/gpu_step.py", monkeypatch=monkeypatch)
    assert "no CUDA device" in capsys.readouterr().err


def test_peak_memory_is_told_of_writing_and_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for task in ("write", "shuffled", "in_order"):
        options = ("--rows", 4_096, "--d-model", 32, "--seconds", 0)
        call(
            "benchmarks/peak_memory.py", tmp_path / "acts", task, *options, monkeypatch=monkeypatch
        )
        told = json.loads(capsys.readouterr().out)
        assert told["rows"] >= 4_096
        assert told["beyond_it_gb"] >= 0


def test_made_cache_verifies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    made = importlib.import_module("made_cache")
    made.write_cache(tmp_path, made.random_passes(2, 32), 3 * made.PASS_ROWS, shard_bytes=1 << 18)
    cache = ActivationCache.open(tmp_path)
    assert cache.verify() == cache.n_bytes
    rows = torch.cat([chunk.acts for chunk in cache.chunks(made.HOOKPOINT)])
    assert torch.equal(rows[: made.PASS_ROWS], rows[2 * made.PASS_ROWS :])
    assert cache.n_rows(made.HOOKPOINT, split="all") == 3 * made.PASS_ROWS


def test_every_example_and_benchmark_is_called_here() -> None:
    text = Path(__file__).read_text()
    for script in (ROOT / "examples").glob("*.py"):
        assert script.name in text
    for script in (ROOT / "benchmarks").glob("*.py"):
        if "__main__" in script.read_text():
            assert script.stem in text
