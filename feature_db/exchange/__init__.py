"""A database -> files that others read: tables, lines, pages, Neuronpedia's layout.

    export(db, "l6-tables", "parquet")              a folder with a Parquet file for each table
    export(db, "l6.jsonl.gz", "jsonl")              a feature a line, with all that its page shows
    export(db, "l6.csv", "csv")                     a feature a line, flat
    export(db, "l6.html", "html", ids)              a page of chosen features by itself
    export(db, "l6-neuronpedia", "neuronpedia")     {model}/{source}/... as Neuronpedia imports it

Whatever is made is made aside and renamed: it is there whole or not at all.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sae.atomic_files import commit

from ..errors import ExportError
from .lines import write_csv, write_jsonl
from .neuronpedia import write_neuronpedia
from .page import write_page
from .tables import write_tables

if TYPE_CHECKING:
    from ..database import FeatureDB

Pair = tuple[int, int]
OnExported = Callable[[int, int], None]

_WRITERS = {
    "parquet": write_tables,
    "jsonl": write_jsonl,
    "csv": write_csv,
    "html": write_page,
    "neuronpedia": write_neuronpedia,
}
FORMATS = tuple(_WRITERS)
# A page of more is of use to nobody.
_MOST_ON_A_PAGE = 2_000


def export(
    db: "FeatureDB",
    out: str | Path,
    format: str,  # noqa: A002  (that is what it is)
    features: Sequence[Pair] | None = None,
    *,
    overwrite: bool = False,
    on_exported: OnExported | None = None,
) -> Path:
    """Write features of a database. features: (sae_id, feature_id) in the order wanted; None: all.

    on_exported: told how many of how many features are written.
    Returns: out. Raises: ExportError for an unknown format, or if `out` is there and overwriting
        wasn't asked for.
    """
    path = Path(out)
    if format not in _WRITERS:
        raise ExportError(f"format {format!r}: expected one of {', '.join(FORMATS)}")
    if path.exists() and not overwrite:
        raise ExportError(f"{path} exists: pass overwrite=True to replace it, or another out")
    ids = list(dict.fromkeys(features)) if features is not None else _all(db)
    if format == "html" and len(ids) > _MOST_ON_A_PAGE:
        raise ExportError(
            f"{len(ids):,} features on one page: choose {_MOST_ON_A_PAGE:,} at most, or take "
            "format jsonl"
        )
    aside = path.with_name(f"{path.name}.writing")
    _remove(aside)
    try:
        aside.parent.mkdir(parents=True, exist_ok=True)
        _WRITERS[format](db, aside, ids, on_exported or (lambda done, total: None))  # noqa: ARG005
        _remove(path)
        commit(aside, path)
    except OSError as error:
        raise ExportError(
            f"can't write {path}: {error.strerror or error}; choose another"
        ) from None
    finally:
        _remove(aside)
    return path


def _all(db: "FeatureDB") -> list[Pair]:
    return db.sql("SELECT sae_id, feature_id FROM features ORDER BY ALL").fetchall()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
