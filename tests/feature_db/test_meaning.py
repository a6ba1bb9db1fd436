"""Search by meaning: embedding models that a user names, their vectors kept, features found."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel

from feature_db import FeatureDB, MeaningError
from feature_db.embedders import Embedder

from .conftest import World, tiny_tokenizer
from .cookbook.planted import feature_id, planted_database

_TOPICS = ("treaty", "golden gate", "judge", "doors")


def topics(texts: Sequence[str]) -> np.ndarray:
    """An embedding whose truth is known: how often a text speaks of each topic."""
    return np.array([[float(text.lower().count(t)) for t in _TOPICS] for text in texts])


def other_model(texts: Sequence[str]) -> np.ndarray:
    return np.ones((len(texts), 3), np.float32)


@pytest.fixture
def path(world: World, tmp_path: Path) -> Path:
    return Path(shutil.copy(world.path, tmp_path / "db.duckdb"))


@pytest.fixture
def encoder_folder(tmp_path: Path) -> Path:
    """A tiny random encoder, as `save_pretrained` leaves it."""
    tokenizer, folder = tiny_tokenizer(), tmp_path / "tiny-encoder"
    tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_text_finds_the_features_that_mean_it(path: Path) -> None:
    with FeatureDB.open(path, read_only=False) as db:
        told = list[tuple[int, int]]()
        n = db.embed(topics, lambda done, total: told.append((done, total)))
        assert n == 47  # one of 48 is dead
        assert told[-1] == (47, 47)
    with FeatureDB.open(path) as db:
        found = db.search("treaty", 5, meaning=topics)
        assert found.columns == db.search("treaty").columns
        rows = found.df()
        assert rows.score.is_monotonic_decreasing
        assert rows.reason.str.startswith("meaning of its").all()
        kept = db.sql("SELECT feature_id, field, vector FROM meanings").fetchall()
        query = topics(["treaty treaty treaty"])[0] / np.linalg.norm(
            topics(["treaty treaty treaty"])
        )
        best: dict[int, float] = {}
        for feature_id, _, vector in kept:
            best[feature_id] = max(best.get(feature_id, -1.0), float(np.dot(vector, query)))
        expected = sorted(best.items(), key=lambda pair: (-round(pair[1], 5), pair[0]))[:5]
        assert rows.score.tolist() == pytest.approx([score for _, score in expected], abs=1e-4)
        assert found.features().ids[0][1] == rows.feature_id[0]


def test_embedding_again_replaces_what_was_kept(path: Path) -> None:
    with FeatureDB.open(path, read_only=False) as db:
        db.embed(topics)
        once = db.sql("SELECT count(*) FROM meanings").fetchall()
        db.embed(topics)
        assert db.sql("SELECT count(*) FROM meanings").fetchall() == once
        db.embed(other_model)
        assert len(db.sql("SELECT DISTINCT model FROM meanings")) == 2


def test_without_vectors_it_says_how_to_make_them(path: Path) -> None:
    with FeatureDB.open(path, read_only=False) as db:
        with pytest.raises(MeaningError, match=r"it has none\): make them with `saebase embed"):
            db.search("treaty", meaning=topics)
        db.embed(topics)
        with pytest.raises(MeaningError, match=r"it has those of .*topics"):
            db.search("treaty", meaning=other_model)


def test_a_folder_s_encoder_gives_the_mean_of_its_states(encoder_folder: Path) -> None:
    texts = ["The golden gate", "a court"]
    found = Embedder.of(encoder_folder)(texts)
    tokenizer, model = tiny_tokenizer(), AutoModel.from_pretrained(encoder_folder).eval()
    for text, vector in zip(texts, found, strict=True):
        with torch.no_grad():
            ids = torch.tensor([tokenizer(text).input_ids])
            mean = model(ids).last_hidden_state[0].mean(0)
        assert vector == pytest.approx((mean / mean.norm()).numpy(), abs=1e-5)


def test_a_package_that_carries_its_model_finds_what_no_word_finds(tmp_path: Path) -> None:
    pytest.importorskip("wordllama")
    with FeatureDB.open(planted_database(tmp_path), read_only=False) as db:
        db.embed("wordllama")
        for text, names in (
            ("musical instruments", {"music", "piano and guitar"}),
            ("soldiers and military conflict", {"war"}),
            ("lake water", {"water", "river and ocean"}),
        ):
            found = db.search(text, 1, meaning="wordllama")
            ((_, first),) = found.features().ids
            assert first in {feature_id(name) for name in names}, text
            assert len(db.search(text.split()[0])) == 0


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("no/such/folder", "expected a folder with an encoder, wordllama, or package:function"),
        ("no_such_package:load", "no_such_package: it can't be imported"),
        ("json:no_such", "json has no no_such"),
        ("time:time", "gave a float: expected a function of texts"),
        (lambda texts: [1.0] * len(texts), "expected a vector of floats for each"),
    ],
)
def test_models_that_are_none_are_refused(
    path: Path, model: str | Callable[[Sequence[str]], object], said: str
) -> None:
    with (
        FeatureDB.open(path, read_only=False) as db,
        pytest.raises(MeaningError, match=said) as caught,
    ):
        db.embed(model)
    assert "\n" not in str(caught.value)
    with FeatureDB.open(path) as db:
        assert len(db.sql("FROM meanings")) == 0
