"""Labels by people and files: kept, shown, removed, carried over to another database."""

import shutil
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from feature_db import (
    FeatureDB,
    LabelError,
    LabelRow,
    NotFoundError,
    OpenError,
    build_index,
    carry_explanations,
    read_label_file,
)
from feature_db.explanations import show_best
from feature_db.transactions import transaction

from .conftest import World, small_config


@pytest.fixture
def path(world: World, tmp_path: Path) -> Path:
    return Path(shutil.copy(world.path, tmp_path / "w.duckdb"))


def said(text: str, feature_id: int, detection: float | None, model: str = "m") -> pa.Table:
    """One explanation by a language model."""
    row = {"sae_id": 0, "feature_id": feature_id, "method": "llm", "model": model, "text": text}
    return pa.Table.from_pylist([row | {"detection_score": detection, "fuzzing_score": None}])


def shown(db: FeatureDB, feature_id: int) -> tuple[str | None, str | None]:
    feature = db.feature(feature_id)
    return feature.label, feature.label_method


def test_a_label_is_shown_replaced_and_removed(path: Path) -> None:
    with FeatureDB.open(path, read_only=False) as db:
        before = shown(db, 3)
        db.label(3, "  plural\n subjects ")
        assert shown(db, 3) == ("plural subjects", "human")
        db.label(3, "singular")
        assert [row[0] for row in db.explanations(3)] == ["human", "tokens"]
    with FeatureDB.open(path, read_only=False) as db:
        assert shown(db, 3) == ("singular", "human")
        assert db.search("singular").df().feature_id.tolist() == [3]
        db.remove_label(3)
        assert shown(db, 3) == before
        with pytest.raises(NotFoundError, match="nothing to remove"):
            db.remove_label(3)
        assert shown(db, 3) == before


def test_a_dead_feature_can_be_labelled_and_is_nameless_again(path: Path) -> None:
    with FeatureDB.open(path, read_only=False) as db:
        db.label(47, "never seen")
        assert shown(db, 47) == ("never seen", "human")
        db.remove_label(47)
        assert shown(db, 47) == (None, None)


def test_the_best_scored_explanation_is_shown_and_unscored_ones_come_after(path: Path) -> None:
    with FeatureDB.open(path, read_only=False) as db:
        db.add_explanations(said("unscored", 3, None))
        assert shown(db, 3) == ("unscored", "llm")
        db.add_explanations(said("good", 3, 0.9))
        db.add_explanations(said("bad", 3, 0.6))
        assert shown(db, 3) == ("good", "llm")
        assert len(db.explanations(3)) == 4


def test_an_offline_label_made_anew_is_the_one_that_comes_back(path: Path) -> None:
    with FeatureDB.open(path, read_only=False) as db:
        db.label(3, "mine")
        db.remove_label(3)
        db.sql("UPDATE features SET label = 'newer', label_method = 'tokens' WHERE feature_id = 3")
        db.label(3, "mine")
        db.remove_label(3)
        assert shown(db, 3) == ("newer", "tokens")


def test_refused_labels_change_nothing(path: Path) -> None:
    with FeatureDB.open(path) as db:
        with pytest.raises(OpenError, match="read_only=False"):
            db.label(3, "mine")
        with pytest.raises(OpenError, match="read_only=False"):
            db.remove_label(3)
    with FeatureDB.open(path, read_only=False) as db:
        for text in ("", " \n", "x" * 1001):
            with pytest.raises(LabelError, match="label"):
                db.label(3, text)
        with pytest.raises(NotFoundError, match="0 to 47"):
            db.label(48, "x")
        assert db.sql("SELECT * FROM explanations").fetchall() == []


def test_hostile_labels_are_kept_as_they_are_and_shown_safely(path: Path) -> None:
    label = "'); DROP TABLE features; -- <b>\u202e\x1b[31m"
    with FeatureDB.open(path, read_only=False) as db:
        db.label(3, label)
        feature = db.feature(3)
        assert feature.label == label
        assert "<U+202E>" in feature.shown_label
        assert "<b>" not in feature._repr_html_().replace("<b>feature 3</b>", "")


# -- files -----------------------------------------------------------------------------------------


def file_of(folder: Path, *lines: str) -> Path:
    file = folder / "labels.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def test_a_file_of_labels_is_kept_whole(path: Path, tmp_path: Path) -> None:
    file = file_of(
        tmp_path,
        '{"feature_id": 1, "label": "one"}',
        "",
        '{"sae_id": 0, "feature_id": 2, "label": "two", "method": "my-tool"}',
        '{"feature_id": 1, "label": "uno", "method": "my-tool"}',
    )
    rows = read_label_file(file)
    assert rows[1] == LabelRow(3, 0, 2, "two", "my-tool")
    with FeatureDB.open(path, read_only=False) as db:
        db.import_labels(rows)
        db.import_labels(rows)  # the same again: nothing is doubled
        assert shown(db, 1) == ("one", "human")
        assert shown(db, 2) == ("two", "my-tool")
        assert len(db.explanations(1)) == 3
        db.remove_label(1)
        assert shown(db, 1) == ("uno", "my-tool")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "Expecting"),
        ("[]", "the line"),
        ('{"feature_id": 1}', "label: field required"),
        ('{"feature_id": "1", "label": "x"}', "feature_id: input should be a valid integer"),
        ('{"feature_id": -1, "label": "x"}', "feature_id: input should be greater"),
        ('{"feature_id": 1, "label": "  "}', "is empty"),
        ('{"feature_id": 1, "label": "x", "note": 1}', "note: extra inputs"),
        ('{"feature_id": 1, "label": "x", "method": "llm"}', "given by saebase alone"),
        ('{"feature_id": 0, "label": "x"}', "has a label in line 1"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, told: str) -> None:
    file = file_of(tmp_path, '{"feature_id": 0, "label": "fine"}', line)
    with pytest.raises(LabelError) as caught:
        read_label_file(file)
    assert f"{file}, line 2: " in str(caught.value)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="can't read"):
        read_label_file(tmp_path / "no.jsonl")
    with pytest.raises(LabelError, match="holds no labels"):
        read_label_file(file_of(tmp_path, "", " "))
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(LabelError, match="UTF-8"):
        read_label_file(tmp_path / "x.jsonl")


@pytest.mark.parametrize("bad", [LabelRow(7, None, 48, "x", "human"), LabelRow(7, 3, 1, "x", "t")])
def test_a_line_for_a_feature_that_is_not_there_keeps_all_out(path: Path, bad: LabelRow) -> None:
    with FeatureDB.open(path, read_only=False) as db:
        with pytest.raises(LabelError, match=r"line 7: .*"):
            db.import_labels([LabelRow(1, None, 1, "one", "human"), bad])
        assert db.sql("SELECT * FROM explanations").fetchall() == []


# -- another database ------------------------------------------------------------------------------


def test_what_was_said_is_carried_to_a_new_index_of_the_same_sae(
    world: World, path: Path, tmp_path: Path
) -> None:
    with FeatureDB.open(path, read_only=False) as db:
        db.label(3, "mine")
        db.add_explanations(said("a court", 4, 0.9))
        db.add_explanations(said("a bay", 4, 0.7))
    saes = [world.other, world.sae]  # the same SAE has another number there
    target = build_index(
        world.lm, saes, world.cache, out=tmp_path / "t.duckdb", config=small_config(n_top=3)
    )
    with duckdb.connect(str(path), read_only=True) as old, duckdb.connect(str(target)) as new:
        counts = []
        for _ in range(2):
            with transaction(new):
                counts.append(carry_explanations(old, new))
        assert counts == [3, 0]
    with FeatureDB.open(target) as db:
        assert db.feature(3, sae_id=1).label == "mine"
        assert db.feature(4, sae_id=1).label == "a court"
        assert db.sql("SELECT count(*) FROM explanations WHERE sae_id = 0").fetchall() == [(0,)]
        kept = db.explanations(4, sae_id=1).fetchall()
        assert [row[0] for row in kept].count("llm") == 2


def test_a_label_of_the_target_stays_when_another_is_carried(
    world: World, path: Path, tmp_path: Path
) -> None:
    target = Path(shutil.copy(path, tmp_path / "t.duckdb"))
    for file, text in ((path, "old"), (target, "new")):
        with FeatureDB.open(file, read_only=False) as db:
            db.label(3, text)
    with duckdb.connect(str(path), read_only=True) as old, duckdb.connect(str(target)) as new:
        assert carry_explanations(old, new) == 0
    with FeatureDB.open(target) as db:
        assert db.feature(3).label == "new"


def test_a_database_from_before_explanations_has_none_to_carry(path: Path, tmp_path: Path) -> None:
    target = Path(shutil.copy(path, tmp_path / "t.duckdb"))
    with duckdb.connect(str(path)) as old, duckdb.connect(str(target)) as new:
        old.execute("DROP TABLE explanations")
        assert carry_explanations(old, new) == 0


def test_showing_the_best_again_changes_nothing(path: Path) -> None:
    with FeatureDB.open(path, read_only=False) as db:
        db.label(3, "mine")
        before = db.sql("SELECT * FROM features ORDER BY feature_id").fetchall()
    with duckdb.connect(str(path)) as connection:
        show_best(connection, [(0, i) for i in range(48)])
    with FeatureDB.open(path) as db:
        assert db.sql("SELECT * FROM features ORDER BY feature_id").fetchall() == before
