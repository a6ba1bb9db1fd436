"""Building: the whole database or nothing, and inputs that don't belong together."""

import fcntl
import json
import shutil
from pathlib import Path

import duckdb
import pytest
import torch

from feature_db import (
    DatabaseExistsError,
    FeatureDB,
    IndexingError,
    IndexProgress,
    build_index,
)
from feature_db.words import write_words
from sae import SAE, BatchTopKConfig, EvalConfig, Origin, StorageError, TopKConfig, evaluate

from .conftest import HOOKPOINT, World, random_sae, small_config, tiny_lm


def build(world: World, out: Path, **options: object) -> Path:
    given = {"config": small_config(), **options}
    return build_index(world.lm, [world.sae], world.cache, out=out, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "step",
    [
        "feature_db.build.commit",
        "feature_db.build.sae_row",
        "feature_db.indexing.collect.write_counts",
    ],
)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failed_build_leaves_whole_parts_alone(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    error: type[BaseException],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("fault")

    monkeypatch.setattr(step, fail)
    with pytest.raises(error):
        build(world, tmp_path / "x.duckdb")
    (left,) = tmp_path.iterdir()
    assert left.name == "x.duckdb.parts"
    assert list(left.glob("*/*.building")) == []
    assert len(list(left.glob("*/*/part.json"))) == len(list(left.glob("*/*/")))


def test_failed_overwrite_leaves_the_old_database(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build(world, tmp_path / "x.duckdb")
    before = path.read_bytes()

    def fail(_: object) -> None:
        raise OSError("fault")

    monkeypatch.setattr("sae.atomic_files.fsync", fail)
    with pytest.raises(StorageError, match="fault"):
        build(world, path, config=small_config(n_top=3), overwrite=True)
    assert path.read_bytes() == before
    assert {each.name for each in tmp_path.iterdir()} == {"x.duckdb", "x.duckdb.parts"}


def test_what_a_killed_build_left_is_swept(world: World, tmp_path: Path) -> None:
    left = tmp_path / "x.duckdb.building"
    (left / "some").mkdir(parents=True)
    (left / "features.duckdb").write_bytes(b"torn")
    (left / "tokens.bin").write_bytes(b"1234")
    path = build(world, tmp_path / "x.duckdb")
    assert {each.name for each in tmp_path.iterdir()} == {"x.duckdb", "x.duckdb.parts"}
    FeatureDB.open(path).close()


def test_same_things_again_return_at_once(world: World, tmp_path: Path) -> None:
    told: list[IndexProgress] = []
    path = build(world, tmp_path / "x.duckdb", on_progress=told.append)
    assert {each.stage for each in told} == {"activations", "features", "documents"}
    assert all(each.done <= each.total for each in told)
    assert told[-1].done == told[-1].total
    stat = path.stat()
    told.clear()
    again = build(world, path, config=small_config(chunk_rows=77), on_progress=told.append)
    assert (again, told) == (path, [])
    assert path.stat().st_mtime_ns == stat.st_mtime_ns


def test_another_database_is_replaced_only_when_asked(world: World, tmp_path: Path) -> None:
    path = build(world, tmp_path / "x.duckdb")
    with pytest.raises(DatabaseExistsError, match="overwrite=True"):
        build(world, path, config=small_config(n_top=2))
    build(world, path, config=small_config(n_top=2), overwrite=True)
    with FeatureDB.open(path) as db:
        assert db.sql("SELECT max(rank) FROM contexts WHERE kind = 'top'").fetchall() == [(2,)]


def test_a_foreign_file_is_not_overwritten(world: World, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(DatabaseExistsError, match=r"notes\.txt"):
        build(world, path)
    assert path.read_text() == "mine"


def test_second_builder_is_told_who_builds(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "x.duckdb.building"
    folder.mkdir()
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 4711")
        lock.flush()
        with pytest.raises(IndexingError, match="being built by process 4711"):
            build(world, tmp_path / "x.duckdb")
    assert folder.exists()


def test_unwritable_place_is_a_one_line_error(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(IndexingError, match="choose another out"):
        build(world, tmp_path / "file" / "x.duckdb")


def test_no_sae_is_an_error(world: World, tmp_path: Path) -> None:
    with pytest.raises(IndexingError, match="at least one"):
        build_index(world.lm, [], world.cache, out=tmp_path / "x")


def test_one_sae_twice_is_an_error(world: World, tmp_path: Path) -> None:
    with pytest.raises(IndexingError, match="twice"):
        build_index(world.lm, [world.sae, world.sae], world.cache, out=tmp_path / "x")


def test_another_model_is_an_error(world: World, tmp_path: Path) -> None:
    with pytest.raises(IndexingError, match=r"tiny-5.*tiny-0") as caught:
        build_index(tiny_lm(5), [world.sae], world.cache, out=tmp_path / "x")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_sae_of_another_model_is_an_error(world: World, tmp_path: Path) -> None:
    sae = random_sae(world.sae.config, 0, world.cache)
    other = {**world.cache.provenance(HOOKPOINT), "model": "gpt9", "model_revision": "r9"}
    sae.origin = Origin(hookpoint=HOOKPOINT, provenance=other)
    with pytest.raises(IndexingError, match=r"trained on gpt9 \(revision r9\)"):
        build_index(world.lm, [sae], world.cache, out=tmp_path / "x")


def test_an_unknown_hookpoint_is_an_error(world: World, tmp_path: Path) -> None:
    sae = SAE(TopKConfig(d_sae=8, k=2), 16, Origin(hookpoint="layers.0.mlp_out"))
    with pytest.raises(IndexingError, match=r"layers\.0\.mlp_out.*holds layers\.1\.resid_post"):
        build_index(world.lm, [sae], world.cache, out=tmp_path / "x")


def test_another_width_is_an_error(world: World, tmp_path: Path) -> None:
    sae = SAE(TopKConfig(d_sae=8, k=2), 24, Origin(hookpoint=HOOKPOINT))
    with pytest.raises(IndexingError, match=r"d_model=16.*expects 24"):
        build_index(world.lm, [sae], world.cache, out=tmp_path / "x")


def test_an_sae_without_a_hookpoint_takes_the_caches_only_one(world: World, tmp_path: Path) -> None:
    sae = random_sae(BatchTopKConfig(d_sae=8, k=2), 3, world.cache)
    sae.origin = Origin()
    path = build_index(world.lm, [sae], world.cache, out=tmp_path / "x", config=small_config())
    with FeatureDB.open(path) as db:
        assert db.sql("SELECT hookpoint FROM saes").fetchall() == [(HOOKPOINT,)]


def test_a_folder_gives_its_name(world: World, tmp_path: Path) -> None:
    folder = world.sae.save(tmp_path / "my-run")
    path = build_index(world.lm, [folder], world.cache, out=tmp_path / "x", config=small_config())
    with FeatureDB.open(path) as db:
        assert db.sql("SELECT name, fvu FROM saes").fetchall() == [("my-run", None)]


def test_every_figure_of_the_report_stands_in_the_database(world: World, tmp_path: Path) -> None:
    folder = world.sae.save(tmp_path / "run")
    # These SAEs were never trained: all rows may serve.
    report = evaluate(world.sae, world.cache, config=EvalConfig(split="train", batch_size=64))
    report.write(folder / "report.json")
    path = build_index(
        world.lm, [folder, world.other], world.cache, out=tmp_path / "x", config=small_config()
    )
    with FeatureDB.open(path) as db:
        rows = db.sql("SELECT name, value, definition FROM metrics WHERE sae_id = 0").fetchall()
        assert sorted(rows) == sorted(tuple(figure) for figure in report.figures())
        assert db.sql("SELECT count(*) FROM metrics WHERE sae_id = 1").fetchall() == [(0,)]
        fvu = "SELECT value = fvu FROM metrics m JOIN saes USING (sae_id) WHERE m.name = "
        assert db.sql(fvu + "'reconstruction.fvu'").fetchall() == [(True,)]


def test_a_broken_report_is_an_error(world: World, tmp_path: Path) -> None:
    folder = world.sae.save(tmp_path / "run")
    (folder / "report.json").write_text("{}")
    with pytest.raises(IndexingError, match=r"report\.json is no evaluation report"):
        build_index(world.lm, [folder], world.cache, out=tmp_path / "x")


def test_an_sae_that_never_fires_is_indexed(world: World, tmp_path: Path) -> None:
    sae = random_sae(TopKConfig(d_sae=8, k=2), 0, world.cache)
    sae.b_enc.fill_(-1e6)
    torch.nn.init.zeros_(sae.W_enc_rows)
    path = build_index(world.lm, [sae], world.cache, out=tmp_path / "x", config=small_config())
    with FeatureDB.open(path) as db:
        assert db.sql("SELECT sum(is_dead::INTEGER) FROM features").fetchall() == [(8,)]
        assert db.feature(0).top == ()


def test_documents_can_be_left_out(world: World, tmp_path: Path) -> None:
    path = build(world, tmp_path / "x", config=small_config(keep_documents=False))
    with FeatureDB.open(path) as db:
        assert db.sql("SELECT count(*) FROM documents").fetchall() == [(0,)]


def test_the_database_says_what_made_it(world: World) -> None:
    with duckdb.connect(str(world.path), read_only=True) as connection:
        meta = dict(connection.execute("SELECT key, value FROM meta").fetchall())
    assert meta["cache_fingerprint"] == world.cache.fingerprint_hash
    assert json.loads(meta["config"])["n_top"] == 6


def test_words_in_ranges_are_those_at_once(world: World, tmp_path: Path) -> None:
    path = shutil.copy(world.path, tmp_path / "db.duckdb")
    with duckdb.connect(str(path)) as connection:
        at_once = connection.execute("FROM words").fetchall()
        write_words(connection, at_once=10)
        assert connection.execute("FROM words").fetchall() == at_once
        assert len(at_once) > 100
