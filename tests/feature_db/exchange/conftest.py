"""A database with labels and tokens of people who mean ill."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pytest

from feature_db import FeatureDB, FeatureSet, read_label_file
from tests.feature_db.conftest import World

FORMULA = "=cmd|' /C calc'!A0"
MARKUP = '<script>alert(1)</script>"><img src=x onerror=alert(2)>'
TURNED = "\u202egnp.exe \x1b[31mred\x07"
UNICODE = "été 日本 naïve 🦆"
HOSTILE = {3: FORMULA, 5: MARKUP, 7: TURNED, 8: UNICODE}
_CHANGES = [
    ("UPDATE vocabulary SET token = ? || token WHERE token_id % 2 = 0", MARKUP),
    ("UPDATE vocabulary SET token = token || ? WHERE token_id % 2 = 1", TURNED),
    ("UPDATE feature_tokens SET token = ?", FORMULA),
    ("UPDATE feature_logits SET token = ?", MARKUP),
    ("UPDATE contexts SET text = ? || text", FORMULA),
    ("UPDATE saes SET model = ?", f"{MARKUP}/{MARKUP}"),
]


@pytest.fixture(scope="session")
def hostile_path(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the world's database with hostile labels, and hostile tokens in every context."""
    path = tmp_path_factory.mktemp("hostile") / "hostile.duckdb"
    shutil.copy(world.path, path)
    with FeatureDB.open(path, read_only=False) as db:
        for feature_id, label in HOSTILE.items():
            db.label(feature_id, label)
        lines = path.with_name("labels.jsonl")
        lines.write_text('{"feature_id": 9, "label": "by a file", "method": "my-tool"}\n')
        db.import_labels(read_label_file(lines))
    with duckdb.connect(str(path)) as connection:
        for sql, text in _CHANGES:
            connection.execute(sql, [text]).fetchall()
    return path


@pytest.fixture
def hostile(hostile_path: Path) -> Iterator[FeatureDB]:
    with FeatureDB.open(hostile_path) as opened:
        yield opened


@pytest.fixture
def some(db: FeatureDB) -> FeatureSet:
    """Three features, in no order."""
    return db.features([7, 3, 11])
