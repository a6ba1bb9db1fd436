"""Verbs that ask a feature database: query, search, show, active."""

import csv
import io
import json
from collections.abc import Iterator
from typing import Annotated, Literal

from cyclopts import Parameter

from feature_db import FeatureDB, Result, SqlLimits
from sae import SAE

from ..cli import app, console
from ..errors import PipelineError
from ..progress import StageProgress
from ..stages import model_of
from .arguments import DEFAULT_DATABASE, Database, Device, Dtype, Limit, Sae, SaeId


@app.command
def query(
    sql: Annotated[str, Parameter(help="One SQL statement.")],
    *,
    db: Database = DEFAULT_DATABASE,
    output: Annotated[
        Literal["table", "csv", "json"], Parameter(name=["--format"], help="How to print it.")
    ] = "table",
    untrusted: Annotated[
        bool,
        Parameter(negative=(), help="The SQL is another person's: one SELECT, locked and limited."),
    ] = False,
    limits: Annotated[SqlLimits, Parameter(name="*")] = SqlLimits(),  # noqa: B008
) -> None:
    """Ask SQL of the database, which can't be changed; other files can't be read or written.

    `SHOW TABLES` lists what there is. The limits are those of --untrusted.
    """
    if not sql.strip(" ;\n\t"):
        raise PipelineError("the SQL is empty: give one statement, such as SHOW TABLES")
    if limits != SqlLimits() and not untrusted:
        raise PipelineError(
            "--time-s, --memory-bytes and --result-bytes hold for untrusted SQL alone: add "
            "--untrusted, or leave them out"
        )
    with FeatureDB.open(db, external_access=False) as features:
        result = features.sql(sql, untrusted=untrusted, limits=limits if untrusted else None)
        if output == "table":
            console.print(result)
            return
        for line in plain_rows(result, output):
            console.file.write(line)


def plain_rows(result: Result, output: Literal["csv", "json"]) -> Iterator[str]:
    """A result as lines of CSV, or of JSON objects. Lists are JSON in both."""
    if output == "json":
        for row in result.arrow().to_pylist():
            yield json.dumps(row, ensure_ascii=False, default=str) + "\n"
        return
    line = io.StringIO()
    writer = csv.writer(line, lineterminator="\n")
    for values in (result.columns, *result.fetchall()):
        writer.writerow(
            json.dumps(v, ensure_ascii=False) if isinstance(v, list | tuple) else v for v in values
        )
        yield line.getvalue()
        line.seek(line.truncate(0))


@app.command
def search(
    text: Annotated[str, Parameter(help="Words or a phrase.")],
    *,
    db: Database = DEFAULT_DATABASE,
    limit: Limit = 20,
    regex: Annotated[
        bool, Parameter(negative=(), help="The text is a regular expression.")
    ] = False,
    meaning: Annotated[
        str | None,
        Parameter(help="Embedding model: by meaning, of the vectors that `saebase embed` kept."),
    ] = None,
) -> None:
    """Find features by the words in their labels, tokens and contexts, or by what these mean."""
    with FeatureDB.open(db) as features:
        console.print(features.search(text, limit=limit, regex=regex, meaning=meaning))


@app.command
def embed(
    model: Annotated[
        str, Parameter(help="Folder with an encoder, wordllama, or package:function.")
    ],
    *,
    db: Database = DEFAULT_DATABASE,
) -> None:
    """Keep what an embedding model makes of every feature, for `saebase search --meaning`."""
    with (
        FeatureDB.open(db, read_only=False) as features,
        StageProgress(console, "embed", "features") as progress,
    ):
        n = features.embed(model, progress.update)
    console.print(
        f"{n:,} features of {db}: vectors of {model} kept", highlight=False, soft_wrap=True
    )
    console.print(f'[dim]next:[/] saebase search "..." --meaning {model} --db {db}', soft_wrap=True)


@app.command
def show(
    feature: Annotated[int, Parameter(help="Feature id.")],
    *,
    db: Database = DEFAULT_DATABASE,
    sae_id: SaeId = None,
) -> None:
    """Show all that is known of one feature."""
    with FeatureDB.open(db) as features:
        console.print(features.feature(feature, sae_id))


@app.command
def active(
    text: Annotated[str, Parameter(help="The text to run the model on.")],
    *,
    sae: Sae,
    db: Database = DEFAULT_DATABASE,
    n: Annotated[int, Parameter(name=["--n"], help="Features to show for each token.")] = 3,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Show which features are active on each token of a text."""
    with FeatureDB.open(db) as features, console.status("running the model"):
        loaded = SAE.load(sae)
        lm = model_of(loaded, device, dtype)
        found = features.active(lm, loaded, text, n=n)
    console.print(found)
