"""saebase label: by hand, from a file, with a language model over real HTTP."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.feature_db.labelling.judge_server import MODEL, JudgeServer
from tests.pipelines.conftest import Outcome, SmallRun, refused

Saebase = Callable[..., Outcome]
KEY = "sk-very-secret-0123456789"


@pytest.fixture
def db(small_run: SmallRun, tmp_path: Path) -> Path:
    return Path(shutil.copy(small_run.db, tmp_path / "f.duckdb"))


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer() as running:
        yield running


@pytest.fixture
def by_model(db: Path, server: JudgeServer) -> list[object]:
    """A command that works: an active feature is asked about."""
    sql = "SELECT feature_id FROM features ORDER BY n_active DESC LIMIT 3"
    return [
        *("label", "--db", db, "--base-url", server.url, "--model", MODEL, "--features", sql),
        *("--n-shown", 6, "--n-scored", 6, "--price-in", 2, "--price-out", 8),
    ]


def labels(saebase: Saebase, db: Path, where: str) -> list[list[str]]:
    sql = f"SELECT feature_id, label, label_method FROM features WHERE {where} ORDER BY 1"
    lines = saebase("query", sql, "--db", db, "--format", "json").out.splitlines()
    return [list(json.loads(line).values()) for line in lines]


def test_a_person_labels_and_takes_it_back(saebase: Saebase, db: Path) -> None:
    before = labels(saebase, db, "feature_id = 7")
    given = saebase("label", 7, "plural subjects", "--db", db)
    assert given.status == 0, given.err
    assert "feature 7: plural subjects (human)" in given.out
    assert labels(saebase, db, "feature_id = 7") == [[7, "plural subjects", "human"]]
    assert "plural subjects" in saebase("show", 7, "--db", db).out
    removed = saebase("label", 7, "--remove", "--db", db)
    assert removed.status == 0, removed.err
    assert labels(saebase, db, "feature_id = 7") == before
    refused(saebase("label", 7, "--remove", "--db", db), "nothing to remove")


def test_a_file_is_imported_whole_or_not_at_all(saebase: Saebase, db: Path, tmp_path: Path) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_text('{"feature_id": 1, "label": "one"}\n{"feature_id": 960, "label": "x"}\n')
    refused(saebase("label", "--import", file, "--db", db), "line 2", "0 to 95")
    assert labels(saebase, db, "label_method = 'human'") == []
    file.write_text('{"feature_id": 1, "label": "one"}\n{"feature_id": 2, "label": "two"}\n')
    done = saebase("label", "--import", file, "--db", db, "--sae-id", 0)
    assert done.status == 0, done.err
    assert "2 labels" in done.out
    assert labels(saebase, db, "label_method = 'human'") == [
        [1, "one", "human"],
        [2, "two", "human"],
    ]


def test_a_language_model_labels_with_the_cost_told_before(
    saebase: Saebase, db: Path, server: JudgeServer, by_model: list[object]
) -> None:
    dry = saebase(*by_model, "--dry-run")
    assert dry.status == 0, dry.err
    assert "3 features with judge-1" in dry.out
    assert "at the prices given" in dry.out
    assert not server.seen.starts
    done = saebase(*by_model, "--temperature", "none")
    assert done.status == 0, done.err
    assert "3 features labelled in" in done.out
    assert all("temperature" not in body for body in server.seen.bodies)
    assert "cost 0.0" in done.out
    assert len(labels(saebase, db, "label_method = 'llm'")) == 3
    again = saebase(*by_model, "--temperature", "none")
    assert "3 labelled so already are passed over" in again.out
    assert f"Bearer {KEY}" not in server.seen.keys
    assert set(server.seen.keys) == {"Bearer none"}


def test_a_cap_is_told(saebase: Saebase, by_model: list[object]) -> None:
    capped = saebase(*by_model, "--max-cost", 0.0001)
    assert capped.status == 0, capped.err
    assert "the cap is used up" in capped.out


def test_openai_s_key_goes_to_no_other_address(
    saebase: Saebase, server: JudgeServer, by_model: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert saebase(*by_model).status == 0
    assert set(server.seen.keys) == {"Bearer none"}


def test_a_key_comes_from_the_variable_that_is_named_and_shows_nowhere(
    server: JudgeServer, by_model: list[object], tmp_path: Path
) -> None:
    """The whole process, with --debug: neither its output nor its files hold the key."""
    command = [sys.executable, "-m", "pipelines", *map(str, by_model), "--debug"]
    command += ["--api-key-env", "MY_KEY"]
    for right in (True, False):
        server.key = KEY if right else "another"
        command[-1] = "MY_KEY"
        more = [] if right else ["--seed", "1"]
        done = subprocess.run(
            [*command, *more],
            env={**os.environ, "MY_KEY": KEY, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )
        assert done.returncode == (0 if right else 2), done.stderr
        assert KEY not in done.stdout + done.stderr
        assert ("refuses the API key" in done.stderr) != right
    assert f"Bearer {KEY}" in server.seen.keys
    for file in tmp_path.iterdir():
        assert KEY.encode() not in file.read_bytes()


def test_mistakes_are_told_in_a_line(
    saebase: Saebase, db: Path, by_model: list[object], tmp_path: Path
) -> None:
    refused(saebase("label", "--db", db), "label 4021", "--import", "--base-url")
    refused(saebase("label", 3, "x", "--import", tmp_path / "f.jsonl", "--db", db), "--import")
    refused(saebase("label", 3, "--db", db), "--remove")
    refused(saebase("label", 3, "x", "--remove", "--db", db), "--remove")
    refused(saebase("label", 3, "x", "--dry-run", "--db", db), "--dry-run", "--base-url")
    refused(saebase("label", 960, "x", "--db", db), "0 to 95")
    refused(saebase("label", 3, " ", "--db", db), "empty")
    refused(saebase("label", 3, "x", "--db", tmp_path / "no.duckdb"), "does not exist")
    refused(saebase("label", "--base-url", "http://x/v1", "--db", db), "--model")

    def spoilt(flag: str, value: object) -> Outcome:
        at = by_model.index(flag)
        return saebase(*by_model[: at + 1], value, *by_model[at + 2 :])

    refused(spoilt("--base-url", "ftp://x"), "base_url", "http://localhost:8000/v1")
    refused(spoilt("--features", " "), "--features")
    refused(spoilt("--features", "SELECT nothing"), "nothing")
    refused(spoilt("--features", "3,960"), "no feature 960")
    refused(spoilt("--model", "judge-9"), "no model 'judge-9'")
    refused(saebase(*by_model, "--api-key-env", "NO_SUCH"), "NO_SUCH")
    refused(saebase(*by_model, "--limit", 0), "limit=0")
    refused(saebase(*by_model, "--concurrency", 0), "concurrency")
    refused(saebase(*by_model, "--max-cost", -1), "max-cost")
