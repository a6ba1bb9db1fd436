"""The verb that writes features in other formats: export."""

from pathlib import Path
from shlex import quote
from typing import Annotated

import pyarrow as pa
from cyclopts import Parameter

from feature_db import ExportProgress, FeatureDB, NeuronpediaNames, visible
from feature_db.bucketed import is_url
from feature_db.exchange import Format

from ..cli import app, console
from ..errors import PipelineError
from ..interruption import stop_asked
from ..progress import StageProgress
from .arguments import DEFAULT_DATABASE, Database, Place, SaeId

Pairs = list[tuple[int, int]]
_NEXT = {
    "labels": "saebase label --import {out} --db another.duckdb",
    "parquet": "python -c \"import duckdb; print(duckdb.sql('FROM {out}/features.parquet'))\"",
    "buckets": "saebase show 0 --db {out}",
    "html": "open {out} in a browser",
}


@app.command
def export(
    db: Database = DEFAULT_DATABASE,
    *,
    out: Annotated[
        Place,
        Parameter(
            help="Folder (parquet, neuronpedia), folder or URL (buckets) or file to make; .gz "
            "compresses."
        ),
    ],
    kind: Annotated[Format, Parameter(name=["--format"], help="What to write.")],
    features: Annotated[
        str | None, Parameter(help="SQL that gives feature_id; all features without it.")
    ] = None,
    feature: Annotated[
        list[int] | None, Parameter(help="One feature; say it again for more.", negative=())
    ] = None,
    sae_id: SaeId = None,
    overwrite: Annotated[
        bool, Parameter(negative=(), help="Replace what an earlier export wrote.")
    ] = False,
    names: Annotated[NeuronpediaNames, Parameter(name="*")] = NeuronpediaNames(),  # noqa: B008
) -> None:
    """Write features as Parquet, buckets, JSONL, CSV, labels, Neuronpedia's files or HTML.

    It is there whole or not at all. --sae-id alone exports one SAE of several.
    """
    is_named = kind == "neuronpedia" or names != NeuronpediaNames()
    with FeatureDB.open(db, external_access=False) as opened:
        chosen = _chosen(opened, features, feature, sae_id)
        with StageProgress(console, "export", "features") as progress, stop_asked() as should_stop:

            def show(p: ExportProgress) -> None:
                progress.update(p.n_done, p.n_total, unit=p.unit)
                if should_stop():
                    raise KeyboardInterrupt

            opened.export(
                out,
                kind,
                features=chosen,
                overwrite=overwrite,
                on_progress=show,
                neuronpedia=names if is_named else None,
            )
    _tell(out, kind)


def _chosen(
    db: FeatureDB, sql: str | None, ids: list[int] | None, sae_id: int | None
) -> Pairs | None:
    """(sae_id, feature_id) of the features meant; None for all."""
    if sql is not None and ids:
        raise PipelineError("--features SQL and --feature ID both choose features: give one")
    if sql is not None:
        return _of_sql(db, sql, sae_id)
    if ids:
        wanted = db.require_sae(sae_id)
        return [(wanted, feature_id) for feature_id in ids]
    if sae_id is None:
        return None
    wanted = db.require_sae(sae_id)
    rows = db.sql("SELECT feature_id FROM features WHERE sae_id = ? ORDER BY 1", [wanted])
    return [(wanted, feature_id) for (feature_id,) in rows]


def _of_sql(db: FeatureDB, sql: str, sae_id: int | None) -> Pairs:
    if not sql.strip(" ;\n\t"):
        raise PipelineError("--features is empty: give SQL such as SELECT feature_id FROM features")
    table = db.sql(sql).arrow()
    if sae_id is None:
        return list(db.features(table).ids)
    wanted = db.require_sae(sae_id)
    if "sae_id" not in table.column_names:
        table = table.append_column("sae_id", pa.array([wanted] * len(table), pa.int32()))
    return [pair for pair in db.features(table).ids if pair[0] == wanted]


def _tell(out: Place, kind: str) -> None:
    line = f"  {visible(out)}: {kind}"
    if not is_url(out):
        made = Path(out)
        files = [path for path in made.rglob("*") if path.is_file()] if made.is_dir() else [made]
        megabytes = sum(path.stat().st_size for path in files) / 1e6
        line += f", {megabytes:,.1f} MB" + (f" in {len(files)} files" if made.is_dir() else "")
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    if kind in _NEXT:
        console.print("[dim]next:[/] ", end="")
        command = visible(_NEXT[kind].format(out=quote(out)))
        console.print(command, highlight=False, markup=False, soft_wrap=True)
