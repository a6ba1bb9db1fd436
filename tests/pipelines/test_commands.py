"""Every verb of the command line, as a user calls it, on a tiny real model."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from feature_db import FeatureDB
from pipelines.cli import app, run
from pipelines.demo import CLEAR_FEATURES, QUERIES
from tests.pipelines.conftest import Outcome, SmallRun, config_text

Saebase = Callable[..., Outcome]
VERBS = [
    "active",
    "cache stats",
    "demo",
    "doctor",
    "embed",
    "evaluate",
    "export",
    "finetune",
    "harvest",
    "index",
    "label",
    "plan",
    "query",
    "report",
    "run",
    "search",
    "show",
    "steer",
    "train",
    "verify",
]


def modification_times(folder: Path) -> dict[Path, int]:
    return {f: f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()}


def test_the_list_of_verbs_is_complete(saebase: Saebase) -> None:
    saebase("--help")
    found = []
    for name in (name for name in app if not name.startswith("-")):
        inner = [f"{name} {i}" for i in app[name] if not i.startswith("-")]
        found += inner or [name]
    assert sorted(found) == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_describes_itself_and_every_flag(saebase: Saebase, verb: str) -> None:
    outcome, command = saebase(*verb.split(), "--help"), app
    for word in verb.split():
        command = command[word]
    assert outcome.status == 0
    assert f"Usage: saebase {verb}" in outcome.out
    for argument in command.assemble_argument_collection(parse_docstring=True):
        if argument.show and not argument.children:
            assert argument.parameter.help, f"{verb} {argument.name} says nothing of itself"


def test_a_run_leaves_what_it_promises(small_run: SmallRun) -> None:
    assert (small_run.acts / "manifest.json").is_file()
    assert (small_run.sae / "sae.safetensors").is_file()
    report = json.loads((small_run.sae / "report.json").read_text())
    assert {b["name"] for b in report["baselines"]} == {"untrained", "pca"}
    assert 0 < report["reconstruction"]["fvu"] < 1
    assert report["cross_entropy"]["n_tokens"] > 0
    lines = (small_run.sae / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20, 30, 40]
    assert small_run.db.is_file()


def test_a_second_run_makes_nothing_again(saebase: Saebase, small_run: SmallRun) -> None:
    made = modification_times(small_run.acts.parent)
    assert saebase("run", small_run.config).status == 0
    after = modification_times(small_run.acts.parent)
    assert {f: t for f, t in after.items() if f.name != ".lock"} == {
        f: t for f, t in made.items() if f.name != ".lock"
    }


def test_the_stages_take_a_cache_at_a_url(
    saebase: Saebase, small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEBASE_BLOCKS", str(tmp_path / "blocks"))
    acts, sae = "memory://command/line/acts", tmp_path / "sae"
    harvested = saebase(
        *("harvest", "--model", small_run.model, "--dataset", small_run.text, "--out", acts),
        *("--hookpoints", "layers.1.resid_post", "--n-tokens", 1536, "--ctx-len", 32),
    )
    assert harvested.status == 0, harvested.err
    assert f"saebase train --acts {acts} --d-sae" in harvested.out
    assert f"{acts}: " in saebase("verify", acts).out
    assert saebase("cache", "stats", acts).out.startswith(f"{acts}: ")
    trained = saebase(
        *("train", "--acts", acts, "--out", sae, "--d-sae", 96, "--k", 6, "--n-steps", 40),
        *("--batch-size", 128, "--lr", 0.003),
    )
    assert trained.status == 0, trained.err
    evaluated = saebase("evaluate", sae, "--acts", acts, "--no-with-model")
    assert evaluated.status == 0, evaluated.err
    assert list((tmp_path / "blocks").glob("*/*-*"))
    config = tmp_path / "run.yaml"
    text = config_text(small_run.model, small_run.text, tmp_path / "run")
    config.write_text(text.replace("harvest:", "acts: memory://command/line/run\nharvest:"))
    assert saebase("run", config).status == 0
    assert not (tmp_path / "run" / "acts").exists()


def test_the_stages_one_by_one_make_the_same_as_a_run(
    saebase: Saebase, small_run: SmallRun, tmp_path: Path
) -> None:
    acts, sae, db = tmp_path / "acts", tmp_path / "sae", tmp_path / "f.duckdb"
    hookpoint = "layers.1.resid_post"
    harvested = saebase(
        *("harvest", "--model", small_run.model, "--dataset", small_run.text, "--out", acts),
        *("--hookpoints", hookpoint, "--n-tokens", 1536, "--ctx-len", 32, "--shard-bytes", 20000),
    )
    assert harvested.status == 0, harvested.err
    assert f"saebase train --acts {acts}" in harvested.out
    assert saebase("verify", acts).status == 0
    trained = saebase(
        *("train", "--acts", acts, "--out", sae, "--d-sae", 96, "--k", 6, "--n-steps", 40),
        *("--batch-size", 128, "--lr", 0.003, "--log-every-steps", 10),
        *("--checkpoint-every-steps", 20),
    )
    assert trained.status == 0, trained.err
    settings = ("--n-lm-tokens", 200, "--batch-size", 64)
    evaluated = saebase("evaluate", sae, "--acts", acts, *settings)
    assert evaluated.status == 0, evaluated.err
    assert "untrained" in evaluated.out
    assert "pca" in evaluated.out
    assert saebase("index", sae, "--acts", acts, "--out", db).status == 0
    for name in ("sae.safetensors", "metrics.jsonl"):
        if name == "sae.safetensors":
            assert (sae / name).read_bytes() == (small_run.sae / name).read_bytes()
    ours, theirs = (
        saebase("query", "SELECT feature_id, n_active, label FROM features", "--db", each).out
        for each in (db, small_run.db)
    )
    assert ours == theirs


def test_an_untrained_model_makes_a_cache_that_says_so(
    saebase: Saebase, small_run: SmallRun, tmp_path: Path
) -> None:
    command = (
        *("harvest", "--model", small_run.model, "--dataset", small_run.text),
        *("--out", tmp_path / "acts", "--hookpoints", "layers.1.resid_post"),
        *("--n-tokens", 1536, "--ctx-len", 32),
    )
    made = saebase(*command, "--random-weights", 1)
    assert made.status == 0, made.err
    manifest = json.loads((tmp_path / "acts" / "manifest.json").read_text())
    assert manifest["fingerprint"]["model"] == f"{small_run.model}#random-weights=1"
    refused = saebase(*command)
    assert refused.status == 2
    assert "random-weights" in refused.err
    evaluated = saebase("evaluate", small_run.sae, "--acts", tmp_path / "acts", "--no-with-model")
    assert evaluated.status == 2
    assert "random-weights" in evaluated.err


def test_trained_baselines_stand_in_the_report(
    saebase: Saebase, small_run: SmallRun, tmp_path: Path
) -> None:
    how = ("--d-sae", 64, "--k", 4, "--n-steps", 4, "--batch-size", 128)
    for name, flags in (("sae", ()), ("frozen", ("--freeze-decoder",))):
        train = ("train", "--acts", small_run.acts, "--out", tmp_path / name)
        assert saebase(*train, *how, *flags).status == 0
    evaluate = ("evaluate", tmp_path / "sae", "--acts", small_run.acts, "--no-with-model")
    frozen = f"frozen_decoder={tmp_path / 'frozen'}"
    outcome = saebase(*evaluate, "--baselines", frozen, f"own={tmp_path / 'sae'}@{small_run.acts}")
    assert outcome.status == 0, outcome.err
    report = json.loads((tmp_path / "sae" / "report.json").read_text())
    rows = {row["name"]: row for row in report["baselines"]}
    assert "frozen" in rows["frozen_decoder"]["what"]
    assert rows["own"]["reconstruction"] == report["reconstruction"]
    refused = saebase(*evaluate, "--baselines", "nothing")
    assert refused.status == 2
    assert "NAME=FOLDER" in refused.err


def test_flags_may_stand_in_a_file_and_the_line_wins(
    saebase: Saebase, small_run: SmallRun, tmp_path: Path
) -> None:
    settings = tmp_path / "train.yaml"
    settings.write_text("d_sae: 64\nk: 4\nn_steps: 4\nbatch_size: 128\n")
    arguments = ("train", "--config", settings, "--acts", small_run.acts, "--out", tmp_path / "sae")
    outcome = saebase(*arguments, "--k", 5)
    assert outcome.status == 0, outcome.err
    assert "64 features" in outcome.out
    assert "k 5" in outcome.out


def test_topk_trains_too(saebase: Saebase, small_run: SmallRun, tmp_path: Path) -> None:
    outcome = saebase(
        *("train", "--architecture", "topk", "--acts", small_run.acts, "--out", tmp_path / "t"),
        *("--d-sae", 64, "--k", 4, "--n-steps", 4, "--batch-size", 128),
    )
    assert outcome.status == 0, outcome.err
    assert "topk SAE" in outcome.out


def test_query_prints_tables_csv_and_json(saebase: Saebase, small_run: SmallRun) -> None:
    sql = "SELECT feature_id, n_active FROM features ORDER BY feature_id LIMIT 2"
    table = saebase("query", sql, "--db", small_run.db).out
    csv = saebase("query", sql, "--db", small_run.db, "--format", "csv").out
    rows = saebase("query", sql, "--db", small_run.db, "--format", "json").out.splitlines()
    assert "feature_id" in table
    assert csv.splitlines()[0] == "feature_id,n_active"
    assert [json.loads(row)["feature_id"] for row in rows] == [0, 1]


def test_untrusted_sql_prints_the_same(saebase: Saebase, small_run: SmallRun) -> None:
    sql = "SELECT feature_id, label, max_act FROM features ORDER BY feature_id"
    trusted = saebase("query", sql, "--db", small_run.db, "--format", "json")
    untrusted = saebase("query", "--untrusted", sql, "--db", small_run.db, "--format", "json")
    assert untrusted.status == 0, untrusted.err
    assert untrusted.out == trusted.out != ""


def test_lists_in_csv_are_json(saebase: Saebase, small_run: SmallRun) -> None:
    sql = "SELECT token_ids, tokens_of(token_ids) FROM contexts LIMIT 1"
    printed = saebase("query", sql, "--db", small_run.db, "--format", "csv").out
    token_ids, tokens = list(csv.reader(printed.splitlines()))[1]
    assert len(json.loads(token_ids)) == len(json.loads(tokens)) > 0


def test_the_documentation_s_queries_run(saebase: Saebase, small_run: SmallRun) -> None:
    page = Path(__file__).parents[2] / "docs" / "database.md"
    queries = re.findall(r"```sql\n(.*?)```", page.read_text(), flags=re.S)
    assert len(queries) >= 3
    for sql in queries:
        assert saebase("query", sql, "--db", small_run.db).status == 0, sql


def test_the_demo_s_questions_have_answers_in_any_database(small_run: SmallRun) -> None:
    with FeatureDB.open(small_run.db) as db:
        db.sql(CLEAR_FEATURES)
        for sql in QUERIES.values():
            db.sql(sql)


def test_search_show_and_active_answer(saebase: Saebase, small_run: SmallRun) -> None:
    found = saebase("search", "river", "--db", small_run.db)
    assert found.status == 0, found.err
    sql = "SELECT feature_id FROM features ORDER BY n_active DESC LIMIT 1"
    feature = saebase("query", sql, "--db", small_run.db, "--format", "csv").out.split()[1]
    shown = saebase("show", feature, "--db", small_run.db)
    assert f"feature {feature}" in shown.out
    active = saebase(
        "active", "The river crosses", "--sae", small_run.sae, "--db", small_run.db, "--n", 2
    )
    assert active.status == 0, active.err
    assert "river" in active.out


def test_a_text_is_searched_for_by_meaning(
    saebase: Saebase, small_run: SmallRun, tmp_path: Path
) -> None:
    pytest.importorskip("wordllama")
    db = shutil.copy(small_run.db, tmp_path / "db.duckdb")
    embedded = saebase("embed", "wordllama", "--db", db)
    assert embedded.status == 0, embedded.err
    assert "vectors of wordllama kept" in embedded.out
    assert "meaning of" in saebase("search", "doors", "--meaning", "wordllama", "--db", db).out
    refused = saebase("search", "doors", "--meaning", "other", "--db", db)
    assert refused.status == 2
    assert "embedding model 'other': expected a folder" in refused.err


def test_steer_shows_both_texts(saebase: Saebase, small_run: SmallRun) -> None:
    sql = "SELECT feature_id FROM features ORDER BY n_active DESC LIMIT 1"
    feature = saebase("query", sql, "--db", small_run.db, "--format", "csv").out.split()[1]
    common = ("steer", "The river", "--sae", small_run.sae, "--max-new-tokens", 6)
    for dose in (("--add", f"{feature}:8"), ("--clamp", f"{feature}:8"), ("--ablate", feature)):
        outcome = saebase(*common, *dose)
        assert outcome.status == 0, outcome.err
        assert "unsteered" in outcome.out
        assert "perplexity" in outcome.out


def test_plan_tells_the_cost_and_starts_nothing(
    saebase: Saebase, small_model: Path, small_text: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(config_text(small_model, small_text, tmp_path / "out"))
    outcome = saebase("plan", config)
    assert outcome.status == 0, outcome.err
    for word in ("harvest", "train", "evaluate", "index", "in all", "disk", "memory"):
        assert word in outcome.out
    assert not (tmp_path / "out").exists()


def test_plan_foretells_the_size_of_the_cache(saebase: Saebase, small_run: SmallRun) -> None:
    from pipelines.config import read_config
    from pipelines.plan import make_plan

    planned = make_plan(read_config(small_run.config)).stages[0].disk_bytes
    shards = (small_run.acts / "shards").glob("*.safetensors")
    assert planned == pytest.approx(sum(f.stat().st_size for f in shards), rel=0.25)


def test_doctor_finds_this_environment_fit(saebase: Saebase) -> None:
    outcome = saebase("doctor")
    assert outcome.status == 0, outcome.err
    assert "torch" in outcome.out
    assert "import names" in outcome.out


def test_wandb_takes_the_metrics_offline(
    saebase: Saebase, small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    command = [sys.executable, "-m", "pipelines", "train", "--acts", small_run.acts]
    command += ["--out", tmp_path / "sae", "--d-sae", "64", "--k", "4", "--n-steps", "20"]
    command += ["--batch-size", "128", "--wandb-project", "test"]
    done = subprocess.run(
        [str(c) for c in command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_an_interrupted_train_says_so_and_goes_on(small_run: SmallRun, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines", "train", "--acts", str(small_run.acts)]
    command += ["--out", str(tmp_path / "sae"), "--d-sae", "64", "--k", "4"]
    command += ["--batch-size", "128", "--n-steps", "400", "--log-every-steps", "1"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=one_thread)
    metrics = tmp_path / "sae" / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size > 600):
        pass
    process.terminate()
    _, err = process.communicate()
    assert process.returncode == 130
    assert err == "saebase: interrupted; the same command goes on from here\n"
    step = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert 0 < step < 400
    assert list((tmp_path / "sae" / "checkpoints").glob("step-*"))
    short = [*command[:-4], "--n-steps", "400", "--log-every-steps", "1"]
    assert subprocess.run(short, capture_output=True, env=one_thread).returncode == 0
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 401))


def test_no_argument_shows_the_help(saebase: Saebase) -> None:
    assert "Usage: saebase" in saebase().out
    assert run(["--version"]) == 0
