"""Training steps on request, one at a time: what the drivers of `train_peers.py` share.

A driver runs in its peer's environment, so this module needs only numpy and torch. It builds the
peer's own trainer and takes its batches from `StepServer.batches`, which gives one when the parent
asks for a step and reports the seconds until the next one is wanted. The parent writes one JSON
object a line to stdin:

    {"do": "step", "dead": false, "save": null}    -> {"seconds": 0.31}
    {"do": "memory"}                               -> {"peak_mib": 1598, "imports_mib": 610}
    {"do": "stop"}

With "dead", a tenth of the features counts as dead in that step, with encoder rows so short that
none of them fires. With "save", the file named there gets the weights ahead of the step and the
gradients in it (`.npz`).
Answers begin with ANSWER, for peers print to stdout too.
"""

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ANSWER = "@ "
DEAD_FRACTION = 0.1
# Length of a dead feature's encoder row, over that of the others: far too short to be chosen.
DEAD_LENGTH = 0.1


@dataclass(frozen=True)
class Spec:
    """What is trained, and how: the driver's one argument, as JSON.

    rows: a .npy of float32 [n_batches, batch, d_model]. architecture: "topk" or "batch_topk".
    mode: what a driver lists. lr: Adam's. settings: more of them, for our own trainer.
    """

    rows: str
    d_sae: int
    k: int
    architecture: str
    mode: str
    threads: int
    lr: float
    settings: dict[str, Any]


@dataclass(frozen=True)
class Watched:
    """What the parent may look at and change in a trainer.

    weights: W_enc, W_dec [d_sae, d_model], b_enc, b_dec: each a parameter and whether it lies
    transposed. set_dead: makes features [n_dead] count as dead (True) or as just active.
    scale: of the rows that are trained on, over those given. variance: that the loss is divided
    by, where it is a constant.
    """

    weights: Mapping[str, tuple[Tensor, bool]]
    set_dead: Callable[[Tensor, bool], None]
    scale: float = 1.0
    variance: float = 1.0


class StepServer:
    """Gives batches as steps are asked for, and times what happens between them."""

    def __init__(self, package: str) -> None:
        """package: whose version is reported."""
        self.spec = Spec(**json.loads(sys.argv[1]))
        torch.set_num_threads(self.spec.threads)
        torch.manual_seed(0)
        self._imports_mib = memory_mib("VmRSS")
        self.rows = torch.from_numpy(np.load(self.spec.rows))
        self.watched: Watched | None = None
        self._gradients: dict[str, np.ndarray] = {}
        self._is_saving = False
        version = importlib.metadata.version(package)
        self._answer({"version": version})

    @property
    def d_model(self) -> int:
        """Width of the rows."""
        return self.rows.shape[2]

    @property
    def dead_ids(self) -> Tensor:
        """The features that count as dead where that is asked for."""
        d_sae = self.spec.d_sae
        return torch.arange(d_sae)[:: round(1 / DEAD_FRACTION)]

    def watch(self, watched: Watched) -> None:
        """Say how the trainer's weights and counters are reached; once, when it is built."""
        self.watched = watched
        for name, (weight, is_transposed) in watched.weights.items():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(self._keeper(name, is_transposed))

    def batches(self) -> Iterator[Tensor]:
        """Rows [batch, d_model], in turn, as steps are asked for; ends when the parent says so."""
        n_steps = 0
        while (command := self._next_step()) is not None:
            assert self.watched is not None
            if command["dead"]:
                self._shorten_dead_()
            self.watched.set_dead(self.dead_ids, command["dead"])
            x = self.rows[n_steps % len(self.rows)]
            before = self.snapshot() if command["save"] else {}
            self._is_saving = bool(command["save"])
            started = time.perf_counter()
            yield x
            seconds = time.perf_counter() - started
            if command["save"]:
                self._save(Path(command["save"]), x, before)
            n_steps += 1
            self._answer({"seconds": seconds})

    def snapshot(self) -> dict[str, np.ndarray]:
        """The weights, feature by feature, ahead of a step that is saved."""
        assert self.watched is not None
        return {
            name: _rows_of_features(weight, is_transposed)
            for name, (weight, is_transposed) in self.watched.weights.items()
        }

    def gradients(self) -> dict[str, np.ndarray]:
        """Of the step that is saved; our own driver, which has no autograd, overrides this."""
        return self._gradients

    @torch.no_grad()
    def _shorten_dead_(self) -> None:
        """Make the dead features' encoder rows short, whatever AuxK made of them so far."""
        assert self.watched is not None
        weight, is_transposed = self.watched.weights["W_enc"]
        rows = weight.T if is_transposed else weight  # [d_sae, d_model]
        norms = rows.norm(dim=1, keepdim=True)
        rows[self.dead_ids] *= DEAD_LENGTH * norms.median() / norms[self.dead_ids]
        self.watched.weights["b_enc"][0][self.dead_ids] = 0.0

    def _save(self, path: Path, x: Tensor, before: dict[str, np.ndarray]) -> None:
        assert self.watched is not None
        gradients = {f"grad.{name}": each for name, each in self.gradients().items()}
        np.savez(
            path,
            x=x.numpy() * np.float32(self.watched.scale),
            variance=self.watched.variance,
            dead_ids=self.dead_ids.numpy(),
            **before,
            **gradients,
        )

    def _keeper(self, name: str, is_transposed: bool) -> Callable[[Tensor], None]:
        def keep(weight: Tensor) -> None:
            """The gradient as backward leaves it: ahead of projection and clipping."""
            if self._is_saving and weight.grad is not None:
                self._gradients[name] = _rows_of_features(weight.grad, is_transposed)

        return keep

    def _next_step(self) -> dict[str, Any] | None:
        for line in sys.stdin:
            command: dict[str, Any] = json.loads(line)
            if command["do"] == "step":
                return command
            if command["do"] == "stop":
                return None
            peak = memory_mib("VmHWM")
            self._answer({"peak_mib": peak, "imports_mib": self._imports_mib})
        return None

    def _answer(self, fields: dict[str, Any]) -> None:
        print(ANSWER + json.dumps(fields), flush=True)


def memory_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (its peak) of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _rows_of_features(tensor: Tensor, is_transposed: bool) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.T if is_transposed else tensor).float().numpy().copy()
