"""Whether a trainer's step gives the gradients of the loss that it documents.

A few steps on a tiny problem, then one whose gradients are compared with float64 autograd
(benchmarks/peers/documented_losses.py): once without dead features, once with a tenth of them.
"""

import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from steppers import Mode, Stepper, StepperError
from steppers import Problem as Setting
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent / "peers"))
from documented_losses import NAMES, Problem

D_MODEL, D_SAE, K, BATCH = 32, 256, 8, 512
WARM_UP_STEPS = 3
# Of float32, and of products in bfloat16: 2^-9 of each number, and near equals chosen otherwise,
# which weighs most in a problem so small. A part that is missing makes 0.4 and more.
TOLERANCE, LOW_TOLERANCE = 1e-3, 0.2


class Verdict(NamedTuple):
    """is_correct; error: the largest relative error of a weight's gradient; why it isn't."""

    is_correct: bool
    error: float
    why: str

    def __str__(self) -> str:
        return f"yes ({self.error:.0e})" if self.is_correct else f"no ({self.why})"


class Verdicts(NamedTuple):
    """plain: without dead features. auxk: of the dead features' weights, with a tenth dead."""

    plain: Verdict
    auxk: Verdict


def check(mode: Mode) -> Verdicts:
    """Both verdicts on a mode; one that doesn't run is no mode that trains correctly."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            plain, auxk = _saved_steps(mode, Path(folder))
    except StepperError as error:
        failed = Verdict(False, float("nan"), f"does not run: {error}"[:160])
        return Verdicts(failed, failed)
    return Verdicts(_verdict_plain(mode, *plain), _verdict_auxk(mode, *auxk))


def _saved_steps(mode: Mode, folder: Path) -> list[tuple[Problem, dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(4, BATCH, D_MODEL, generator=generator)
    np.save(folder / "rows.npy", rows.numpy())
    setting = Setting(folder / "rows.npy", D_SAE, K, threads=1)
    with Stepper(mode, setting, max_grad_norm=None) as stepper:
        for _ in range(WARM_UP_STEPS):
            stepper.step()
        stepper.step(save=folder / "plain.npz")
        stepper.step(save=folder / "auxk.npz", dead=True)
    return [_read(mode, folder / name) for name in ("plain.npz", "auxk.npz")]


def _read(mode: Mode, file: Path) -> tuple[Problem, dict[str, Tensor]]:
    """The problem of a saved step, and the gradients that the trainer made of it."""
    with np.load(file) as saved:
        tensors = {name: torch.from_numpy(saved[name]) for name in saved.files}
    problem = Problem(
        trainer=mode.trainer,
        architecture=mode.architecture,
        k=K,
        rescales=mode.trainer == "sae-lens" and mode.name != "sparse",
        x=tensors["x"].double(),
        weights={name: tensors[name].double() for name in NAMES},
        dead_ids=tensors["dead_ids"],
        variance=float(tensors["variance"]),
    )
    return problem, {name: tensors[f"grad.{name}"].double() for name in NAMES}


def _verdict_plain(mode: Mode, problem: Problem, found: dict[str, Tensor]) -> Verdict:
    expected = _comparable(mode, problem, problem.gradients(auxk=False))
    errors = {name: _error(found[name], expected[name]) for name in NAMES}
    worst = max(errors, key=lambda name: errors[name])
    why = f"gradient of {worst} off by {errors[worst]:.0%}"
    return Verdict(errors[worst] <= _tolerance(mode), errors[worst], why)


def _verdict_auxk(mode: Mode, problem: Problem, found: dict[str, Tensor]) -> Verdict:
    """On the dead features' rows alone, which AuxK alone gives a gradient: they don't fire."""
    dead, expected = problem.dead_ids, _comparable(mode, problem, problem.gradients(auxk=True))
    names = ("W_enc", "W_dec", "b_enc")
    errors = {name: _error(found[name][dead], expected[name][dead]) for name in names}
    worst = max(errors.values())
    why = f"AuxK's gradients off by {worst:.0%}"
    if not found["W_enc"][dead].any():
        why = "AuxK gives the encoder no gradient"
    return Verdict(worst <= _tolerance(mode), worst, why)


def _comparable(mode: Mode, problem: Problem, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Ours are read after the part along each decoder row is taken away, the peers' ahead of it."""
    if not mode.is_ours:
        return gradients
    W_dec = problem.weights["W_dec"]
    W_dec = W_dec / W_dec.norm(dim=1, keepdim=True)
    along = (gradients["W_dec"] * W_dec).sum(1, keepdim=True)
    return {**gradients, "W_dec": gradients["W_dec"] - along * W_dec}


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _tolerance(mode: Mode) -> float:
    return LOW_TOLERANCE if mode.is_low_precision else TOLERANCE
