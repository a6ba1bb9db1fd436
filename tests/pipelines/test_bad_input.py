"""A user's mistakes: one line with the value and the way out, status 2, nothing half-written."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest

from tests.pipelines.conftest import Outcome, SmallRun, config_text, refused

Saebase = Callable[..., Outcome]


@pytest.fixture
def harvest(small_model: Path, small_text: Path, tmp_path: Path) -> list[object]:
    """A command that works, to be spoilt: the last value of a flag wins."""
    return [
        *("harvest", "--model", small_model, "--dataset", small_text, "--out", tmp_path / "acts"),
        *("--n-tokens", 512, "--ctx-len", 32, "--hookpoints", "layers.1.resid_post"),
    ]


def spoilt(command: list[object], flag: str, value: object) -> list[object]:
    at = command.index(flag)
    return [*command[: at + 1], value, *command[at + 2 :]]


def test_unknown_model(saebase: Saebase, harvest: list[object], tmp_path: Path) -> None:
    refused(saebase(*spoilt(harvest, "--model", "no/such-model")), "no/such-model", "--model demo")
    assert not (tmp_path / "acts").exists()


def test_a_folder_that_is_no_model(saebase: Saebase, harvest: list[object], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(saebase(*spoilt(harvest, "--model", tmp_path / "empty")), "config.json")


def test_unknown_hookpoint_names_the_nearest(
    saebase: Saebase, harvest: list[object], tmp_path: Path
) -> None:
    wrong = spoilt(harvest, "--hookpoints", "layers.1.resid_pots")
    refused(saebase(*wrong), "layers.1.resid_pots", "layers.1.resid_post")
    refused(saebase(*spoilt(harvest, "--hookpoints", "layers.9.resid_post")), "layers 0 to 2")
    assert not (tmp_path / "acts").exists()


def test_unknown_feature(saebase: Saebase, small_run: SmallRun) -> None:
    refused(saebase("show", 96, "--db", small_run.db), "96", "0 to 95")
    steer = ("steer", "The river", "--sae", small_run.sae)
    refused(saebase(*steer, "--add", "96:1"), "96", "0 to 95")
    refused(saebase(*steer, "--add", "four"), "four", "FEATURE:STRENGTH")
    refused(saebase(*steer), "--add")


def test_unknown_flag_and_unknown_key_name_the_nearest(
    saebase: Saebase, harvest: list[object], tmp_path: Path
) -> None:
    refused(saebase(*harvest, "--ctx-length", 3), "--ctx-length", "--ctx-len")
    settings = tmp_path / "settings.yaml"
    settings.write_text("ctx_length: 12\n")
    refused(saebase(*harvest, "--config", settings), "ctx_length", "ctx_len", settings)


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("modle: demo", ("modle", "model")),
        ("train: {n_step: 3}", ("n_step", "n_steps")),
        ("harvest: {ctx_length: 3}", ("ctx_length", "ctx_len")),
        ("harvest: {ctx_len: -4}", ("ctx_len", "-4")),
        ("sae: {d_sae: 8, k: 9}", ("k=9", "d_sae=8")),
        ("sae: {architecture: topkk, d_sae: 8, k: 9}", ("topkk", "batch_topk")),
        ("sae: {k: 9}", ("d_sae",)),
        ("hookpoints: []", ("hookpoints",)),
    ],
)
def test_wrong_configurations(
    saebase: Saebase,
    small_model: Path,
    small_text: Path,
    tmp_path: Path,
    line: str,
    names: tuple[str, ...],
) -> None:
    lines = config_text(small_model, small_text, tmp_path / "out").splitlines()
    key = line.split(":")[0]
    config = tmp_path / "config.yaml"
    config.write_text("\n".join([one for one in lines if one.split(":")[0] != key] + [line]))
    refused(saebase("run", config), config, *names)
    assert not (tmp_path / "out").exists()


def test_configurations_that_can_not_be_read(saebase: Saebase, tmp_path: Path) -> None:
    refused(saebase("run", tmp_path / "none.yaml"), "none.yaml")
    config = tmp_path / "config.yaml"
    config.write_text("a: [1\n")
    refused(saebase("run", config), "config.yaml", "YAML")
    config.write_text("- a\n")
    refused(saebase("plan", config), "config.yaml", "list")


def test_impossible_flags(saebase: Saebase, small_run: SmallRun, tmp_path: Path) -> None:
    train = ("train", "--acts", small_run.acts, "--out", tmp_path / "sae", "--d-sae", 16)
    refused(saebase(*train, "--k", 17), "k=17", "16")
    refused(saebase(*train, "--k", 4, "--lr", -1), "lr", "-1")
    refused(saebase(*train, "--k", "many"), "many")
    refused(saebase(*train), "--k")
    refused(saebase(*train, "--k", 4, "--hookpoint", "layers.0.resid_pre"), "layers.0.resid_pre")
    assert not (tmp_path / "sae").exists()
    refused(saebase("harvst"), "harvst", "harvest")


def test_a_cache_of_another_model(
    saebase: Saebase,
    harvest: list[object],
    small_run: SmallRun,
    tiny_model: Callable[[str], object],
    tiny_tokenizer: object,
    tmp_path: Path,
) -> None:
    assert saebase(*harvest).status == 0
    before = (tmp_path / "acts" / "manifest.json").read_bytes()
    other = tmp_path / "other-model"
    tiny_model("gpt2").save_pretrained(other)  # type: ignore[attr-defined]
    tiny_tokenizer.save_pretrained(other)  # type: ignore[attr-defined]
    refused(saebase(*spoilt(harvest, "--model", other)), "other-model", "another folder")
    assert (tmp_path / "acts" / "manifest.json").read_bytes() == before

    acts = tmp_path / "gpt2-acts"
    command = spoilt(spoilt(harvest, "--model", other), "--out", acts)
    assert saebase(*command).status == 0
    refused(saebase("evaluate", small_run.sae, "--acts", acts), "other-model")
    db = tmp_path / "x.duckdb"
    refused(saebase("index", small_run.sae, "--acts", acts, "--out", db), "other-model")
    assert not list(tmp_path.glob("x.duckdb*"))


def test_an_empty_corpus(saebase: Saebase, harvest: list[object], tmp_path: Path) -> None:
    for name, content in (("empty.jsonl", ""), ("blank.jsonl", '{"text": ""}\n')):
        (tmp_path / name).write_text(content)
        refused(saebase(*spoilt(harvest, "--dataset", tmp_path / name)), name, "empty")
    assert not list((tmp_path / "acts").rglob("*.safetensors*"))
    assert saebase(*harvest).status == 0


def test_a_text_without_the_column(saebase: Saebase, harvest: list[object], tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"body": "x", "title": "y"}\n')
    refused(saebase(*spoilt(harvest, "--dataset", tmp_path / "c.jsonl")), "text", "body, title")
    refused(saebase(*spoilt(harvest, "--dataset", tmp_path / "no.txt")), "no.txt")


def test_a_full_disk_before_and_during_the_harvest(
    saebase: Saebase, harvest: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(saebase(*spoilt(harvest, "--n-tokens", 10**15)), "disk full", "n_tokens")
    shutil.rmtree(tmp_path / "acts", ignore_errors=True)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        refused(saebase(*harvest), "disk full", "run it again")
    assert not list((tmp_path / "acts").rglob("*.safetensors*"))
    assert saebase(*harvest).status == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_disk_that_is_really_full(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(small)])
    if mounted.returncode:
        pytest.skip("this machine does not let tests mount a tmpfs")
    try:
        config = tmp_path / "config.yaml"
        config.write_text(config_text(small_model, small_text, small / "out"))
        done = subprocess.run(
            [sys.executable, "-m", "pipelines", "run", str(config)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert "space" in done.stderr or "disk full" in done.stderr
        assert not list((small / "out").rglob("*.partial"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_database_of_a_newer_version(
    saebase: Saebase, small_run: SmallRun, tmp_path: Path
) -> None:
    newer = tmp_path / "newer.duckdb"
    shutil.copy(small_run.db, newer)
    with duckdb.connect(str(newer)) as connection:
        connection.execute("UPDATE meta SET value = '999' WHERE key = 'schema_version'")
    refused(saebase("query", "SELECT 1", "--db", newer), "999", "upgrade")
    refused(saebase("show", 0, "--db", tmp_path / "none.duckdb"), "none.duckdb")
    (tmp_path / "text.duckdb").write_text("not a database")
    refused(saebase("search", "x", "--db", tmp_path / "text.duckdb"), "text.duckdb")


def test_wrong_sql(saebase: Saebase, small_run: SmallRun) -> None:
    refused(saebase("query", "SELECT * FROM featuers", "--db", small_run.db), "featuers")
    refused(saebase("query", "SELEC 1", "--db", small_run.db), "SELEC")
    refused(saebase("query", "DELETE FROM features", "--db", small_run.db), "read-only")


def test_query_can_not_write_or_read_other_files(
    saebase: Saebase, small_run: SmallRun, tmp_path: Path
) -> None:
    before = small_run.db.read_bytes()
    copy = f"COPY features TO '{small_run.db}'"
    refused(saebase("query", copy, "--db", small_run.db), "disabled")
    refused(saebase("query", f"COPY features TO '{tmp_path}/x.csv'", "--db", small_run.db))
    refused(saebase("query", "FROM read_csv('/etc/passwd')", "--db", small_run.db))
    refused(saebase("query", " ; ", "--db", small_run.db), "empty")
    assert small_run.db.read_bytes() == before
    assert not (tmp_path / "x.csv").exists()


def test_untrusted_sql_is_locked_and_limited(saebase: Saebase, small_run: SmallRun) -> None:
    def untrusted(sql: str, *more: object) -> Outcome:
        return saebase("query", "--untrusted", sql, "--db", small_run.db, *more)

    refused(untrusted("COPY features TO 'x.csv'"), "one SELECT", "COPY")
    refused(untrusted("SELECT sleep_ms(100000)", "--time-s", 0.5), "stopped after 0.5 s")
    refused(untrusted("FROM contexts", "--result-bytes", 1000), "add a LIMIT")
    refused(untrusted("SELECT 1", "--memory-bytes", 5), "--memory-bytes", "100000000")
    trusted = saebase("query", "SELECT 1", "--db", small_run.db, "--time-s", 9)
    refused(trusted, "--time-s", "add --untrusted")


def test_doses_that_contradict_each_other(saebase: Saebase, small_run: SmallRun) -> None:
    steer = ("steer", "The river", "--sae", small_run.sae)
    refused(saebase(*steer, "--add", "5:1", "--ablate", 5), "feature 5", "two doses")
    refused(saebase(*steer, "--add", "5:1", "--add", "5:2"), "feature 5", "two doses")
    refused(saebase(*steer, "--ablate", 5, "--max-new-tokens", 0), "max_new_tokens=0")


def test_debug_shows_where_it_came_from(saebase: Saebase, tmp_path: Path) -> None:
    outcome = saebase("run", tmp_path / "none.yaml", "--debug")
    assert outcome.status == 2
    assert "Traceback" in outcome.err


def test_places_that_can_t_be_urls(
    saebase: Saebase, small_run: SmallRun, small_model: Path, small_text: Path, tmp_path: Path
) -> None:
    train = ("train", "--acts", small_run.acts, "--d-sae", 16, "--k", 2)
    refused(saebase(*train, "--out", "s3://bucket/sae"), "made on this machine", "give a folder")
    config = tmp_path / "run.yaml"
    config.write_text(config_text(small_model, small_text, Path("s3://bucket/run")))
    refused(saebase("run", config), "s3:/bucket/run", "made on this machine")
    assert not Path("s3:").exists()


def test_a_url_that_can_t_be_used_is_told_before_the_model_is_loaded(
    saebase: Saebase, harvest: list[object]
) -> None:
    wrong = spoilt(spoilt(harvest, "--model", "no/such-model"), "--out", "s4://bucket/acts")
    refused(saebase(*wrong), "s4://bucket/acts has the unknown protocol 's4'")


def test_block_cache_settings_are_checked(
    saebase: Saebase, small_run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEBASE_BLOCKS_GB", "many")
    refused(saebase("verify", small_run.acts), "SAEBASE_BLOCKS_GB=many: expected a number")
