"""The cookbook: every query runs, and finds what was planted."""

from collections.abc import Iterator
from typing import Any

import pytest

from feature_db import FeatureDB

from .page import Question, questions
from .planted import AGAIN, NARROW, feature_id, planted_database

Answer = list[dict[str, Any]]


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FeatureDB]:
    with FeatureDB.open(planted_database(tmp_path_factory.mktemp("cookbook"))) as opened:
        yield opened


def answers(db: FeatureDB, title: str) -> Answer:
    """What the one query under a title answers."""
    (found,) = [each.sql for each in questions() if title in each.title]
    rows = db.sql(found).arrow().to_pylist()
    assert isinstance(rows, list)
    return rows


def names(rows: Answer, sae_id: int = 0) -> list[str]:
    """The planted names of the features of an answer."""
    planted = list(NARROW if sae_id == 0 else AGAIN)
    return [planted[row["feature_id"]] for row in rows]


def test_there_are_enough_questions_and_each_has_an_answer() -> None:
    found = questions()
    numbers = [int(each.title.partition(".")[0]) for each in found]
    assert sorted(set(numbers)) == list(range(1, numbers[-1] + 1))
    assert numbers[-1] >= 25
    assert not [each.title for each in found if not each.answer]


@pytest.mark.parametrize("question", questions(), ids=lambda q: q.title.partition(".")[0])
def test_every_query_runs(db: FeatureDB, question: Question) -> None:
    assert db.sql(question.sql).columns


def test_the_plural_subject_without_the_verb(db: FeatureDB) -> None:
    assert names(answers(db, "plural subject")) == ["subjects"]


def test_saying_and_reacting(db: FeatureDB) -> None:
    found = answers(db, "say a word")
    roles = dict(zip(names(found), (row["role"] for row in found), strict=True))
    assert roles.pop("says") == "says"
    assert roles.pop("says and reacts") == "both"
    assert roles.pop("reacts") == roles.pop("same and age") == "reacts"
    assert not roles


def test_contexts_that_cluster_apart(db: FeatureDB) -> None:
    found = names(answers(db, "polysemantic"))
    assert found[0] == "piano and river"
    assert {"music", "water", "colours", "subjects", "verbs"}.isdisjoint(found)


def test_dense_features(db: FeatureDB) -> None:
    found = answers(db, "are dense")
    assert names(found)[0] == "everything"
    assert found[0]["density"] > 0.98  # not on what stands between documents
    assert {"music", "nothing"}.isdisjoint(names(found))


def test_a_feature_that_is_split(db: FeatureDB) -> None:
    found = answers(db, "split in the wider")[0]
    assert names([found]) == ["colours"]
    assert found["n_children"] == 3
    for word in ("red", "green", "blue"):
        assert f"{feature_id(word, 2)}: {word}" in found["children"]


def test_features_that_separate_documents(db: FeatureDB) -> None:
    found = answers(db, "separate two sets")
    assert names(found) == ["war"]
    assert found[0]["d"] > 2
    assert found[0]["rate_out"] == 0


def test_what_changed_between_two_runs(db: FeatureDB) -> None:
    changed = [each.sql for each in questions() if "changed between" in each.title]
    alike, gone = (db.sql(sql).arrow().to_pylist() for sql in changed)
    assert alike[0]["cosine_from"] == 1
    assert sum(row["n_features"] for row in alike) == len(NARROW) - 1
    assert names(gone) == ["war"]
