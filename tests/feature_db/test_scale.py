"""The benchmark of very many features, small: its rows are whole."""

import argparse
import importlib
from pathlib import Path

import duckdb
import pytest

from feature_db import FeatureDB

from .conftest import World

ROOT = Path(__file__).parents[2]
N_FEATURES, N_CONTEXTS = 1100, 3  # more than one bucket of 1,024


@pytest.fixture
def made_db(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The benchmark's database, of the tests' vocabulary."""
    world.lm.model.save_pretrained(tmp_path / "model")
    world.lm.tokenizer.save_pretrained(tmp_path / "model")
    path = tmp_path / "scale.duckdb"
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    numbers = {"n_features": N_FEATURES, "n_contexts": N_CONTEXTS, "memory": "500MB"}
    options = argparse.Namespace(**numbers, model=str(tmp_path / "model"), db=path)
    steps = importlib.import_module("scale").made(options)
    assert [step["step"].split()[-1] for step in steps][:2] == ["features", "words"]
    return path


def test_every_feature_has_a_whole_page(made_db: Path) -> None:
    with FeatureDB.open(made_db) as db:
        for feature_id in (0, 1023, 1024, N_FEATURES - 1):
            page = db.feature(feature_id)
            assert [c.rank for c in page.top] == [1, 2, 3]
            assert all("".join(c.tokens) == c.text for c in page.top)
            assert all(c.acts[c.peak] == c.act == max(c.acts) for c in page.top)
            assert (len(page.tokens), len(page.histogram), len(page.neighbors)) == (10, 12, 10)
            assert (len(page.promoted), len(page.suppressed)) == (10, 10)
            assert (len(page.tokens_before), len(page.tokens_after)) == (10, 10)


def test_words_lead_to_contexts_that_hold_them(made_db: Path) -> None:
    with duckdb.connect(str(made_db), read_only=True) as connection:
        found = connection.execute(
            "SELECT word, words.feature_id, contexts.feature_id, lower(text) FROM words "
            "JOIN contexts ON contexts.rowid = example WHERE field = 'context'"
        ).fetchall()
    assert len(found) > N_FEATURES
    assert all(word in text and one == other for word, one, other, text in found)
