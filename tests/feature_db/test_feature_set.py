"""FeatureSet: what SQL found, gone on with."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import polars as pl
import pytest

from feature_db import FeatureDB, FeatureDBError, FeatureSet, NotFoundError, Result, build_index
from feature_db import feature_set as module
from interp import Add, SteeringError, steer
from sae import SAE

from .conftest import World, small_config


def ids(found: FeatureSet) -> list[int]:
    return [feature_id for _, feature_id in found.ids]


def test_a_query_s_features_come_once_and_in_order(db: FeatureDB) -> None:
    found = db.sql("SELECT feature_id FROM (VALUES (7), (3), (7)) AS v(feature_id)").features()
    assert ids(found) == [7, 3]
    assert found.table().df().feature_id.tolist() == [7, 3]
    assert [page.feature_id for page in found] == [7, 3]
    assert "0:7, 0:3" in repr(found)
    assert "<table" in found._repr_html_()


def test_search_results_go_on(db: FeatureDB) -> None:
    found = db.search("treaty", 3)
    assert ids(found.features()) == [row[1] for row in found]


@pytest.mark.parametrize(
    "framed",
    [
        lambda rows: pd.DataFrame(rows),
        lambda rows: pl.DataFrame(rows),
        lambda rows: pl.DataFrame(rows).to_arrow(),
        lambda rows: rows["feature_id"],
    ],
    ids=["pandas", "polars", "Arrow", "list"],
)
def test_frames_of_all_kinds_name_features(
    db: FeatureDB, framed: Callable[[dict[str, list[int]]], object]
) -> None:
    assert ids(db.features(framed({"feature_id": [5, 2]}))) == [5, 2]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (pd.DataFrame({"id": [1]}), "the columns are id: expected feature_id"),
        (pd.DataFrame({"feature_id": ["a"]}), "feature_id='a': expected whole numbers"),
        (pd.DataFrame({"feature_id": [1.5]}), "feature_id=1.5: expected whole numbers"),
        (pd.DataFrame({"feature_id": [99]}), "no feature 99 in SAE 0"),
        (pd.DataFrame({"feature_id": [1], "sae_id": [4]}), "has no SAE 4"),
        (["a"], "expected a frame, or a list of feature ids"),
    ],
)
def test_what_names_no_feature_is_refused(db: FeatureDB, found: object, said: str) -> None:
    with pytest.raises(NotFoundError, match=said):
        db.features(found)  # type: ignore[arg-type]


def test_rows_of_no_database_say_so(db: FeatureDB) -> None:
    with pytest.raises(FeatureDBError, match=r"db\.features"):
        Result(db.sql("SELECT 1 AS feature_id").arrow()).features()


def test_steering_by_a_set_is_steering_by_its_features(
    world: World, db: FeatureDB, tmp_path: Path
) -> None:
    sae = SAE.load(world.sae.save(tmp_path / "sae"))
    sae.max_act.fill_(1.0)
    found = db.sql("SELECT sae_id, feature_id FROM features WHERE feature_id IN (3, 7)").features()
    with found.steer(world.lm, sae, strength=3):
        one = world.lm.generate("The golden", max_new_tokens=8)
    with steer(world.lm, sae, {3: Add(3.0), 7: Add(3.0)}):
        other = world.lm.generate("The golden", max_new_tokens=8)
    assert one == other != world.lm.generate("The golden", max_new_tokens=8)


def test_steering_by_another_sae_is_refused(world: World, db: FeatureDB) -> None:
    with pytest.raises(NotFoundError, match="wasn't made from this SAE"):
        db.features([3]).steer(world.lm, world.other)


def test_steering_by_features_of_several_saes_is_refused(
    world: World, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("two") / "two.duckdb"
    saes = [world.sae, world.other]
    build_index(world.lm, saes, world.cache, out=out, config=small_config())
    with FeatureDB.open(out) as db:
        both = db.sql("SELECT sae_id, feature_id FROM features WHERE feature_id = 3").features()
        with pytest.raises(SteeringError, match="features of SAEs 0, 1"):
            both.steer(world.lm, world.sae)
        with pytest.raises(NotFoundError, match="holds 2 SAEs"):
            db.features([3])
        with pytest.raises(SteeringError, match="set is empty"):
            db.sql("SELECT sae_id, feature_id FROM features LIMIT 0").features().steer(
                world.lm, world.sae
            )


def test_what_is_not_registered_says_how_to_register_it(
    world: World, db: FeatureDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ENTRY_POINTS", "saebase.nothing")
    with pytest.raises(FeatureDBError, match="pip install -e"):
        db.features([3]).steer(world.lm, world.sae)
