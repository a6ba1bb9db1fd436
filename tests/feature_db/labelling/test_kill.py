"""A run that is killed and called again: nothing finished is asked twice, the end is the same."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from feature_db import Endpoint, FeatureDB, LabelConfig, label_features
from feature_db.errors import DatabaseBusyError

from .conftest import Planted
from .judge_server import MODEL, JudgeServer
from .test_labelling import said

# One kill of a labeller runs with every test: tests/activation_cache/test_fault_campaign.py.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


def start(path: Path, url: str, config: LabelConfig) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipelines", "label", "--db", str(path), "--base-url", url]
    command += ["--model", MODEL, "--concurrency", "4", "--n-shown", str(config.n_shown)]
    command += ["--n-scored", str(config.n_scored)]
    command += ["--contexts-per-request", str(config.contexts_per_request)]
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def n_finished(path: Path) -> int:
    try:
        with FeatureDB.open(path) as db:
            return len(db.sql("SELECT 1 FROM explanations WHERE method = 'llm'"))
    except DatabaseBusyError:
        return 0


def wait_for(path: Path, n: int, process: subprocess.Popen[str]) -> None:
    while n_finished(path) < n:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_run_goes_on_and_ends_as_an_uninterrupted_one(
    planted: Planted,
    server: JudgeServer,
    endpoint: Endpoint,
    config: LabelConfig,
    tmp_path: Path,
    seed: int,
) -> None:
    whole = tmp_path / "whole.duckdb"
    whole.write_bytes(planted.path.read_bytes())
    label_features(whole, endpoint, config)
    server.seen.prompts.clear()
    server.delay_s = 0.1
    process = start(planted.path, server.url, config)
    wait_for(planted.path, 4, process)
    time.sleep(random.Random(seed).random() * 0.3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = {row[0] for row in said(planted.path)}
    assert 4 <= len(kept) < 20
    server.delay_s = 0.0
    assert label_features(planted.path, endpoint, config).n_labelled == 20 - len(kept)
    explained = server.seen.explained()
    assert {planted.words[i]: explained[planted.words[i]] for i in kept} == {
        planted.words[i]: 1 for i in kept
    }
    # Twice are asked about those in flight, one for each worker, and what waited to be written.
    assert sum(n - 1 for n in explained.values()) <= 2 * 4
    assert set(explained.values()) <= {1, 2}
    assert said(planted.path) == said(whole)


def test_a_polite_stop_ends_with_130_and_the_same_command_goes_on(
    planted: Planted, server: JudgeServer, endpoint: Endpoint, config: LabelConfig
) -> None:
    server.delay_s = 0.1
    process = start(planted.path, server.url, config)
    wait_for(planted.path, 3, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == "saebase: interrupted; the same command goes on from here\n"
    kept = len(said(planted.path))
    assert 3 <= kept < 20
    assert sum(server.seen.explained().values()) == kept  # those begun were finished
    server.delay_s = 0.0
    process = start(planted.path, server.url, config)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert f"{20 - kept} features labelled" in out
    assert set(server.seen.explained().values()) == {1}


def test_a_second_signal_ends_it_at_once_and_leaves_a_usable_database(
    planted: Planted, server: JudgeServer, config: LabelConfig
) -> None:
    process = start(planted.path, server.url, config)
    wait_for(planted.path, 2, process)
    server.delay_s = 20
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert len(said(planted.path)) >= 2
