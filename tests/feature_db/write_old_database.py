"""Keep a small database as this version of the code writes it, for the versions to come.

    python -m tests.feature_db.write_old_database

Run it before a migration is added, and commit the file that it names: test_migrations.py opens the
files of all earlier versions, and fails for a version that has none.
"""

import lzma
from pathlib import Path
from tempfile import TemporaryDirectory

from feature_db import SCHEMA_VERSION, build_index
from sae import EvalConfig, evaluate

from .conftest import made_world, small_config

FOLDER = Path(__file__).with_name("written_by")
COMMAND = "python -m tests.feature_db.write_old_database"


def written_by(version: int) -> Path:
    """Where the database that schema `version` wrote is kept."""
    return FOLDER / f"v{version}.duckdb.xz"


def unpacked(version: int, path: Path) -> Path:
    """The database that schema `version` wrote, at `path`."""
    path.write_bytes(lzma.decompress(written_by(version).read_bytes()))
    return path


def main() -> None:
    """Index two SAEs, one of them evaluated, and keep the file."""
    with TemporaryDirectory() as name:
        world = made_world(Path(name))
        evaluated = world.sae.save(Path(name) / "evaluated")
        report = evaluate(world.sae, world.cache, config=EvalConfig(split="train", batch_size=64))
        report.write(evaluated / "report.json")
        saes = [evaluated, world.other]
        made = build_index(
            world.lm, saes, world.cache, out=Path(name) / "old.duckdb", config=small_config()
        )
        FOLDER.mkdir(exist_ok=True)
        kept = written_by(SCHEMA_VERSION)
        kept.write_bytes(lzma.compress(made.read_bytes(), preset=9))
    print(f"{kept}: {kept.stat().st_size:,} bytes; commit it")


if __name__ == "__main__":
    main()
