"""export: features of a database, as files of another format."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from ..errors import ExportError
from ..feature_rows import Pair
from .buckets import write_buckets
from .chosen import Chosen, OnProgress
from .flat_csv import write_csv
from .json_lines import write_jsonl, write_labels
from .neuronpedia import write_neuronpedia
from .neuronpedia_names import NeuronpediaNames
from .parquet_folder import write_parquet
from .static_page import write_html

if TYPE_CHECKING:
    from ..database import FeatureDB

Format = Literal["parquet", "buckets", "jsonl", "csv", "labels", "neuronpedia", "html"]
FORMATS: tuple[str, ...] = get_args(Format)
_WRITERS: dict[str, Callable[[Chosen, Path, bool], None]] = {
    "parquet": write_parquet,
    "jsonl": write_jsonl,
    "csv": write_csv,
    "labels": write_labels,
    "html": write_html,
}


def export(
    db: "FeatureDB",
    out: str | Path,
    format: Format,  # noqa: A002
    features: Sequence[Pair] | None = None,
    *,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
    neuronpedia: NeuronpediaNames | None = None,
) -> Path | str:
    """Write features as `format`: docs/exchange.md has what is in each.

    out: a folder for parquet and neuronpedia, a folder or a URL for buckets, a file for the others,
        compressed if its name ends in .gz. It is there whole or not at all. features: (sae_id,
        feature_id) in the order wanted; None for all. overwrite: replace what an earlier export
        wrote.
    on_progress: called after every block; an exception that it raises ends the export, and nothing
        is left. neuronpedia: names there, for that format alone.
    Returns: `out`, which is no Path where it is a URL.
    Raises: ExportError for a path that is taken, an unknown format, or one that can't hold these
        features; NotFoundError for no feature, or unknown ones.
    """
    if format not in FORMATS:
        raise ExportError(f"unknown format {format!r}: expected one of {', '.join(FORMATS)}")
    if neuronpedia is not None and format != "neuronpedia":
        raise ExportError(f"names in Neuronpedia are for its format alone, not for {format}")
    chosen = Chosen.of(db, features, on_progress)
    if format == "buckets":
        write_buckets(chosen, out, overwrite)
        return out
    if format == "neuronpedia":
        write_neuronpedia(chosen, Path(out), overwrite, neuronpedia or NeuronpediaNames())
    else:
        _WRITERS[format](chosen, Path(out), overwrite)
    return Path(out)
