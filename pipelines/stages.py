"""The stages of a run, in order: harvest, train, evaluate, index. Each is skipped when it is made.

In: configs and a console. Out: artifacts in folders, and lines on the console about what was made.
The work is done in the packages; here it is put in order, shown, and made to go on after a stop.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console

from activation_cache import (
    ActivationCache,
    ActivationStream,
    HarvestConfig,
    HarvestProgress,
    LanguageModel,
    harvest,
)
from feature_db import FeatureDB, IndexConfig, IndexProgress, build_index
from feature_db.activations import BYTES_AN_ACTIVATION
from feature_db.indexing.parts import parts_folder
from sae import (
    SAE,
    EvalConfig,
    Report,
    evaluate,
)
from sae.evaluating import LabelledRows
from sae.storage import read_description

from .baseline_runs import BaselineRun
from .config import PipelineConfig
from .errors import PipelineError
from .probe_labels import labels_of_model
from .progress import StageProgress
from .trackers import Tracker, trackers_of
from .training import described, train_stage

REPORT = "report.json"
LoadModel = Callable[[], LanguageModel]


def run_pipeline(
    config: PipelineConfig, console: Console, wandb_project: str | None = None
) -> dict[str, float]:
    """Make whatever of the run is not made yet. Returns: seconds that each stage took."""
    load_lm = model_loader(config.model, config.device, config.dtype, console)
    seconds: dict[str, float] = {}
    with _timed("harvest", seconds):
        acts = harvest_stage(
            console, load_lm, config.dataset, config.places, config.acts_place, config.harvest
        )
    folders = []
    for out, specs in config.runs():
        settings = {spec.out: described(spec) for spec in specs}
        with trackers_of(wandb_project, settings) as trackers:
            with _timed("train", seconds):
                train_stage(console, acts, specs, trackers, out=out, axes=config.sweep)
            for spec in specs:
                told = [trackers[spec.out]] if spec.out in trackers else []
                with _timed("evaluate", seconds):
                    evaluate_stage(console, spec.out, acts, load_lm, config.evaluate, told)
                folders.append(spec.out)
    with _timed("index", seconds):
        index_stage(console, load_lm, folders, acts, config.database, config.index)
    return seconds


def model_loader(name: str, device: str, dtype: str, console: Console) -> LoadModel:
    """A function that loads the model when it is first called, and then always returns it."""

    @cache
    def load() -> LanguageModel:
        with console.status(f"loading {name}"):
            return LanguageModel.load(name, device=device, dtype=dtype)

    return load


def model_of_cache(acts: ActivationCache, device: str, dtype: str, console: Console) -> LoadModel:
    """A loader of the model that a cache was made with; dtype "auto" is the one it ran in."""
    made_with = acts.manifest.fingerprint
    dtype = made_with.model_dtype if dtype == "auto" else dtype
    return model_loader(made_with.model, device, dtype, console)


def model_of(sae: SAE, device: str, dtype: str) -> LanguageModel:
    """The model that an SAE was trained on; dtype "auto" is the one it ran in.

    Raises: PipelineError if the SAE does not say, ModelError if it can't be loaded.
    """
    made_with = sae.origin.provenance
    if "model" not in made_with:
        raise PipelineError("this SAE does not say which model it was trained on")
    dtype = made_with.get("model_dtype", dtype) if dtype == "auto" else dtype
    return LanguageModel.load(made_with["model"], device=device, dtype=dtype)


def harvest_stage(
    console: Console,
    load_lm: LoadModel,
    dataset: str,
    hookpoints: Sequence[str],
    out: str,
    config: HarvestConfig,
    **how: Any,
) -> ActivationCache:
    """Text -> activations on disk, with progress. how: `extend`, `repair`, `rank`, `world_size` of
    `activation_cache.harvest`."""
    _heading(console, "harvest", f"{', '.join(hookpoints)} over {dataset} -> {out}")
    with StageProgress(console, "harvest", "tokens") as progress:

        def show(p: HarvestProgress) -> None:
            progress.update(p.n_tokens, p.n_tokens_wanted, f"{p.tokens_per_s:,.0f} tokens/s")

        acts = harvest(
            load_lm,
            dataset,
            hookpoints=hookpoints,
            out=out,
            config=config,
            on_progress=show,
            **how,
        )
    _made(console, cache_lines(acts))
    return acts


def opened_stream(
    load_lm: LoadModel,
    dataset: str,
    hookpoints: Sequence[str],
    folder: Path,
    max_disk_bytes: int,
    buffer_bytes: int,
    config: HarvestConfig,
) -> ActivationStream:
    """Activations that are made as training consumes them."""
    return ActivationStream.open(
        load_lm,
        dataset,
        hookpoints=hookpoints,
        folder=folder,
        max_disk_bytes=max_disk_bytes,
        buffer_bytes=buffer_bytes,
        config=config,
    )


def evaluate_stage(
    console: Console,
    folder: Path,
    acts: ActivationCache,
    load_lm: LoadModel | None,
    config: EvalConfig,
    trackers: Sequence[Tracker] = (),
    other_seeds: Sequence[Path] = (),
    baselines: Sequence[BaselineRun] = (),
) -> Report:
    """SAE -> report.json beside it: reconstruction, cross-entropies, baselines; where asked for,
    probes of labels (made with the model's tokenizer) and likeness to SAEs of other seeds.

    Raises: PipelineError if labels are asked for without a model.
    """
    _heading(console, "evaluate", f"{folder} on {config.split} documents of {acts.path}")
    sae = SAE.load(folder)
    made_from = {
        "cache_fingerprint": acts.fingerprint_hash,
        "weights_sha256": read_description(folder)["weights_sha256"],
        "with_model": load_lm is not None,
        "other_seeds": [read_description(other)["weights_sha256"] for other in other_seeds],
        "baselines": [each.identity() for each in baselines],
        "config": config.model_dump(mode="json"),
    }
    report = _report_at(folder / REPORT)
    if report is None or report.made_from != made_from:
        lm = load_lm() if load_lm else None
        with console.status("evaluating"):
            found = evaluate(
                sae,
                acts,
                lm,
                config,
                baselines=[each.measured(acts, lm, config) for each in baselines],
                other_seeds=[SAE.load(other) for other in other_seeds],
                labelled=_labelled(sae, acts, load_lm, config),
            )
        report = found.model_copy(update={"made_from": made_from})
        report.write(folder / REPORT)
    for tracker in trackers:
        tracker.report(report)
    _made(console, report.lines())
    return report


def _labelled(
    sae: SAE, acts: ActivationCache, load_lm: LoadModel | None, config: EvalConfig
) -> LabelledRows | None:
    """Rows with labels, if the config asks for them."""
    if not config.n_probe_rows:
        return None
    if load_lm is None:
        raise PipelineError(
            f"n_probe_rows={config.n_probe_rows} makes labels of tokens, which needs the model's "
            "tokenizer: evaluate with the model, or set n_probe_rows to 0"
        )
    lm, hookpoint = load_lm(), sae.hookpoint or acts.hookpoints[0]
    return labels_of_model(lm, acts, hookpoint, config.n_probe_rows, config.split)


def index_stage(
    console: Console,
    load_lm: LoadModel,
    folders: Sequence[Path],
    acts: ActivationCache,
    out: Path,
    config: IndexConfig,
    *,
    overwrite: bool = False,
) -> Path:
    """SAEs + activations -> the feature database."""
    _heading(console, "index", f"{', '.join(map(str, folders))} -> {out}")
    if config.keep_activations:
        _made(console, [kept_activations_line(folders, acts, out)])
    with StageProgress(console, "index", "tokens") as progress:

        def show(p: IndexProgress) -> None:
            progress.update(p.done, p.total, unit=p.stage)

        path = build_index(
            load_lm(), folders, acts, out=out, config=config, on_progress=show, overwrite=overwrite
        )
    with FeatureDB.open(path) as db:
        _made(console, database_lines(db, path))
    return path


def kept_activations_line(folders: Sequence[Path], acts: ActivationCache, out: Path) -> str:
    """How large the activations that are kept will be, told before."""
    saes = [SAE.load(folder) for folder in folders]
    n = acts.n_tokens * sum(sae.expected_l0 or float(sae.density.sum()) for sae in saes)
    return (
        f"keeping about {n:,.0f} activations, {n * BYTES_AN_ACTIVATION / 1e6:,.0f} MB, in "
        f"{parts_folder(out)}"
    )


def cache_lines(acts: ActivationCache) -> list[str]:
    """What a cache holds, in sentences; one for each hookpoint."""
    ended = " (the text ended before the wanted number)" if acts.is_exhausted else ""
    added = acts.quantization_fvu
    lines = [
        f"{acts.n_tokens:,} tokens of {acts.n_documents:,} documents{ended}, "
        f"{acts.n_bytes / 1e6:,.0f} MB in {acts.path}"
    ]
    for hookpoint in acts.hookpoints:
        held_out = acts.n_rows(hookpoint, split="heldout")
        lines.append(
            f"{hookpoint}: {acts.n_rows(hookpoint):,} rows to train on, {held_out:,} held out by "
            f"document, {acts.n_massive(hookpoint, split='all'):,} of massive norm (above "
            f"{acts.max_norm(hookpoint):,.0f}) left out"
        )
        if (fvu := added.get(hookpoint)) is not None:
            lines.append(f"{hookpoint}: storing in int8 added an FVU of {fvu:.2g}")
        if held_out == 0:
            lines.append("nothing is held out: evaluation needs a text of at least two documents")
    return lines


def database_lines(db: FeatureDB, path: Path) -> list[str]:
    """What a feature database holds, in a sentence."""
    features, alive, contexts = db.sql(
        "SELECT count(*), count(*) FILTER (WHERE NOT is_dead), "
        "(SELECT count(*) FROM contexts) FROM features"
    ).fetchall()[0]
    return [
        f"{features:,} features ({alive:,} active), {contexts:,} contexts, "
        f"{path.stat().st_size / 1e6:,.1f} MB in {path}"
    ]


def open_cache(place: str, hookpoint: str | None) -> tuple[ActivationCache, str]:
    """A cache, and the hookpoint of it that is meant: the only one where none is named."""
    acts = ActivationCache.open(place)
    if hookpoint is None and len(acts.hookpoints) > 1:
        raise PipelineError(
            f"cache {acts.path} holds {', '.join(acts.hookpoints)}: choose one with --hookpoint"
        )
    return acts, hookpoint or acts.hookpoints[0]


def _report_at(path: Path) -> Report | None:
    return Report.read(path) if path.is_file() else None


def _heading(console: Console, stage: str, what: str) -> None:
    console.print(f"[bold cyan]{stage}[/]  {what}", highlight=False, soft_wrap=True)


def _made(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    console.print()


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started
