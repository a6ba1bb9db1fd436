"""Parts: a text counted apart, in any order and twice, gives the same database; what is there is
not counted again."""

import datetime
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from activation_cache import ActivationCache, harvest
from feature_db import FeatureDB, IndexingError, build_index, index_parts

from .conftest import HOOKPOINT, World, small_config, texts

THEN = datetime.datetime(2026, 1, 1)


def content(path: Path) -> str:
    with FeatureDB.open(path) as db:
        return db.content_hash()


def stamps(parts: Path) -> dict[str, int]:
    """When each part was made."""
    return {
        str(path.relative_to(parts)): path.stat().st_mtime_ns
        for path in parts.glob("*/*/part.json")
    }


def test_parts_counted_apart_in_any_order_and_twice_give_the_same_database(
    world: World, tmp_path: Path
) -> None:
    given, config = (world.lm, [world.sae, world.other], world.cache), small_config()
    whole = build_index(*given, out=tmp_path / "a.duckdb", config=config, created_at=THEN)
    for folder, rank in (("p2", 2), ("p0", 0), ("p1", 1), ("again", 0)):
        index_parts(*given, out=tmp_path / folder, config=config, rank=rank, world_size=3)
    elsewhere = [tmp_path / name for name in ("p2", "again", "p1", "p0")]
    merged = build_index(
        *given, out=tmp_path / "b.duckdb", config=config, parts=elsewhere, created_at=THEN
    )
    for path in (tmp_path / "again").glob("*/*/*"):
        assert (
            path.read_bytes()
            == (tmp_path / "p0" / path.relative_to(tmp_path / "again")).read_bytes()
        )
    assert not list((tmp_path / "b.duckdb.parts").glob("*/*/part.json"))
    assert content(merged) == content(whole)


def test_one_part_missing_elsewhere_is_counted_here(world: World, tmp_path: Path) -> None:
    given = (world.lm, [world.sae], world.cache)
    folder = index_parts(*given, out=tmp_path / "p", config=small_config())
    n_parts = len(list(folder.glob("*/")))
    assert n_parts >= 3
    shutil.rmtree(sorted(folder.glob("*/"))[1])
    build_index(*given, out=tmp_path / "a", config=small_config(), parts=[folder])
    assert len(list((tmp_path / "a.parts").glob("*/*/part.json"))) == 1


def test_more_tokens_later_cost_only_what_is_new(world: World, tmp_path: Path) -> None:
    def cache(n_tokens: int) -> ActivationCache:
        return harvest(
            world.lm,
            texts(),
            hookpoints=[HOOKPOINT],
            out=tmp_path / "acts",
            n_tokens=n_tokens,
            ctx_len=64,
            prepend_bos=True,
            storage_dtype="float32",
            shard_bytes=20_000,
        )

    out, config = tmp_path / "a.duckdb", small_config()
    build_index(world.lm, [world.sae], cache(900), out=out, config=config)
    before = stamps(tmp_path / "a.duckdb.parts")
    longer = cache(1500)
    build_index(world.lm, [world.sae], longer, out=out, config=config, created_at=THEN)
    after = stamps(tmp_path / "a.duckdb.parts")
    assert before.items() < after.items()
    with FeatureDB.open(out) as db:
        ((n,),) = db.sql("SELECT n_tokens_indexed + n_tokens_skipped FROM saes").fetchall()
        assert n == longer.n_tokens


def test_another_sae_later_leaves_the_first_ones_parts(world: World, tmp_path: Path) -> None:
    out, config = tmp_path / "a.duckdb", small_config()
    build_index(world.lm, [world.sae], world.cache, out=out, config=config)
    before = stamps(tmp_path / "a.duckdb.parts")
    both = [world.sae, world.other]
    build_index(world.lm, both, world.cache, out=out, config=config, created_at=THEN)
    assert before.items() < stamps(tmp_path / "a.duckdb.parts").items()
    fresh = tmp_path / "b.duckdb"
    build_index(world.lm, both, world.cache, out=fresh, config=config, created_at=THEN)
    assert content(out) == content(fresh)


@pytest.mark.parametrize("table", ["contexts", "totals", "companions"])
def test_a_damaged_part_is_named(world: World, tmp_path: Path, table: str) -> None:
    folder = index_parts(
        world.lm, [world.sae], world.cache, out=tmp_path / "p", config=small_config()
    )
    path = sorted(folder.glob(f"*/*/{table}.parquet"))[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(IndexingError, match=rf"{table}\.parquet is damaged.*index again"):
        build_index(
            world.lm,
            [world.sae],
            world.cache,
            out=tmp_path / "a",
            config=small_config(),
            parts=[folder],
        )
    assert not (tmp_path / "a").exists()


def test_parts_of_other_settings_are_refused(world: World, tmp_path: Path) -> None:
    given = (world.lm, [world.sae], world.cache)
    folder = index_parts(*given, out=tmp_path / "p", config=small_config())
    with pytest.raises(IndexingError, match=r"counted with n_top=6, now n_top=7"):
        build_index(*given, out=tmp_path / "a", config=small_config(n_top=7), parts=[folder])


def test_a_killed_build_goes_on_after_its_last_whole_part(world: World, tmp_path: Path) -> None:
    """Killed when the third part is being counted."""
    script = tmp_path / "build.py"
    script.write_text(_KILLED)
    sae, acts = world.sae.save(tmp_path / "sae"), world.cache.path
    arguments = [str(sae), str(acts), str(tmp_path / "a.duckdb")]
    done = subprocess.run(
        [sys.executable, script, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=100,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "a.duckdb").exists()
    before = stamps(tmp_path / "a.duckdb.parts")
    assert len(before) == 2
    given, config = (world.lm, [sae], world.cache), small_config()
    path = build_index(*given, out=tmp_path / "a.duckdb", config=config, created_at=THEN)
    assert before.items() < stamps(tmp_path / "a.duckdb.parts").items()
    fresh = build_index(*given, out=tmp_path / "b.duckdb", config=config, created_at=THEN)
    assert content(path) == content(fresh)


_KILLED = """
import os, signal, sys
from activation_cache import ActivationCache
from feature_db import build_index
from feature_db.indexing import collect
from tests.feature_db.conftest import small_config, tiny_lm

whole, n = collect.write_counts, 0

def counts(*args):
    global n
    n += 1
    if n == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    whole(*args)

collect.write_counts = counts
sae, acts, out = sys.argv[1:]
build_index(tiny_lm(), [sae], ActivationCache.open(acts), out=out, config=small_config())
"""
