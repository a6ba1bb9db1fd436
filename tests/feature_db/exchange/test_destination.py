"""Where an export lands: whole or not at all, and nothing of anybody's is lost."""

import fcntl
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from feature_db import ExportError, ExportProgress, FeatureDB, FeatureSet, NotFoundError, export
from feature_db.exchange import Format

FOLDERS: list[Format] = ["parquet", "neuronpedia"]
ALL: list[Format] = ["jsonl", "csv", "html", *FOLDERS]


def there(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def stop(_: ExportProgress) -> None:
    raise KeyboardInterrupt


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """The kernel refuses to write beyond n_bytes of a file, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("kind", ALL)
def test_what_is_there_is_kept_unless_asked(
    db: FeatureDB, some: FeatureSet, tmp_path: Path, kind: Format
) -> None:
    out = some.export(tmp_path / "out", kind)
    before = there(tmp_path)
    with pytest.raises(ExportError, match="exists: choose another path"):
        db.export(out, kind)
    assert there(tmp_path) == before
    db.features([1]).export(out, kind, overwrite=True)
    assert there(tmp_path) != before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ALL)
def test_an_export_that_is_stopped_leaves_nothing_and_takes_nothing(
    some: FeatureSet, tmp_path: Path, kind: Format
) -> None:
    with pytest.raises(KeyboardInterrupt):
        some.export(tmp_path / "out", kind, on_progress=stop)
    assert list(tmp_path.iterdir()) == []
    some.export(tmp_path / "out", kind)
    before = there(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        some.export(tmp_path / "out", kind, overwrite=True, on_progress=stop)
    assert there(tmp_path) == before


@pytest.mark.parametrize("kind", ALL)
def test_a_full_disk_is_told_in_one_line_and_leaves_nothing(
    db: FeatureDB, tmp_path: Path, kind: Format
) -> None:
    with largest_file(500), pytest.raises(ExportError, match="make room") as told:
        db.export(tmp_path / "out", kind)
    assert "\n" not in str(told.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ALL)
def test_what_a_killed_export_left_does_no_harm(
    some: FeatureSet, tmp_path: Path, kind: Format
) -> None:
    left = tmp_path / "after" / ".out.tmp"
    if kind in FOLDERS:
        (left / "deep").mkdir(parents=True)
        (left / "deep" / "features.parquet").write_bytes(b"half")
    else:
        left.parent.mkdir()
        left.write_bytes(b"half" * 1_000_000)
    some.export(tmp_path / "after" / "out", kind)
    some.export(tmp_path / "clean" / "out", kind)
    assert there(tmp_path / "after") == there(tmp_path / "clean")


def test_a_folder_that_no_export_made_is_never_overwritten(
    some: FeatureSet, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("ten years of work")
    with pytest.raises(ExportError, match="no export made"):
        some.export(home, "parquet", overwrite=True)
    (home / "manifest.json").write_text('{"made_by": "somebody"}')
    with pytest.raises(ExportError, match="no export made"):
        some.export(home, "neuronpedia", overwrite=True)
    assert (home / "thesis.tex").read_text() == "ten years of work"


def test_a_file_is_not_replaced_by_a_folder_nor_a_folder_by_a_file(
    some: FeatureSet, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ExportError, match="is a file, this format makes a folder"):
        some.export(tmp_path / "file", "parquet", overwrite=True)
    with pytest.raises(ExportError, match="is a folder, this format makes a file"):
        some.export(tmp_path / "folder", "csv", overwrite=True)


@pytest.mark.parametrize("kind", ALL)
def test_two_exports_to_one_path_do_not_mix(some: FeatureSet, tmp_path: Path, kind: Format) -> None:
    aside = tmp_path / ".out.tmp"
    if kind in FOLDERS:
        aside.mkdir()
    else:
        aside.touch()
    descriptor = os.open(aside, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(ExportError, match="being written by another export"):
            some.export(tmp_path / "out", kind)
        assert aside.exists()
    finally:
        os.close(descriptor)
    some.export(tmp_path / "out", kind)


def test_a_place_inside_a_file_is_told(some: FeatureSet, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match="choose another path"):
        some.export(tmp_path / "file" / "inside.csv", "csv")


@pytest.mark.parametrize("kind", ALL)
def test_progress_reaches_the_end(db: FeatureDB, tmp_path: Path, kind: Format) -> None:
    told: list[ExportProgress] = []
    db.export(tmp_path / "out", kind, on_progress=told.append)
    assert told[-1].n_done == told[-1].n_total > 0
    assert [p.n_done for p in told] == sorted(p.n_done for p in told)


def test_what_cannot_be_exported_is_refused(db: FeatureDB, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="unknown format 'xml': expected one of parquet"):
        db.export(tmp_path / "x", "xml")  # type: ignore[arg-type]
    with pytest.raises(NotFoundError, match="no feature 99 in SAE 0"):
        export(db, tmp_path / "x", "csv", [(0, 99)])
    with pytest.raises(NotFoundError, match="nothing to export"):
        db.sql("SELECT feature_id FROM features LIMIT 0").features().export(tmp_path / "x", "csv")
    assert list(tmp_path.iterdir()) == []


def test_a_database_without_access_to_files_exports_too(db: FeatureDB, tmp_path: Path) -> None:
    free = there(db.export(tmp_path / "free", "parquet"))
    with FeatureDB.open(db.path, external_access=False) as locked:
        assert there(locked.export(tmp_path / "locked", "parquet")) == free
