"""SAE + its model + tokens -> an SAE whose reconstructions the model can work with.

Training asks for small errors; here the model itself says which errors matter. Token blocks run
through it, with the SAE's reconstruction in the place of the activations, and gradients come back
from the predictions to the SAE's weights alone. A few percent of training's tokens take 20 to 50%
of the cross-entropy that splicing costs away.
Source: Karvonen 2025, arXiv 2503.17272; end to end: Braun et al. 2024, arXiv 2405.12241.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

from sae.autoencoder import SAE
from sae.calibration import THRESHOLD_ROWS, calibrate_
from sae.checkpoints import load_newest_checkpoint, save_checkpoint, sweep_checkpoints
from sae.config import FREE_SETTINGS
from sae.errors import ConfigError, SourceError, StorageError, TrainingStoppedError
from sae.evaluating.held_out import require_fitting
from sae.evaluating.splicing import batched_blocks
from sae.finetuning_state import (
    FinetuneConfig,
    FinetuneMetrics,
    FinetuningState,
    Scales,
    hold_l0_,
)
from sae.metrics import Clock, MetricsLog
from sae.reading import sample_batches, sample_rows
from sae.run_folder import LockedFolder
from sae.schedule import default_lr, means_here
from sae.sources import EvaluationSource, SplicedModel, TokenBlock
from sae.storage import CONFIG_FILE, read_description, tensors_of
from sae.team import Team
from sae.wiring import wiring_of

DEFAULTS = FinetuneConfig()
NAME = "finetuning"
ORDER_SEED = 0  # of the rows that statistics are taken from


class FinetuneResult(NamedTuple):
    """What fine-tuning leaves: the SAE (on raw activations), its folder, steps and tokens."""

    sae: SAE
    path: Path
    steps: int
    n_tokens: int


def finetune(
    sae: SAE,
    lm: SplicedModel,
    source: EvaluationSource,
    config: FinetuneConfig = DEFAULTS,
    *,
    out: str | Path,
    on_metrics: Callable[[FinetuneMetrics], None] | None = None,
    resume: bool = True,
    should_stop: Callable[[], bool] | None = None,
) -> FinetuneResult:
    """Fine-tune an SAE through its model on a source's train tokens, into the folder out.

    sae: stays as it is. lm: the model that the source's activations come from. Interrupted, the
    same call goes on from the last checkpoint, to the same weights bit for bit (same machine, same
    number of threads); finished, it returns at once; resume=False starts over. should_stop is asked
    after each step.
    Raises: ConfigError (a transcoder or crosscoder; several processes), SourceError,
    ResumeMismatchError, CheckpointError, RunInUseError, NonFiniteError, TrainingStoppedError,
    StorageError.
    """
    hookpoint = _hookpoint(sae)
    require_fitting(sae, source, wiring_of(hookpoint))
    config = _resolved(config, sae)
    folder = FinetuneFolder(Path(out), sae, config)
    with folder.locked():
        if not resume:
            folder.clear()
        if (finished := folder.finished()) is not None:
            return finished
        state = folder.resume(
            FinetuningState(_copy(sae, config), config, _scales(sae, source, config))
        )
        with closing(MetricsLog(folder.metrics_path, after_step=state.position.step)) as log:
            run = _Run(folder, state, log, on_metrics)
            _loop(run, lm, source, hookpoint, should_stop)
        return _finish(folder, state, source)


class FinetuneFolder(LockedFolder):
    """The folder of a fine-tuned SAE, as that of a run of training."""

    def __init__(self, path: Path, sae: SAE, config: FinetuneConfig) -> None:
        super().__init__(path)
        self._sae, self._keep = sae, config.keep_checkpoints
        self.settings = {
            "sae_sha256": _hash(sae),
            **config.model_dump(mode="json", exclude=set(FREE_SETTINGS)),
        }

    def finished(self) -> FinetuneResult | None:
        """The SAE, if fine-tuning is over.

        Raises: ResumeMismatchError if it was another one's.
        """
        if not (self.path / CONFIG_FILE).is_file():
            return None
        provenance = read_description(self.path)["provenance"]
        done = dict(provenance.get(NAME, {"sae_sha256": None}))
        steps, n_tokens = done.pop("steps", 0), done.pop("n_tokens_used", 0)
        self.require_same(self.settings, done)
        return FinetuneResult(SAE.load(self.path), self.path, steps, n_tokens)

    def resume(self, state: FinetuningState) -> FinetuningState:
        """The state as the newest checkpoint has it, if there is one.

        Raises: ResumeMismatchError, CheckpointError.
        """
        checkpoint = load_newest_checkpoint(self.checkpoints_path)
        if checkpoint is not None:
            self.require_same(self.settings, checkpoint.values["settings"])
            state.load_(checkpoint)
        return state

    def checkpoint(self, state: FinetuningState, log: MetricsLog) -> None:
        """Save the state, after the metrics that lead up to it."""
        log.sync()
        checkpoint = state.to_checkpoint()
        checkpoint.values["settings"] = self.settings
        save_checkpoint(self.checkpoints_path, state.position.step, checkpoint, keep=self._keep)

    def save(self, state: FinetuningState) -> FinetuneResult:
        """Write the SAE, and sweep what a killed process left."""
        position, sae = state.position, state.sae.to("cpu")
        done = {**self.settings, "steps": position.step, "n_tokens_used": position.n_tokens}
        origin = self._sae.origin
        sae.origin = origin.model_copy(update={"provenance": {**origin.provenance, NAME: done}})
        sweep_checkpoints(self.checkpoints_path, position.step, keep=self._keep)
        sae.save(self.path)
        return FinetuneResult(sae, self.path, position.step, position.n_tokens)


class _Run:
    """Steps, what is logged of them, and the clock."""

    def __init__(
        self,
        folder: FinetuneFolder,
        state: FinetuningState,
        log: MetricsLog,
        on_metrics: Callable[[FinetuneMetrics], None] | None,
    ) -> None:
        self._folder, self.state, self._log, self._on_metrics = folder, state, log, on_metrics
        self._clock = Clock(state.position)
        self._saved_step = state.position.step

    def take(self, lm: SplicedModel, hookpoint: str, blocks: list[TokenBlock]) -> None:
        """A step, its metrics and its checkpoint."""
        state, config = self.state, self.state.config
        found = state.advance(lm, hookpoint, blocks)
        step = state.position.step
        if found is not None and (state.is_done or step % config.log_every_steps == 0):
            self._tell(found)
        if state.is_done or step % config.checkpoint_every_steps == 0:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Save where fine-tuning stands, once a step and never in the middle of one."""
        if self.state.is_between_steps and self.state.position.step != self._saved_step:
            self._clock.tick()
            self._folder.checkpoint(self.state, self._log)
            self._saved_step = self.state.position.step

    def _tell(self, found: dict[str, float]) -> None:
        tokens_per_s, position = self._clock.tokens_per_s(), self.state.position
        metrics = FinetuneMetrics(
            step=position.step,
            n_tokens=position.n_tokens,
            n_skipped=position.n_skipped,
            tokens_per_s=tokens_per_s,
            elapsed_s=position.elapsed_s,
            **found,
        )
        self._log.append(metrics)
        if self._on_metrics is not None:
            self._on_metrics(metrics)


def _loop(
    run: _Run,
    lm: SplicedModel,
    source: EvaluationSource,
    hookpoint: str,
    should_stop: Callable[[], bool] | None,
) -> None:
    """Read, step, track, save; a checkpoint is left whatever ends it early."""
    state = run.state
    blocks = islice(_blocks(source), state.position.n_blocks, None)
    batches = batched_blocks(blocks, state.config.batch_blocks)
    try:
        while not state.is_done:
            run.take(lm, hookpoint, next(batches))
            if should_stop is not None and should_stop() and not state.is_done:
                raise TrainingStoppedError(
                    f"fine-tuning was stopped after step {state.position.step}; the same call goes "
                    "on from there"
                )
    except StorageError:
        raise
    except BaseException:
        run.checkpoint()
        raise


def _blocks(source: EvaluationSource) -> Iterator[TokenBlock]:
    """Train blocks in the order of the text, over and over."""
    while True:
        n_blocks = 0
        for block in source.token_blocks(split="train"):
            n_blocks += 1
            yield block
        if not n_blocks:
            raise SourceError(
                "the source has no train tokens to run a model on; give an activation cache"
            )


@torch.no_grad()
def _finish(
    folder: FinetuneFolder, state: FinetuningState, source: EvaluationSource
) -> FinetuneResult:
    """Calibrate on train rows, save."""
    sae, n_rows = state.sae, state.config.calibration_rows
    sae.requires_grad_(False)
    wiring = wiring_of(_hookpoint(sae))
    n_threshold = min(n_rows, THRESHOLD_ROWS)
    threshold_rows = sample_rows(source, wiring, n_threshold, seed=ORDER_SEED).x
    hold_l0_(sae, threshold_rows, state.scales.l0)
    sampled = sample_batches(source, wiring, n_rows, seed=ORDER_SEED)
    calibrate_(sae, threshold_rows, (batch.x for batch in sampled))
    return folder.save(state)


@torch.no_grad()
def _scales(sae: SAE, source: EvaluationSource, config: FinetuneConfig) -> Scales:
    wiring = wiring_of(_hookpoint(sae))
    rows = sample_rows(source, wiring, config.init_rows, seed=ORDER_SEED).x.double()
    unit = float(rows.square().mean().sqrt())
    variance = float((rows - rows.mean(0)).square().sum(1).mean())
    if not variance > 0:
        raise SourceError(f"the {len(rows)} rows sampled don't vary; there is nothing to learn")
    device = sae.b_dec.device
    codes = sae.encode_sparse(rows.float().to(device))
    return Scales(unit, variance, codes.nnz / len(rows))


def _hookpoint(sae: SAE) -> str:
    """Where the SAE belongs. Raises: ConfigError if that isn't one place that it reconstructs."""
    if not sae.is_tied or not sae.has_one_output:
        assert sae.wiring is not None
        raise ConfigError(
            f"only an SAE that reconstructs the place it reads can be fine-tuned; this one is "
            f"{sae.wiring.name}. Train it longer instead"
        )
    if sae.hookpoint is None:
        raise ConfigError("this SAE doesn't say where it was trained: its origin needs a hookpoint")
    if not Team().is_alone:
        raise ConfigError(
            f"fine-tuning runs in one process, not in {Team().world_size}; start it without "
            "torchrun"
        )
    return sae.hookpoint


def _resolved(config: FinetuneConfig, sae: SAE) -> FinetuneConfig:
    lr = config.lr or default_lr(sae.d_sae)
    return config.model_copy(update={"lr": lr, **means_here(config)})


def _copy(sae: SAE, config: FinetuneConfig) -> SAE:
    copy = SAE(sae.config, sae.d_model, sae.origin, d_out=sae.d_out)
    copy.load_state_dict(sae.state_dict())
    return copy.to(config.device)


def _hash(sae: SAE) -> str:
    """Of the weights and the settings that it starts from."""
    digest = hashlib.sha256(json.dumps(sae.config.model_dump(mode="json")).encode())
    for _, tensor in sorted(tensors_of(sae).items()):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
