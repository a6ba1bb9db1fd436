"""saebase export: what is chosen, what is written, what is refused."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipelines.commands import export as module
from tests.pipelines.conftest import Outcome, SmallRun

Saebase = Callable[..., Outcome]


def ids(out: Path) -> list[int]:
    return [json.loads(line)["feature_id"] for line in out.read_text().splitlines()]


def test_every_format_is_written_and_told(
    saebase: Saebase, small_run: SmallRun, tmp_path: Path
) -> None:
    for kind in ("parquet", "buckets", "jsonl", "csv", "neuronpedia", "html"):
        done = saebase("export", small_run.db, "--out", tmp_path / kind, "--format", kind)
        assert done.status == 0, done.err
        assert f"{kind}: {kind}" in done.out.replace("\n", "")
        assert "(100%)" in done.out
        assert (tmp_path / kind).exists()


def test_features_are_chosen_by_sql_by_id_and_by_sae(
    saebase: Saebase, small_run: SmallRun, tmp_path: Path
) -> None:
    to = ("export", small_run.db, "--format", "jsonl", "--overwrite", "--out", tmp_path / "f")
    sql = "SELECT feature_id FROM features WHERE feature_id IN (5, 2) ORDER BY 1 DESC"
    assert saebase(*to, "--features", sql).status == 0
    assert ids(tmp_path / "f") == [5, 2]
    assert saebase(*to, "--features", sql, "--sae-id", 0).status == 0
    assert ids(tmp_path / "f") == [5, 2]
    assert saebase(*to, "--feature", 7, "--feature", 1).status == 0
    assert ids(tmp_path / "f") == [7, 1]
    assert saebase(*to, "--sae-id", 0).status == 0
    assert ids(tmp_path / "f") == list(range(96))


def test_labels_go_from_one_database_to_another(
    saebase: Saebase, small_run: SmallRun, tmp_path: Path
) -> None:
    one = shutil.copy(small_run.db, tmp_path / "one.duckdb")
    other = shutil.copy(small_run.db, tmp_path / "other.duckdb")
    assert saebase("label", 7, "plural subjects", "--db", one).status == 0
    out = tmp_path / "labels.jsonl"
    done = saebase("export", one, "--out", out, "--format", "labels")
    assert f"saebase label --import {out}" in done.out.replace("\n", "")
    assert saebase("label", "--import", out, "--db", other).status == 0
    assert "plural subjects" in saebase("show", 7, "--db", other).out


@pytest.mark.filterwarnings("ignore:.*:ResourceWarning:(aiohttp|aiobotocore|asyncio|moto)")
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:(moto|botocore|aiobotocore|s3fs)")
def test_every_command_takes_buckets_as_it_takes_a_file(
    saebase: Saebase, small_run: SmallRun, tmp_path: Path, bucket: str, blocks: Path
) -> None:
    places = [tmp_path / "buckets", f"s3://{bucket}/db"]
    for place in places:
        done = saebase("export", small_run.db, "--out", place, "--format", "buckets")
        assert done.status == 0, done.err
        assert f"saebase show 0 --db {place}" in done.out.replace("\n", "")
    for command in (
        ("show", 7),
        ("search", "the", "--limit", 5),
        ("query", "SELECT feature_id, rank, text FROM contexts WHERE feature_id < 9 ORDER BY ALL"),
        ("query", "--format", "json", "FROM neighbors(7, 3)"),
        ("query", "SHOW TABLES"),
    ):
        expected = saebase(*command, "--db", small_run.db)
        assert expected.status == 0, expected.err
        for place in places:
            assert saebase(*command, "--db", place).out == expected.out
    sql = "SELECT count(*) FROM contexts"
    untrusted = saebase("query", "--untrusted", sql, "--db", places[0])
    assert untrusted.out == saebase("query", sql, "--db", small_run.db).out
    for place in places:
        refused = saebase("label", 7, "x", "--db", place)
        assert refused.status == 2
        assert refused.err.count("\n") == 1
        assert f"{place} is in buckets" in refused.err
        kept = saebase("export", place, "--out", tmp_path / "f", "--format", "csv", "--overwrite")
        assert kept.status == 0, kept.err
    missing = saebase("show", 7, "--db", f"s3://{bucket}/nothing")
    assert missing.status == 2
    assert "holds no manifest.json" in missing.err


def test_names_in_neuronpedia_are_flags(
    saebase: Saebase, small_run: SmallRun, tmp_path: Path
) -> None:
    to = ("export", small_run.db, "--out", tmp_path / "np", "--model-id", "gpt2-small")
    done = saebase(*to, "--format", "neuronpedia", "--source-set", "mine", "--layer", 3)
    assert done.status == 0, done.err
    assert (tmp_path / "np" / "gpt2-small" / "3-mine" / "source.jsonl").is_file()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--format", "xml"], "--format"),
        (["--format", "csv", "--feature", "4000"], "no feature 4000"),
        (["--format", "csv", "--feature", "1", "--features", "SELECT 1"], "give one"),
        (["--format", "csv", "--features", " ;"], "--features is empty"),
        (["--format", "csv", "--features", "SELECT 1 AS id"], "the columns are id"),
        (["--format", "csv", "--features", "SELECT nothing"], "nothing"),
        (["--format", "csv", "--features", "COPY features TO '/tmp/x.csv'"], "disabled"),
        (["--format", "csv", "--sae-id", "4"], "has no SAE 4"),
        (["--format", "csv", "--creator", "me"], "not for csv"),
        (["--format", "labels"], "by a person or a file"),
        (["--format", "neuronpedia", "--model-id", "../x"], "--model-id"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    saebase: Saebase, small_run: SmallRun, tmp_path: Path, flags: list[str], said: str
) -> None:
    done = saebase("export", small_run.db, "--out", tmp_path / "out", *flags)
    assert done.status == 2, done
    assert done.err.startswith("saebase: ")
    assert done.err.count("\n") == 1, done.err
    assert said in done.err
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_kept(saebase: Saebase, small_run: SmallRun, tmp_path: Path) -> None:
    out = tmp_path / "mine.csv"
    out.write_text("mine")
    done = saebase("export", small_run.db, "--out", out, "--format", "csv")
    assert (done.status, out.read_text()) == (2, "mine")
    assert "--overwrite" in done.err
    assert saebase("export", small_run.db, "--out", out, "--format", "csv", "--overwrite")
    assert out.read_text().startswith("sae_id,")


def test_a_signal_ends_it_after_a_block_and_leaves_nothing(
    saebase: Saebase, small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def asked() -> Iterator[Callable[[], bool]]:
        yield lambda: True

    monkeypatch.setattr(module, "stop_asked", asked)
    done = saebase("export", small_run.db, "--out", tmp_path / "out", "--format", "parquet")
    assert done.status == 130
    assert list(tmp_path.iterdir()) == []
