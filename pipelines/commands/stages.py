"""Verbs that make artifacts one by one: harvest, evaluate, index, verify."""

from pathlib import Path
from shlex import quote
from typing import Annotated

from cyclopts import Parameter

from activation_cache import ActivationCache, HarvestConfig
from activation_cache.loading import RANDOM_WEIGHTS
from feature_db import IndexConfig
from sae import EvalConfig

from .. import stages
from ..baseline_runs import BaselineRun
from ..cli import app, console
from ..ranks import place_among_ranks
from .arguments import (
    DEFAULT_ACTS,
    DEFAULT_DATABASE,
    Acts,
    Device,
    Dtype,
    Local,
    Model,
    Place,
    Sae,
)

Fields = Parameter(name="*")
Rank = Annotated[
    int | None, Parameter(help="Of several processes, which this is; RANK or srun say so.")
]
WorldSize = Annotated[int | None, Parameter(help="How many processes; WORLD_SIZE or srun say so.")]


@app.command
def harvest(
    *,
    model: Model,
    dataset: Annotated[
        str, Parameter(help="Hub dataset, .jsonl, .txt or .parquet file, folder, or demo.")
    ],
    hookpoints: Annotated[
        list[str],
        Parameter(consume_multiple=True, negative=(), help="Places, such as layers.6.resid_post."),
    ],
    out: Annotated[
        Place, Parameter(help="Folder or URL (s3://bucket/acts) to write to, or to go on in.")
    ] = DEFAULT_ACTS,
    extend: Annotated[
        bool, Parameter(negative=(), help="Add this text to the cache, behind what is there.")
    ] = False,
    repair: Annotated[
        bool, Parameter(negative=(), help="Read it all first; make damaged shards again.")
    ] = False,
    random_weights: Annotated[
        int | None,
        Parameter(help="Seed: an untrained model of this configuration instead, for a baseline."),
    ] = None,
    rank: Rank = None,
    world_size: WorldSize = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    settings: Annotated[HarvestConfig, Fields] = HarvestConfig(),  # noqa: B008
) -> None:
    """Store a model's activations over a text on disk.

    Called again it goes on where it was; with a larger --n-tokens it adds to a finished cache.
    """
    if random_weights is not None:
        model = f"{model}{RANDOM_WEIGHTS}{random_weights}"
    load_lm = stages.model_loader(model, device, dtype, console)
    ranks = place_among_ranks(rank, world_size)
    cache = stages.harvest_stage(
        console,
        load_lm,
        dataset,
        hookpoints,
        out,
        settings,
        extend=extend,
        repair=repair,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    place = f" --hookpoint {hookpoints[0]}" if len(hookpoints) > 1 else ""
    width = cache.d_model(hookpoints[0])
    sizes = f"--d-sae {8 * width} --k {min(32, width // 2)}"
    _next(f"saebase train --acts {quote(out)}{place} {sizes} --out runs/first")


@app.command
def evaluate(
    sae: Sae,
    *,
    acts: Acts = DEFAULT_ACTS,
    with_model: Annotated[
        bool, Parameter(help="Also splice the SAE into its model and measure cross-entropy.")
    ] = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
    other_seeds: Annotated[
        list[Path] | None,
        Parameter(
            consume_multiple=True,
            negative=(),
            help="Folders of SAEs that differ in their seed: how far are the features the same?",
        ),
    ] = None,
    baselines: Annotated[
        list[str] | None,
        Parameter(
            consume_multiple=True,
            negative=(),
            help="NAME=FOLDER of SAEs to set beside it, such as one with a frozen decoder; "
            "NAME=FOLDER@ACTS of one on activations of its own, such as a random model's.",
        ),
    ] = None,
    settings: Annotated[EvalConfig, Fields] = EvalConfig(),  # noqa: B008
) -> None:
    """Measure an SAE on held-out documents, beside an untrained SAE and PCA.

    --n-probe-rows 16384 adds k-sparse probing and feature absorption.
    """
    cache = ActivationCache.open(acts)
    load_lm = stages.model_of_cache(cache, device, dtype, console) if with_model else None
    stages.evaluate_stage(
        console,
        sae,
        cache,
        load_lm,
        settings,
        other_seeds=other_seeds or (),
        baselines=[BaselineRun.parse(each) for each in baselines or ()],
    )
    _next(f"saebase index {quote(str(sae))} --acts {quote(acts)}")


@app.command
def index(
    saes: Annotated[list[Path], Parameter(help="Folders of trained SAEs.", negative=())],
    *,
    acts: Acts = DEFAULT_ACTS,
    out: Annotated[Local, Parameter(help="Database file to write.")] = DEFAULT_DATABASE,
    overwrite: Annotated[bool, Parameter(negative=(), help="Replace another database.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    settings: Annotated[IndexConfig, Fields] = IndexConfig(),  # noqa: B008
) -> None:
    """Look at every feature: contexts, tokens, logits, neighbours, labels, in one database."""
    cache = ActivationCache.open(acts)
    load_lm = stages.model_of_cache(cache, device, dtype, console)
    stages.index_stage(console, load_lm, saes, cache, out, settings, overwrite=overwrite)
    sql = "SELECT * FROM features ORDER BY density DESC LIMIT 10"
    _next(f'saebase query "{sql}" --db {quote(str(out))}')


@app.command
def verify(acts: Acts = DEFAULT_ACTS) -> None:
    """Read every byte of an activation cache and compare it with its checksums."""
    cache = ActivationCache.open(acts)
    with console.status("verifying"):
        n_bytes = cache.verify()
    console.print(f"{cache.path}: {n_bytes / 1e6:,.1f} MB in {cache.n_tokens:,} rows, all intact")


def _next(command: str) -> None:
    console.print(f"[dim]next:[/] {command}", highlight=False, soft_wrap=True)
