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
from ..errors import PipelineError
from ..indexing import count_stage, forget_text, index_stage, text_folder
from ..ranks import Ranks, place_among_ranks
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
    acts: Acts | None = None,
    dataset: Annotated[
        str | None, Parameter(help="A text instead of a cache, run through the SAEs' model now.")
    ] = None,
    n_tokens: Annotated[int | None, Parameter(help="Tokens of --dataset to index.")] = None,
    out: Annotated[Local, Parameter(help="Database file to write.")] = Path(DEFAULT_DATABASE),
    overwrite: Annotated[bool, Parameter(negative=(), help="Replace another database.")] = False,
    parts: Annotated[
        list[Path] | None,
        Parameter(
            consume_multiple=True,
            negative=(),
            help="Folders of parts that were counted elsewhere (NAME.duckdb.parts).",
        ),
    ] = None,
    rank: Rank = None,
    world_size: WorldSize = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    settings: Annotated[IndexConfig, Fields] = IndexConfig(),  # noqa: B008
) -> None:
    """Look at every feature: contexts, tokens, logits, neighbours, labels, in one database.

    Of several processes (--rank and --world-size, torchrun or srun) each counts its share of the
    text into OUT.parts; the same command by itself then makes the database of them.
    """
    ranks = place_among_ranks(rank, world_size)
    if dataset is None:
        cache = ActivationCache.open(acts or DEFAULT_ACTS)
        load_lm = stages.model_of_cache(cache, device, dtype, console)
    else:
        n_tokens = _tokens_wanted(acts, n_tokens, ranks)
        load_lm = stages.model_loader_of(saes, device, dtype, console)
        cache = stages.harvest_for(console, load_lm, saes, dataset, n_tokens, text_folder(out))
    if ranks.world_size > 1:
        count_stage(console, load_lm, saes, cache, out, settings, ranks)
        given = " ".join(quote(str(sae)) for sae in saes)
        _next(
            f"when all have ended: saebase index {given} --acts {quote(acts or DEFAULT_ACTS)} "
            f"--out {quote(str(out))}"
        )
        return
    index_stage(
        console, load_lm, saes, cache, out, settings, overwrite=overwrite, parts=parts or ()
    )
    if dataset is not None:
        forget_text(out)
    sql = "SELECT * FROM features ORDER BY density DESC LIMIT 10"
    _next(f'saebase query "{sql}" --db {quote(str(out))}')


def _tokens_wanted(acts: str | None, n_tokens: int | None, ranks: Ranks) -> int:
    if acts is not None:
        raise PipelineError(f"--acts {acts} and --dataset: a cache or a text, not both")
    if n_tokens is None or n_tokens < 1:
        raise PipelineError(f"--n-tokens {n_tokens}: say how many tokens of --dataset to index")
    if ranks.world_size > 1:
        raise PipelineError(
            f"--dataset in {ranks.world_size} processes: harvest in them first, then index --acts"
        )
    return n_tokens


@app.command
def verify(acts: Acts = DEFAULT_ACTS) -> None:
    """Read every byte of an activation cache and compare it with its checksums."""
    cache = ActivationCache.open(acts)
    with console.status("verifying"):
        n_bytes = cache.verify()
    console.print(f"{cache.path}: {n_bytes / 1e6:,.1f} MB in {cache.n_tokens:,} rows, all intact")


def _next(command: str) -> None:
    console.print(f"[dim]next:[/] {command}", highlight=False, soft_wrap=True)
