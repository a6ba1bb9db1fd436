"""Measures of a reconstruction, and the log of a training run: one JSON object a line."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from sae.atomic_files import told, write_text

logger = logging.getLogger(__name__)


def fvu(x: Tensor, x_hat: Tensor) -> Tensor:
    """Fraction of variance unexplained: 0 is perfect, 1 is no better than predicting the mean.

    x, x_hat: [batch, d_model]; accumulated in float64. The sum of squared error over the sum of
    squared deviation from x's own mean.
    Returns: scalar float64, unitless.
    Raises: ValueError if the shapes differ or x has no variance.
    """
    if x.shape != x_hat.shape:
        raise ValueError(f"x has shape {list(x.shape)}, x_hat {list(x_hat.shape)}; expected equal")
    x, x_hat = x.double(), x_hat.double()
    deviation = (x - x.mean(0)).square().sum()
    if not deviation > 0:
        raise ValueError(f"x has no variance over its {len(x)} rows, so FVU is undefined")
    return (x - x_hat).square().sum() / deviation


@dataclasses.dataclass(frozen=True)
class Metrics:
    """What one logged step of training looked like.

    step: steps done. n_tokens: rows trained on so far. loss: |x - x_hat|^2 a row over the data's
    variance. penalty: the architecture's sparsity penalty, over the same, coefficient included.
    aux_loss: AuxK's part, coefficient included. fvu: of this step's batch, against its
    own mean. l0: mean active features a row in this batch. dead_fraction: features not active
    for dead_after_tokens. lr: learning rate of this step. coefficient: what the sparsity penalty
    was weighted with. grad_norm: L2 norm before clipping.
    n_skipped: batches skipped so far for NaN or Inf. tokens_per_s: since the line before.
    elapsed_s: seconds trained, over all resumptions.
    """

    step: int
    n_tokens: int
    loss: float
    penalty: float
    aux_loss: float
    fvu: float
    l0: float
    dead_fraction: float
    lr: float
    coefficient: float
    grad_norm: float
    n_skipped: int
    tokens_per_s: float
    elapsed_s: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)


class Counted(Protocol):
    """What a clock counts: rows trained on, and seconds over all resumptions."""

    n_tokens: int
    elapsed_s: float


class Clock:
    """Keeps a run's elapsed_s, and tells how fast it goes."""

    def __init__(self, counted: Counted) -> None:
        self._counted = counted
        self._now_s = self._told_s = time.monotonic()
        self._told_tokens = counted.n_tokens

    def tick(self) -> None:
        """Bring elapsed_s up to date."""
        before_s, self._now_s = self._now_s, time.monotonic()
        self._counted.elapsed_s += self._now_s - before_s

    def tokens_per_s(self) -> float:
        """Since it was last asked for; brings elapsed_s up to date too."""
        self.tick()
        n_tokens, seconds = self._counted.n_tokens - self._told_tokens, self._now_s - self._told_s
        self._told_s, self._told_tokens = self._now_s, self._counted.n_tokens
        return n_tokens / max(seconds, 1e-9)


class ToDict(Protocol):
    """Metrics of a step, which they name."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""


class MetricsLog:
    """metrics.jsonl of a run: append-only, cut back to the checkpoint that a run resumes from."""

    def __init__(self, path: Path, *, after_step: int) -> None:
        """Open the log, keeping only its whole lines up to and with after_step."""
        kept = [line for line in _lines(path) if line["step"] <= after_step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._path = path
        with told(path):
            self._file = path.open("a", encoding="utf-8")

    def append(self, metrics: ToDict) -> None:
        """Add a line; readers see it at once."""
        with told(self._path):
            self._file.write(json.dumps(metrics.to_dict()) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Wait until all lines are on disk: before a checkpoint that promises them."""
        with told(self._path):
            self._file.flush()  # a line that could not be written before is promised too
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close."""
        with told(self._path):
            try:
                self.sync()
            finally:
                self._file.close()


def last_metrics(path: Path) -> Metrics | None:
    """The last line of a metrics.jsonl; None if there is none."""
    lines = _lines(path)
    return Metrics(**lines[-1]) if lines else None


def _lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a log; one cut short by a crash is dropped, with what follows it."""
    lines: list[dict[str, Any]] = []
    if not path.is_file():
        return lines
    with told(path):
        texts = path.read_bytes().splitlines()
    for text in texts:
        try:
            line = {**json.loads(text)}
            int(line["step"])
        except (ValueError, TypeError, KeyError):
            logger.warning("%s: dropped a line that was cut short or damaged", path)
            break
        lines.append(line)
    return lines
