"""What a run will cost, before anything starts: tokens, disk, memory and time.

In: a `PipelineConfig`. Out: a `Plan`. The model's configuration alone is read, not its weights; the
machine's speed is measured with one matrix product of a fraction of a second. Times are estimates:
the constants below turn it into that of whole stages, as measured on the demo
(docs/performance.md).
"""

import shutil
import time
from collections.abc import Sequence
from typing import NamedTuple

import psutil
import torch
from rich.table import Table

from activation_cache.formats import TOKEN_BYTES, row_bytes
from activation_cache.loading import resolve_device, resolve_dtype
from activation_cache.skeleton import ModelShape, model_shape
from sae import TrainConfig
from sae.schedule import means_here
from sae.training import RunSpec
from sae.wiring import wiring_of

from .config import PipelineConfig

MODEL_EFFICIENCY = 0.55
SAE_EFFICIENCY = 0.7
TRAIN_PRODUCTS = {"auto": 1.1, "float32": 1.5, "bfloat16": 1.1, "int8": 0.6}
"""A training step over one float32 encoder product of its size (benchmarks/train.py)."""
INDEX_S_PER_TOKEN = 60e-6
DATABASE_BYTES_PER_FEATURE = 9_000
OPTIMIZER_COPIES = 4
"""Float32 copies of the weights in training: weights, gradients, and Adam's two moments."""
FORWARDS_IN_EVALUATION = 6
EVALUATION_OVERHEAD = 2.5
"""What softmaxes over the vocabulary and the baselines cost on top of the forward passes."""


class StagePlan(NamedTuple):
    """What one stage will take: tokens that pass through it, bytes of disk and memory, seconds."""

    stage: str
    n_tokens: int
    disk_bytes: float
    memory_bytes: float
    seconds: float


class Plan(NamedTuple):
    """The stages, and what there is to meet them."""

    stages: list[StagePlan]
    free_disk_bytes: float
    free_memory_bytes: float

    @property
    def disk_bytes(self) -> float:
        return sum(stage.disk_bytes for stage in self.stages)

    @property
    def memory_bytes(self) -> float:
        return max(stage.memory_bytes for stage in self.stages)

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    def warnings(self) -> list[str]:
        """What will not fit, one line each."""
        found = []
        if self.disk_bytes > self.free_disk_bytes:
            found.append(
                f"needs {self.disk_bytes / 1e9:,.1f} GB of disk, {self.free_disk_bytes / 1e9:,.1f} "
                "GB are free: lower harvest.n_tokens or the number of hookpoints"
            )
        if self.memory_bytes > self.free_memory_bytes:
            found.append(
                f"needs {self.memory_bytes / 1e9:,.1f} GB of memory, "
                f"{self.free_memory_bytes / 1e9:,.1f} GB are free: lower sae.d_sae, or take a "
                "smaller model"
            )
        return found

    def table(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("plan")
        for column in ("tokens", "disk", "memory", "time, about"):
            table.add_column(column, justify="right")
        total = StagePlan("in all", 0, self.disk_bytes, self.memory_bytes, self.seconds)
        for row in [*self.stages, total]:
            tokens = f"{row.n_tokens:,}" if row.n_tokens else ""
            table.add_row(
                row.stage, tokens, size(row.disk_bytes), size(row.memory_bytes), span(row.seconds)
            )
        return table


def make_plan(config: PipelineConfig) -> Plan:
    """Estimate a run. Raises: ModelError if the model's configuration can't be had."""
    shape = model_shape(config.model)
    dtype = resolve_dtype(config.dtype, config.device)
    device = resolve_device(config.device)
    model_speed = measured_flops(device, dtype) * MODEL_EFFICIENCY
    sae_speed = measured_flops(device, torch.float32) * SAE_EFFICIENCY
    model_bytes = shape.n_params * dtype.itemsize
    stages = [_harvest_plan(config, shape, model_bytes, model_speed)]
    for _, specs in config.runs():
        stages.append(_train_plan(config, specs, shape.d_model, sae_speed))
        for _ in specs:
            stages.append(_evaluate_plan(config, shape, model_bytes, model_speed))
    stages.append(_index_plan(config, shape, model_bytes, sae_speed))
    home = next(p for p in (config.out, *config.out.resolve().parents) if p.exists())
    return Plan(stages, shutil.disk_usage(home).free, float(psutil.virtual_memory().available))


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second in a matrix product on this machine."""
    n = 4096 if device.type == "cuda" else 1024
    a = torch.ones(n, n, device=device, dtype=dtype)
    for _ in range(2):
        a @ a
    n_products, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < 0.2 or n_products < 3:
        a @ a
        n_products += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return 2 * n**3 * n_products / elapsed


def size(n_bytes: float) -> str:
    """Bytes for a person: `1.2 GB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:,.1f} {unit}"
    return "" if n_bytes == 0 else f"{n_bytes:,.0f} B"


def span(seconds: float) -> str:
    """Seconds for a person: `4 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h"


def _layers_run(hookpoints: list[str], n_layers: int) -> int:
    """Layers that a forward pass goes through before it stops."""
    numbers = [h.split(".")[1] for h in hookpoints if h.startswith("layers.")]
    if len(numbers) < len(hookpoints) or not all(n.isdigit() for n in numbers):
        return n_layers
    return min(max(int(n) for n in numbers) + 1, n_layers)


def _harvest_plan(
    config: PipelineConfig, model: ModelShape, model_bytes: int, flops: float
) -> StagePlan:
    n_tokens = config.harvest.n_tokens
    n_layers = _layers_run(config.places, model.n_layers)
    attention = 4 * config.harvest.ctx_len * model.d_model
    per_token = n_layers * (2 * model.params_per_layer + attention)
    stored = row_bytes(model.d_model, config.harvest.storage_dtype)
    token_bytes = TOKEN_BYTES + len(config.places) * stored
    batch = config.harvest.batch_blocks * config.harvest.ctx_len
    activations = batch * model.d_model * 4 * (8 + 2 * len(config.places))
    return StagePlan(
        "harvest",
        n_tokens,
        0 if "://" in config.acts_place else n_tokens * token_bytes,
        model_bytes + activations,
        n_tokens * per_token / flops,
    )


def _train_plan(
    config: PipelineConfig, specs: Sequence[RunSpec], d_model: int, flops: float
) -> StagePlan:
    """One SAE, or those of a sweep side by side."""
    weights, checkpoints, seconds, scores = 0.0, 0.0, 0.0, 0.0
    for spec in specs:
        widths = _widths(spec, d_model)
        of_this = widths * spec.sae_config.d_sae * 4.0
        weights += of_this
        checkpoints += of_this * spec.train_config.keep_checkpoints * 3
        scores = max(scores, 512.0 * spec.sae_config.d_sae * 4)
        n_rows = _trained_tokens(spec.train_config, config.harvest.n_tokens)
        products = TRAIN_PRODUCTS[means_here(spec.train_config)["nominate_in"]]
        seconds += n_rows * products * widths * spec.sae_config.d_sae / flops
    window = min(512e6, config.harvest.n_tokens * d_model * 2)
    n_tokens = max(_trained_tokens(s.train_config, config.harvest.n_tokens) for s in specs)
    memory = weights * OPTIMIZER_COPIES + 2 * window + scores
    return StagePlan("train", n_tokens, weights + checkpoints, memory, seconds)


def _widths(spec: RunSpec, d_model: int) -> int:
    """Width of what is read and of what is written, together."""
    wiring = wiring_of(spec.hookpoint)
    return (len(wiring.reads) + len(wiring.writes)) * d_model


def _trained_tokens(config: TrainConfig, n_cached: int) -> int:
    if config.n_steps is not None:
        return config.n_steps * config.batch_size
    return config.n_tokens or n_cached


def _evaluate_plan(
    config: PipelineConfig, model: ModelShape, model_bytes: int, flops: float
) -> StagePlan:
    n_tokens = config.evaluate.n_lm_tokens
    per_token = FORWARDS_IN_EVALUATION * EVALUATION_OVERHEAD * 2 * model.n_params
    logits = config.evaluate.lm_batch_size * config.harvest.ctx_len * model.vocab_size * 4 * 4
    return StagePlan("evaluate", n_tokens, 10e3, model_bytes + logits, n_tokens * per_token / flops)


def _index_plan(
    config: PipelineConfig, model: ModelShape, model_bytes: int, flops: float
) -> StagePlan:
    n_tokens, sizes = config.harvest.n_tokens, [s.sae_config.d_sae for s in _all_specs(config)]
    d_sae, n_saes = sum(sizes), len(sizes)
    encoding = n_tokens * 2 * d_sae * model.d_model
    logits = 2 * d_sae * model.d_model * model.vocab_size
    contexts = config.index.n_top + config.index.quantile_sample
    window = config.index.tokens_before + config.index.tokens_after + 1
    state = d_sae * contexts * (4 * window + 48)
    seconds = (encoding + logits) / flops + n_saes * n_tokens * INDEX_S_PER_TOKEN
    return StagePlan(
        "index",
        n_tokens,
        d_sae * DATABASE_BYTES_PER_FEATURE + n_tokens * 6,
        model_bytes + state + 500e6,
        seconds,
    )


def _all_specs(config: PipelineConfig) -> list[RunSpec]:
    return [spec for _, specs in config.runs() for spec in specs]
