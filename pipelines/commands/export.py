"""`saebase export`: features of a database, in the formats that others read."""

from pathlib import Path
from shlex import quote
from typing import Annotated

from cyclopts import Parameter

from feature_db import FeatureDB
from feature_db.exchange import FORMATS
from feature_db.exchange import export as export_features

from ..cli import app, console
from ..errors import PipelineError
from ..progress import StageProgress
from .arguments import DEFAULT_DATABASE, Database, Local, SaeId


@app.command
def export(
    *,
    out: Annotated[Local, Parameter(help="File or folder to write.")],
    format: Annotated[  # noqa: A002
        str, Parameter(help=f"One of {', '.join(FORMATS)}.")
    ],
    db: Database = DEFAULT_DATABASE,
    feature: Annotated[
        list[int] | None, Parameter(negative=(), consume_multiple=True, help="Feature ids.")
    ] = None,
    features: Annotated[
        str | None, Parameter(help="SQL that gives feature_id, and sae_id where there are several.")
    ] = None,
    sae_id: SaeId = None,
    overwrite: Annotated[bool, Parameter(negative=(), help="Replace what is there.")] = False,
) -> None:
    """Write features as Parquet, JSONL, CSV, one HTML page, or in Neuronpedia's layout.

    All of them, unless --feature or --features says which.
    """
    if feature and features:
        raise PipelineError("--feature and --features: say which features in one way")
    with FeatureDB.open(db) as opened, StageProgress(console, "export", "features") as progress:
        ids: list[tuple[int, int]] | None = None
        if features:
            ids = list(opened.sql(features).features().ids)
        elif feature:
            number = opened.require_sae(sae_id)
            table = opened.sql(
                "SELECT unnest(?::INTEGER[]) AS feature_id, ? AS sae_id", [feature, number]
            )
            ids = list(table.features().ids)
        elif sae_id is not None:
            sql = "SELECT sae_id, feature_id FROM features WHERE sae_id = ? ORDER BY ALL"
            ids = opened.sql(sql, [opened.require_sae(sae_id)]).fetchall()
        made = export_features(
            opened, out, format, ids, overwrite=overwrite, on_exported=progress.update
        )
    console.print(f"{quote(str(made))}: {_size(made) / 1e6:,.1f} MB", highlight=False)


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
