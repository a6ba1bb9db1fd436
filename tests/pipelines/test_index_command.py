"""`saebase index`: in several processes, of parts from elsewhere, straight from a model."""

from collections.abc import Callable
from pathlib import Path

import pytest

from feature_db import FeatureDB
from tests.pipelines.conftest import Outcome, SmallRun

Saebase = Callable[..., Outcome]

FEATURES = "SELECT * FROM features ORDER BY feature_id"


def features(db: Path) -> list[tuple[object, ...]]:
    with FeatureDB.open(db) as opened:
        return opened.sql(FEATURES).fetchall()


def test_processes_count_their_shares_and_one_writes_the_database(
    saebase: Saebase, small_run: SmallRun, tmp_path: Path
) -> None:
    out, part_rows = tmp_path / "shared.duckdb", ("--part-rows", 300)
    given = ("index", small_run.sae, "--acts", small_run.acts, "--out", out, *part_rows)
    for rank in range(2):
        counted = saebase(*given, "--rank", rank, "--world-size", 2)
        assert counted.status == 0, counted.err
        assert f"share {rank} of 2" in counted.out
        assert f"saebase index {small_run.sae} --acts {small_run.acts}" in counted.out
        assert not out.exists()
    assert len(list((tmp_path / "shared.duckdb.parts").glob("*-*"))) > 1
    assert saebase(*given).status == 0
    assert features(out) == features(small_run.db)
    elsewhere = tmp_path / "elsewhere.duckdb"
    merged = saebase(
        *("index", small_run.sae, "--acts", small_run.acts, "--out", elsewhere, *part_rows),
        *("--parts", f"{out}.parts"),
    )
    assert merged.status == 0, merged.err
    assert features(elsewhere) == features(out)
    assert not list((tmp_path / "elsewhere.duckdb.parts").glob("*-*/*/part.json"))


def test_a_text_is_indexed_straight_from_the_model(
    saebase: Saebase, small_run: SmallRun, tmp_path: Path
) -> None:
    out = tmp_path / "text.duckdb"
    made = saebase(
        *("index", small_run.sae, "--dataset", small_run.text, "--n-tokens", 1536, "--out", out)
    )
    assert made.status == 0, made.err
    assert features(out) == features(small_run.db)
    assert not (tmp_path / "text.duckdb.acts").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--dataset", "x.jsonl"), "--n-tokens None"),
        (("--dataset", "x.jsonl", "--n-tokens", 9, "--acts", "acts"), "a cache or a text"),
        (("--dataset", "x.jsonl", "--n-tokens", 9, "--rank", 0, "--world-size", 2), "harvest in"),
        (("--rank", 2, "--world-size", 2), "0 <= rank < world size"),
    ],
)
def test_what_does_not_fit_is_refused(
    saebase: Saebase, small_run: SmallRun, tmp_path: Path, flags: tuple[object, ...], said: str
) -> None:
    refused = saebase("index", small_run.sae, "--out", tmp_path / "no.duckdb", *flags)
    assert refused.status == 2
    assert said in refused.err
    assert refused.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
