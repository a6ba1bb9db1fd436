"""Labelling by a language model: planted features, real HTTP, scores, resuming, caps."""

import asyncio
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import duckdb
import pytest

from feature_db import (
    DatabaseBusyError,
    Endpoint,
    EndpointError,
    FeatureDB,
    LabelConfig,
    LabelError,
    LabelProgress,
    OpenError,
    estimate_labels,
    label_features,
)
from feature_db.labelling import store

from ..write_old_database import unpacked
from .conftest import Planted
from .judge_server import Fault, JudgeServer, coin, passages


def said(path: Path) -> list[tuple[Any, ...]]:
    """All that a run decides of every explanation."""
    with FeatureDB.open(path) as db:
        return db.sql(
            "SELECT feature_id, model, text, detection_score, fuzzing_score, n_detection, "
            "n_fuzzing, parts FROM explanations WHERE method = 'llm' ORDER BY ALL"
        ).fetchall()


def test_planted_features_are_found_and_score_one(
    planted: Planted, server: JudgeServer, endpoint: Endpoint, config: LabelConfig
) -> None:
    done = label_features(planted.path, endpoint, config)
    assert (done.ended, done.n_labelled, done.n_failed) == ("done", 20, 0)
    rows = said(planted.path)
    assert [row[2] for row in rows] == [f'the word "{word}"' for word in planted.words]
    assert {(row[3], row[4]) for row in rows} == {(1.0, 1.0)}
    assert {(row[5], row[6]) for row in rows} == {(16, 16)}
    parts = json.loads(rows[0][7])
    assert parts["detection"]["neighbor"]["n"] == 4
    assert parts["detection"]["random"]["n"] == 4
    assert parts["detection"]["top"]["n_right"] >= 1
    assert sum(part["n"] for part in parts["fuzzing"].values()) == 16
    assert done.n_requests == len(server.seen.starts) == 20 * (1 + 2 + 2)
    with FeatureDB.open(planted.path) as db:
        feature = db.feature(3)
        assert (feature.label, feature.label_method) == ('the word "copper"', "llm")
        kept = db.explanations(3).fetchall()
        assert [row[0] for row in kept] == ["llm", "tokens"]
        dead = db.feature(20)
        assert (dead.label, dead.label_method) == (None, None)


def test_a_judge_that_guesses_scores_about_a_half(
    planted: Planted, server: JudgeServer, endpoint: Endpoint, config: LabelConfig
) -> None:
    server.judge = coin
    label_features(planted.path, endpoint, config)
    rows = said(planted.path)
    for column in (3, 4):  # 20 features of 16 judgements each: a standard deviation of 0.028
        mean = sum(row[column] for row in rows) / len(rows)
        assert mean == pytest.approx(0.5, abs=0.1)


def test_a_wrong_explanation_scores_a_half(
    planted: Planted, server: JudgeServer, endpoint: Endpoint, config: LabelConfig
) -> None:
    server.explain = lambda _: 'the word "nowhere"'
    label_features(planted.path, endpoint, config, features=[0, 1])
    assert {row[3:5] for row in said(planted.path)} == {(0.5, 0.5)}


def test_verified_silent_contexts_come_first(
    planted: Planted, server: JudgeServer, endpoint: Endpoint, config: LabelConfig
) -> None:
    with duckdb.connect(str(planted.path)) as connection:
        connection.execute(
            "INSERT INTO contexts SELECT * REPLACE (0 AS feature_id, 'negative' AS kind, "
            "list_transform(acts, lambda x: 0::FLOAT) AS acts) FROM contexts "
            "WHERE feature_id = 5 AND kind = 'top' AND rank <= 3"
        )
    label_features(planted.path, endpoint, config, features=[0])
    ((*_, parts),) = said(planted.path)
    found = {name: part["n"] for name, part in json.loads(parts)["detection"].items()}
    assert (found["negative"], found["neighbor"], found["random"]) == (3, 1, 4)


def test_a_second_run_asks_nothing_and_another_recipe_adds_explanations(
    planted: Planted, server: JudgeServer, endpoint: Endpoint, config: LabelConfig
) -> None:
    label_features(planted.path, endpoint, config, features=[0, 1, 2])
    n_asked = len(server.seen.starts)
    again = label_features(planted.path, endpoint, config, features=[2, 1, 0])
    assert (again.n_labelled, again.n_requests, len(server.seen.starts)) == (0, 0, n_asked)
    other = config.model_copy(update={"seed": 1})
    assert label_features(planted.path, endpoint, other, features=[0]).n_labelled == 1
    with FeatureDB.open(planted.path) as db:
        assert [row[0] for row in db.explanations(0)] == ["llm", "llm", "tokens"]


def test_features_are_chosen_by_ids_sql_and_limit(
    planted: Planted, endpoint: Endpoint, config: LabelConfig
) -> None:
    def labelled(**how: Any) -> list[int]:
        before = {row[0] for row in said(planted.path)}
        label_features(planted.path, endpoint, config, **how)
        return sorted({row[0] for row in said(planted.path)} - before)

    assert labelled(features=[7, 3, 7, 20]) == [3, 7]
    sql = "SELECT feature_id, sae_id FROM features WHERE feature_id % 5 = 0"
    assert labelled(features=sql, limit=2) == [0, 5]
    assert labelled(features=sql, limit=9) == [10, 15]
    assert labelled(limit=1, sae_id=0) == [1]
    for features, told in (
        ([99], "no feature 99"),
        ("SELECT 1 AS x", "gives x: expected a column feature_id"),
    ):
        with pytest.raises(LabelError, match=told):
            label_features(planted.path, endpoint, config, features=features)


def test_the_same_seed_asks_the_same_questions(
    planted: Planted, server: JudgeServer, endpoint: Endpoint, config: LabelConfig, tmp_path: Path
) -> None:
    whole = planted.path.read_bytes()
    prompts = []
    for seed in (0, 0, 1):
        planted.path.write_bytes(whole)
        server.seen.prompts.clear()
        asked = config.model_copy(update={"seed": seed})
        label_features(planted.path, endpoint, asked, features=[0, 1])
        prompts.append(sorted(server.seen.prompts))
    assert prompts[0] == prompts[1] != prompts[2]


def test_contexts_shown_are_never_judged(
    planted: Planted, server: JudgeServer, endpoint: Endpoint, config: LabelConfig
) -> None:
    label_features(planted.path, endpoint, config, features=[0])
    explain, *judge = [passages(prompt) for prompt in server.seen.prompts]
    bare = {each.replace("<<", "").replace(">>", "") for each in explain}
    judged = [each.replace("<<", "").replace(">>", "") for some in judge for each in some]
    assert len(bare) == 8
    assert not bare & set(judged)


def test_scores_can_be_left_out(
    planted: Planted, server: JudgeServer, endpoint: Endpoint, config: LabelConfig
) -> None:
    without = config.model_copy(update={"fuzzing": False})
    label_features(planted.path, endpoint, without, features=[0])
    ((_, _, _, detection, fuzzing, _, n_fuzzing, _),) = said(planted.path)
    assert (detection, fuzzing, n_fuzzing) == (1.0, None, 0)
    assert len(server.seen.starts) == 3


def test_the_best_scored_explanation_is_shown(
    planted: Planted, server: JudgeServer, endpoint: Endpoint, config: LabelConfig
) -> None:
    label_features(planted.path, endpoint, config, features=[0])
    server.explain = lambda _: 'the word "nowhere"'
    label_features(planted.path, endpoint, config.model_copy(update={"seed": 5}), features=[0])
    assert len(said(planted.path)) == 2
    with FeatureDB.open(planted.path) as db:
        assert db.feature(0).label == 'the word "treaty"'


def test_a_human_label_is_never_overwritten_and_removing_it_shows_the_best(
    planted: Planted, endpoint: Endpoint, config: LabelConfig
) -> None:
    with FeatureDB.open(planted.path, read_only=False) as db:
        offline = [db.feature(i).label for i in (0, 1)]
        db.label(0, "mine")
        db.label(1, "mine too")
    label_features(planted.path, endpoint, config, features=[0])
    with FeatureDB.open(planted.path, read_only=False) as db:
        assert (db.feature(0).label, db.feature(0).label_method) == ("mine", "human")
        db.remove_label(0)
        db.remove_label(1)
        assert (db.feature(0).label, db.feature(0).label_method) == ('the word "treaty"', "llm")
        assert (db.feature(1).label, db.feature(1).label_method) == (offline[1], "tokens")
        texts = [row[2] for row in db.explanations(0)]
        assert texts == ['the word "treaty"', offline[0]]


def test_the_estimate_is_near_what_is_sent(
    planted: Planted, server: JudgeServer, endpoint: Endpoint, config: LabelConfig
) -> None:
    priced = endpoint.model_copy(update={"price_in": 2.0, "price_out": 8.0})
    told = estimate_labels(planted.path, priced, config)
    assert (told.n_features, told.n_done, told.n_empty) == (20, 0, 1)
    assert not server.seen.starts
    done = label_features(planted.path, priced, config)
    assert told.n_requests == done.n_requests
    assert told.prompt_tokens == pytest.approx(done.prompt_tokens, rel=0.3)
    assert done.cost == pytest.approx((2 * done.prompt_tokens + 8 * done.answer_tokens) / 1e6)
    with FeatureDB.open(planted.path) as db:
        ((tokens, answers, cost),) = db.sql(
            "SELECT sum(prompt_tokens), sum(answer_tokens), sum(cost) FROM explanations"
        )
    assert (tokens, answers) == (done.prompt_tokens, done.answer_tokens)
    assert cost == pytest.approx(done.cost)
    again = estimate_labels(planted.path, priced, config)
    assert (again.n_features, again.n_done, again.n_requests, again.cost) == (0, 20, 0, 0.0)


@pytest.mark.slow
def test_the_cap_ends_the_run_before_it_is_exceeded(
    planted: Planted, server: JudgeServer, endpoint: Endpoint, config: LabelConfig
) -> None:
    priced = endpoint.model_copy(update={"price_in": 2.0, "price_out": 8.0, "concurrency": 1})
    whole = estimate_labels(planted.path, priced, config).cost
    assert whole is not None
    capped = config.model_copy(update={"max_cost": whole / 2})
    done = label_features(planted.path, priced, capped)
    assert done.ended == "cap"
    assert 5 <= done.n_labelled <= 16
    assert done.cost is not None
    assert done.cost <= whole / 2
    assert len(said(planted.path)) == done.n_labelled
    n_asked = len(server.seen.starts)
    few = config.model_copy(update={"max_tokens_total": 10})
    assert label_features(planted.path, priced, few).ended == "cap"
    assert len(server.seen.starts) == n_asked
    assert label_features(planted.path, priced, config).n_labelled == 20 - done.n_labelled
    with pytest.raises(LabelError, match="needs prices"):
        label_features(planted.path, endpoint, capped)


def test_the_cap_holds_where_the_estimate_was_far_too_low(
    planted: Planted, server: JudgeServer, endpoint: Endpoint, config: LabelConfig
) -> None:
    usage = {"prompt_tokens": 10_000, "completion_tokens": 5_000, "total_tokens": 15_000}
    answer = {"choices": [{"message": {"role": "assistant", "content": "hm"}}], "usage": usage}
    server.fault = lambda _: Fault(body=json.dumps(answer))
    capped = config.model_copy(update={"max_tokens_total": 40_000})
    done = label_features(planted.path, endpoint.model_copy(update={"concurrency": 1}), capped)
    assert done.ended == "cap"
    assert len(server.seen.starts) == 3


def test_progress_is_told_and_a_stop_finishes_what_was_begun(
    planted: Planted, server: JudgeServer, endpoint: Endpoint, config: LabelConfig
) -> None:
    told = list[LabelProgress]()
    done = label_features(
        planted.path,
        endpoint,
        config,
        on_progress=told.append,
        should_stop=lambda: len(told) >= 5,
    )
    assert done.ended == "stopped"
    assert 5 <= done.n_labelled == len(said(planted.path)) <= 5 + endpoint.concurrency
    assert sum(server.seen.explained().values()) == done.n_labelled
    assert told[-1].n_total == 20
    assert told[-1].n_tokens == done.prompt_tokens + done.answer_tokens
    assert label_features(planted.path, endpoint, config).n_labelled == 20 - done.n_labelled


def test_it_runs_where_a_loop_is_running_already(
    planted: Planted, endpoint: Endpoint, config: LabelConfig
) -> None:
    async def cell() -> int:
        return label_features(planted.path, endpoint, config, features=[0]).n_labelled

    assert asyncio.run(cell()) == 1


def test_a_missing_client_is_told_in_a_line(
    planted: Planted, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(LabelError, match=r"pip install 'saebase\[label\]'"):
        label_features(planted.path, endpoint)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1", "", "http://me:secret@x/v1"])
def test_an_address_that_is_none_or_holds_a_password_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="base_url") as caught:
        Endpoint(base_url=url, model="m")
    if "secret" in url:
        assert "hold" in str(caught.value)


def test_an_endpoint_that_is_not_there_is_an_error_and_nothing_is_written(
    planted: Planted, server: JudgeServer, config: LabelConfig
) -> None:
    nowhere = Endpoint(base_url="http://127.0.0.1:9/v1", model="m", max_retries=1)
    with pytest.raises(EndpointError, match=r"8 features in a row.*127\.0\.0\.1:9.*no connection"):
        label_features(planted.path, nowhere, config)
    assert said(planted.path) == []


def test_a_database_that_is_open_in_this_process_is_refused_at_once(
    planted: Planted, endpoint: Endpoint, config: LabelConfig
) -> None:
    with (
        FeatureDB.open(planted.path),
        pytest.raises(OpenError, match="open in this process in another way: close"),
    ):
        label_features(planted.path, endpoint, config)


def test_a_database_that_stays_open_elsewhere_is_waited_for_and_then_told(
    planted: Planted, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_SAY_AFTER_S", 0.2)
    code = "import sys, duckdb; c = duckdb.connect(sys.argv[1], read_only=True); print('open')\n"
    code += "sys.stdout.flush(); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(planted.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "open\n"
    with pytest.raises(DatabaseBusyError, match=f"PID {holder.pid}"):
        store.DatabaseFile(planted.path, wait_s=0.5).write(lambda db: len(db.saes()))
    assert caplog.records[0].message.startswith(f"waiting: {planted.path} is open")
    threading.Timer(0.3, holder.communicate).start()
    assert store.DatabaseFile(planted.path, wait_s=30).write(lambda db: len(db.saes())) == 1


def test_an_older_schema_is_brought_up_to_date_first(
    endpoint: Endpoint, config: LabelConfig, tmp_path: Path
) -> None:
    old = unpacked(2, tmp_path / "old.duckdb")
    assert label_features(old, endpoint, config, features=[0], sae_id=0).n_labelled == 1
    with FeatureDB.open(old) as db:
        assert db.feature(0, sae_id=0).label_method == "llm"
