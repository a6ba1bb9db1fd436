"""A database of two SAEs with labels of people, in one file, in a folder of buckets and at S3."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from feature_db import FeatureDB, build_index
from feature_db.bucketed.layout import FEATURES_A_GROUP, Rows
from feature_db.exchange import bucket_files
from sae import TopKConfig
from tests.feature_db.conftest import World, random_sae, small_config
from tests.s3_server import Server


def small_buckets(patch: pytest.MonkeyPatch, n_features: int = 16, n_rows: int = 500) -> None:
    """So that a small database has many files and groups."""
    patch.setattr(bucket_files, "FEATURES_A_FILE", n_features)
    patch.setattr(bucket_files, "_FEATURES_AT_ONCE", max(n_features // 2, 1))
    patch.setattr(bucket_files, "WORD_ROWS", Rows(n_rows, max(n_rows // 7, 1)))
    patch.setattr(bucket_files, "DOCUMENT_ROWS", Rows(5, 2))
    for table in FEATURES_A_GROUP:
        patch.setitem(FEATURES_A_GROUP, table, max(n_features // 5, 1))


@pytest.fixture(scope="session")
def both_path(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file. Its words are out of order, as labels leave them."""
    path = tmp_path_factory.mktemp("both") / "both.duckdb"
    saes = [world.sae, random_sae(TopKConfig(d_sae=20, k=3), 5, world.cache)]
    build_index(world.lm, saes, world.cache, out=path, config=small_config())
    with FeatureDB.open(path, read_only=False) as db:
        db.label(3, "judges of the golden gate", 0)
        db.label(40, "日本 and a zebra's </script>", 0)
        db.label(19, "aardvarks", 1)
        assert len(db.sql("SELECT * FROM similar_features LIMIT 1"))
    return path


@pytest.fixture(scope="session")
def folder(both_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Buckets of it. Leave them as they are."""
    out = tmp_path_factory.mktemp("buckets") / "both"
    with pytest.MonkeyPatch.context() as patch, FeatureDB.open(both_path) as db:
        small_buckets(patch)
        db.export(out, "buckets")
    return out


@pytest.fixture
def url(server: Server, bucket: str, blocks: Path, folder: Path) -> str:
    """The same buckets at S3, and nothing of them on this machine."""
    for path in folder.rglob("*"):
        if path.is_file():
            name = path.relative_to(folder)
            server.client.put_object(Bucket=bucket, Key=f"db/both/{name}", Body=path.read_bytes())
    server.asked.clear()
    return f"s3://{bucket}/db/both"


@pytest.fixture
def one(both_path: Path) -> Iterator[FeatureDB]:
    with FeatureDB.open(both_path) as db:
        yield db


@pytest.fixture(params=["folder", "s3"])
def buckets(request: pytest.FixtureRequest) -> Iterator[FeatureDB]:
    """The buckets opened, in a folder and at S3."""
    place = request.getfixturevalue("folder" if request.param == "folder" else "url")
    with FeatureDB.open(place) as db:
        yield db
