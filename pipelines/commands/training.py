"""Verbs about runs: train, report."""

from pathlib import Path
from shlex import quote
from typing import Annotated

from cyclopts import Group, Parameter

from activation_cache import ActivationCache, ActivationStream, HarvestConfig
from sae import TrainConfig
from sae.training import RunSpec
from sae.wiring import Wiring, wiring_of

from .. import stages
from ..cli import app, console, error_console
from ..errors import PipelineError
from ..ranks import is_first_rank, joined_ranks
from ..run_report import require_report, write_report
from ..sae_settings import (
    DEFAULT_ARCHITECTURE,
    OF_EVERY_ARCHITECTURE,
    ArchitectureName,
    SAESettings,
    given_settings,
)
from ..sweep import Axes, RunSettings, axes_of, specs_of
from ..trackers import trackers_of
from ..training import Places, described, train_stage
from .arguments import DEFAULT_ACTS, Acts, Bytes, Local

_WHERE = Group("Where: an SAE, a transcoder or a crosscoder", sort_key=(0,))
_SHOWN = Group("Several at once, and seeing it", sort_key=(1,))
_TRAINING = Group("Of training", sort_key=(3,))
_STREAM = Group("Without a cache, straight from a model", sort_key=(4,))

Sweep = Annotated[
    list[str] | None,
    Parameter(
        negative=(),
        group=_SHOWN,
        help="SETTING=VALUE,VALUE: an SAE for each, side by side from one read, each in a folder "
        "of --out. SETTING: any flag of architecture or training, architecture, or hookpoint. May "
        "be repeated: the product is trained, each architecture with the settings that it has.",
    ),
]


def _of(group: Group, text: str) -> Parameter:
    return Parameter(group=group, help=text)


@app.command
def train(
    *,
    out: Annotated[Local, Parameter(help="Folder for the SAE, or to go on in.")],
    acts: Acts = DEFAULT_ACTS,
    hookpoint: Annotated[
        str | None, _of(_WHERE, "An SAE's place, if the cache holds several.")
    ] = None,
    reads: Annotated[str | None, _of(_WHERE, "Where a transcoder reads.")] = None,
    writes: Annotated[str | None, _of(_WHERE, "Where it writes: what it reconstructs.")] = None,
    skip: Annotated[
        bool,
        Parameter(group=_WHERE, negative=(), help="Add a linear map of what a transcoder reads."),
    ] = False,
    hookpoints: Annotated[
        list[str] | None,
        Parameter(
            group=_WHERE,
            consume_multiple=True,
            negative=(),
            help="A crosscoder's places: one dictionary for all of them.",
        ),
    ] = None,
    model: Annotated[
        str | None, _of(_STREAM, "Train straight from this model; needs --dataset.")
    ] = None,
    dataset: Annotated[
        str | None, _of(_STREAM, "Text for --model, as for harvest; needs the places.")
    ] = None,
    max_disk: Annotated[
        Bytes, _of(_STREAM, "Disk, such as 20GB: the model runs ahead so far. 0: memory alone.")
    ] = 0,
    buffer: Annotated[
        Bytes, _of(_STREAM, "Memory for rows on their way, and to shuffle them.")
    ] = 512_000_000,
    harvest: Annotated[HarvestConfig, _of(_STREAM, "How --model reads its text.")] = (
        HarvestConfig()  # noqa: B008
    ),
    model_device: Annotated[str, _of(_STREAM, "auto, cpu, cuda, cuda:N or mps.")] = "auto",
    model_dtype: Annotated[str, _of(_STREAM, "auto, float32, bfloat16 or float16.")] = "auto",
    sweep: Sweep = None,
    plot: Annotated[
        Path | None, _of(_SHOWN, "Also draw the run, into this .html, .png or .svg file.")
    ] = None,
    wandb_project: Annotated[
        str | None, _of(_SHOWN, "Also log to this Weights & Biases project.")
    ] = None,
    architecture: Annotated[
        ArchitectureName,
        _of(OF_EVERY_ARCHITECTURE, "How features are selected, and what is penalised."),
    ] = DEFAULT_ARCHITECTURE,
    sae: Annotated[SAESettings, Parameter(name="*")] = SAESettings(),  # noqa: B008
    settings: Annotated[TrainConfig, Parameter(name="*", group=_TRAINING)] = TrainConfig(),  # noqa: B008
) -> None:
    """Train sparse autoencoders on stored activations, or straight from a model.

    Called again it goes on where it was. With --model there is no cache: the model runs ahead of
    training, inside --max-disk. torchrun or srun may start several processes, which share the work
    of each batch.
    """
    with joined_ranks(console):
        if plot is not None:
            require_report(plot, "--plot")
        axes = axes_of(sweep or [])
        place = Places(hookpoint, reads, writes, skip, hookpoints or ()).wiring
        given = given_settings(sae)
        if model is None:
            cache, named = _cache_and_place(acts, place, axes)
            specs = specs_of(RunSettings(architecture, named, given, settings), axes, out)
            _train(cache, specs, axes, out, wandb_project, plot)
            _next(f"saebase evaluate {quote(str(specs[0].out))} --acts {quote(acts)}")
            return
        names = _places_of_stream(model, dataset, place, axes)
        if settings.n_steps is None and settings.n_tokens is None and "n_tokens" not in axes:
            raise PipelineError(
                "text for --model has no end: say how long to train, with --n-tokens or --n-steps"
            )
        specs = specs_of(RunSettings(architecture, place or names[0], given, settings), axes, out)
        assert dataset is not None
        load_lm = stages.model_loader(model, model_device, model_dtype, console)
        with stages.opened_stream(
            load_lm, dataset, names, out / "stream", max_disk, buffer, harvest
        ) as stream:
            _train(stream, specs, axes, out, wandb_project, plot)
            stream.clear()
        text = f"--model {quote(model)} --dataset {quote(dataset)} --hookpoints {' '.join(names)}"
        then = f"saebase evaluate {quote(str(specs[0].out))}"
        _next(f"saebase harvest {text} --n-tokens 500000, then {then}")


@app.command
def report(
    runs: Annotated[
        list[Path],
        Parameter(help="Folders of runs, finished or not; of a sweep, all of its.", negative=()),
    ],
    *,
    out: Annotated[
        Path | None,
        Parameter(help="File to write: .html, .png or .svg; left out, report.html in the folder."),
    ] = None,
) -> None:
    """Draw runs: curves of training, histograms of features, settings and evaluation.

    Several are drawn over each other and stand side by side in the tables.
    """
    file = out or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    require_report(file, "--out")
    write_report(runs, file)
    console.print(f"  written: {file}", highlight=False, markup=False, soft_wrap=True)


def _cache_and_place(
    acts: str, place: str | Wiring | None, axes: Axes
) -> tuple[ActivationCache, str | Wiring]:
    """The cache, and what an SAE is trained on: its only place where none is named."""
    if isinstance(place, Wiring) or "hookpoint" in axes:
        cache = ActivationCache.open(acts)
        return cache, place or cache.hookpoints[0]
    return stages.open_cache(acts, place)


def _places_of_stream(
    model: str, dataset: str | None, place: str | Wiring | None, axes: Axes
) -> list[str]:
    """All places that the model is to be read at. Raises: PipelineError if there are none."""
    named = list(wiring_of(place).hookpoints) if place is not None else []
    names = [str(each) for each in axes.get("hookpoint", named)]
    if dataset is None or not names:
        missing = "--dataset" if dataset is None else "--hookpoint"
        raise PipelineError(f"--model {model} needs {missing}: what it runs on, and where to look")
    return names


def _train(
    source: ActivationCache | ActivationStream,
    specs: list[RunSpec],
    axes: Axes,
    out: Path,
    wandb_project: str | None,
    plot: Path | None,
) -> None:
    with trackers_of(wandb_project, {spec.out: described(spec) for spec in specs}) as trackers:
        train_stage(console, source, specs, trackers, out=out, axes=axes)
    if plot is not None and is_first_rank():
        write_report([spec.out for spec in specs], plot)
        error_console.print(f"drawn: {plot}", highlight=False, markup=False, soft_wrap=True)


def _next(command: str) -> None:
    console.print(f"[dim]next:[/] {command}", highlight=False, soft_wrap=True)
