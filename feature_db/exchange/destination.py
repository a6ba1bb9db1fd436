"""Where an export lands: written aside under a lock, fsynced, renamed. All of it, or nothing.

In: a path that is free, or that an earlier export made. Out: what to write to meanwhile, and the
whole file or folder under its name at the end.
"""

import fcntl
import gzip
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from sae import StorageError
from sae.atomic_files import commit, fsync

from ..errors import ExportError

MANIFEST = "manifest.json"
MADE_BY = "saebase export"
_GZIP_LEVEL = 5


@contextmanager
def new_file(out: Path, *, overwrite: bool) -> Iterator[IO[bytes]]:
    """A file to write to, which is `out` once the context closes without an error.

    Compressed where the name ends in .gz; the same content gives the same bytes.
    Raises: ExportError if `out` is taken, is being written elsewhere, or the disk refuses.
    """
    out = out.resolve()
    with _told(out):
        _require_free(out, overwrite, is_folder=False)
        aside = _aside(out)
        with _locked(aside), _removed_at_error(aside):
            with opened(aside, is_compressed=out.suffix == ".gz") as file:
                yield file
            commit(aside, out)


@contextmanager
def new_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to fill, which is `out` once the context closes without an error.

    Its files are written with `opened`, its manifest with `write_manifest`.
    Raises: ExportError as `new_file`, and if `out` is a folder that no export made.
    """
    out = out.resolve()
    with _told(out):
        _require_free(out, overwrite, is_folder=True)
        aside = _aside(out)
        aside.mkdir(exist_ok=True)
        with _locked(aside), _removed_at_error(aside):
            _empty(aside)
            yield aside
            _commit_folder(aside, out)


@contextmanager
def opened(path: Path, *, is_compressed: bool = False) -> Iterator[IO[bytes]]:
    """A new file, which is on disk when the context closes."""
    with path.open("wb") as raw:
        if is_compressed:
            with gzip.GzipFile("", "wb", _GZIP_LEVEL, fileobj=raw, mtime=0) as file:
                yield cast(IO[bytes], file)
        else:
            yield raw
    fsync(path)


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write what a folder holds; by its manifest an export is known as one."""
    with opened(folder / MANIFEST) as file:
        file.write(manifest_text(content))


def manifest_text(content: dict[str, Any]) -> bytes:
    """A manifest as it is written."""
    text = json.dumps({"made_by": MADE_BY, **content}, indent=1, allow_nan=False)
    return f"{text}\n".encode()


def is_export(manifest: bytes) -> bool:
    """Whether a manifest is of an export."""
    try:
        found = json.loads(manifest)
    except ValueError:
        return False
    return isinstance(found, dict) and found.get("made_by") == MADE_BY


def _aside(out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.with_name(f".{out.name}.tmp")


def _require_free(out: Path, overwrite: bool, *, is_folder: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise ExportError(f"{out} exists: choose another path, or overwrite it (--overwrite)")
    if out.is_dir() != is_folder:
        there, made = ("a folder", "a file") if out.is_dir() else ("a file", "a folder")
        raise ExportError(f"{out} is {there}, this format makes {made}: choose another path")
    if is_folder and any(out.iterdir()) and not _is_export(out):
        raise ExportError(
            f"{out} is a folder that no export made, so it isn't overwritten: choose another path"
        )


def _is_export(folder: Path) -> bool:
    try:
        return is_export((folder / MANIFEST).read_bytes())
    except OSError:
        return False


def _commit_folder(aside: Path, out: Path) -> None:
    for folder, _, _ in os.walk(aside):
        fsync(Path(folder))
    old = out.with_name(f".{out.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if out.exists():
        out.rename(old)  # nothing is renamed onto a folder that holds something
    try:
        commit(aside, out)
    except BaseException:
        if old.exists():
            old.rename(out)
        raise
    if old.exists():
        shutil.rmtree(old)


def _empty(folder: Path) -> None:
    """Remove what a killed export left."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


@contextmanager
def _removed_at_error(aside: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)
        raise


@contextmanager
def _locked(aside: Path) -> Iterator[None]:
    """Hold the lock that a file or folder is, which a dead process gives up."""
    if not aside.is_dir():
        aside.touch()
    descriptor = os.open(aside, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ExportError(f"{aside} is being written by another export: wait for it") from None
    finally:
        os.close(descriptor)


@contextmanager
def _told(out: Path) -> Iterator[None]:
    """Tell in one line what the system has against writing."""
    try:
        yield
    except (OSError, StorageError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ExportError(
            f"{out}: {reason or error}; make room or choose another path, and export again"
        ) from error
