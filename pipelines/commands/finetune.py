"""The verb that fine-tunes an SAE through its model: finetune."""

from pathlib import Path
from shlex import quote
from typing import Annotated

from cyclopts import Parameter

from activation_cache import ActivationCache
from sae import (
    SAE,
    ConfigError,
    FinetuneConfig,
    FinetuneMetrics,
    FinetuneResult,
    TrainingStoppedError,
)
from sae import finetune as finetune_sae

from .. import stages
from ..cli import app, console
from ..interruption import stop_asked
from ..progress import StageProgress
from .arguments import DEFAULT_ACTS, Acts, Device, Dtype, Local, Sae


@app.command
def finetune(
    sae: Sae,
    *,
    out: Annotated[
        Local | None,
        Parameter(help="Folder for the new SAE, or to go on in. Left out: SAE-finetuned."),
    ] = None,
    acts: Acts = DEFAULT_ACTS,
    model_device: Device = "auto",
    model_dtype: Dtype = "auto",
    settings: Annotated[FinetuneConfig, Parameter(name="*")] = FinetuneConfig(),  # noqa: B008
) -> None:
    """Fine-tune an SAE so that its model, spliced, predicts as it did; on --n-tokens of the cache.

    Called again it goes on where it was. The model runs twice on each token, and back once.
    """
    folder = out or sae.with_name(f"{sae.name}-finetuned")
    if folder.resolve() == sae.resolve():
        raise ConfigError(f"--out {folder} is the SAE that is fine-tuned; give another folder")
    cache, start = ActivationCache.open(acts), SAE.load(sae)
    load_lm = stages.model_of_cache(cache, model_device, model_dtype, console)
    console.print(
        f"[bold cyan]finetune[/]  {sae} through {cache.manifest.fingerprint.model}, by "
        f"{settings.objective} -> {folder}",
        highlight=False,
        soft_wrap=True,
    )
    told: list[FinetuneMetrics] = []
    with StageProgress(console, "finetune", "tokens") as progress, stop_asked() as should_stop:

        def show(m: FinetuneMetrics) -> None:
            told.append(m)
            note = f"KL {m.kl:.4f}  FVU {m.mse:.3f}  {m.tokens_per_s:,.0f} tokens/s"
            progress.update(m.n_tokens, settings.n_tokens, note)

        try:
            done = finetune_sae(
                start,
                load_lm(),
                cache,
                settings,
                out=folder,
                on_metrics=show,
                should_stop=should_stop,
            )
        except TrainingStoppedError as error:
            raise KeyboardInterrupt from error
    _print(done, told, sae, acts)


def _print(done: FinetuneResult, told: list[FinetuneMetrics], before: Path, acts: str) -> None:
    console.print(f"  {done.n_tokens:,} tokens in {done.steps:,} steps", highlight=False)
    if told:
        first, last = told[0], told[-1]
        console.print(
            f"  KL to the untouched model {first.kl:.4f} -> {last.kl:.4f}, cross-entropy above its "
            f"{first.ce_spliced - first.ce_clean:.4f} -> {last.ce_spliced - last.ce_clean:.4f} "
            "nats a token (first and last batch that were logged)",
            highlight=False,
            soft_wrap=True,
        )
    command = f"saebase evaluate {quote(str(done.path))} --acts {quote(acts)}"
    console.print(
        f"[dim]next:[/] {command}, and compare with {before}", highlight=False, soft_wrap=True
    )
