"""Trainers in processes of their own, each making a training step when it is told to.

A `Mode` is a trainer in one way of running it; a `Stepper` is the process that runs it, through a
driver in benchmarks/peers. Peers live in environments of their own (benchmarks/peers/make_env.sh).
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

from sae.kernels import TIERS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OURS = "saebase"
ANSWER = "@ "


class Peer(NamedTuple):
    """driver: its file in benchmarks/peers. modes: by architecture, those that it has."""

    driver: str
    modes: dict[str, tuple[str, ...]]


PEERS = {
    "sae-lens": Peer(
        "train_sae_lens.py",
        {"topk": ("float32", "bfloat16", "sparse"), "batch_topk": ("float32", "bfloat16")},
    ),
    "eai-sparsify": Peer("train_sparsify.py", {"topk": ("float32", "bfloat16")}),
    "dictionary-learning": Peer(
        "train_dictionary_learning.py",
        {"topk": ("float32", "bfloat16"), "batch_topk": ("float32", "bfloat16")},
    ),
}


@dataclass(frozen=True)
class Mode:
    """trainer: ours or a package. architecture: "topk" or "batch_topk". settings: for ours."""

    trainer: str
    architecture: str
    name: str
    settings: dict[str, Any] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        return f"{self.trainer}, {self.name}"

    @property
    def is_ours(self) -> bool:
        return self.trainer == OURS

    @property
    def is_low_precision(self) -> bool:
        """Whether its gradients are those of bfloat16 products: ours are float32's all the same."""
        return self.name == "bfloat16" and not self.is_ours


class Problem(NamedTuple):
    """What every stepper of a comparison gets. rows: a .npy [n_batches, batch, d_model]."""

    rows: Path
    d_sae: int
    k: int
    threads: int
    lr: float = 1e-3


class StepperError(Exception):
    """A process that could not start or ended early; the message has the end of its stderr."""


def our_modes(architecture: str) -> list[Mode]:
    """Every tier of kernels that works here, in every precision that it has."""
    cpu = torch.device("cpu")
    return [
        Mode(OURS, architecture, f"{name}, {each}", {"kernels": name, "nominate_in": each})
        for name, tier in TIERS.items()
        if tier.missing(cpu) is None
        for each in tier.precisions(cpu)
    ]


def peer_modes(architecture: str, peers: Sequence[str] = tuple(PEERS)) -> list[Mode]:
    """Every mode of the peers whose environments are there; the others are named on stderr."""
    modes = []
    for name in peers:
        if not _python(name).exists():
            print(f"no {name}: benchmarks/peers/make_env.sh {name}", file=sys.stderr)
            continue
        modes += [Mode(name, architecture, m) for m in PEERS[name].modes.get(architecture, ())]
    return modes


class Stepper:
    """A trainer in a process of its own. Use it as a context, or `close` it."""

    def __init__(self, mode: Mode, problem: Problem, **settings: Any) -> None:
        """settings: more of them for our own trainer.

        Raises: StepperError.
        """
        self.mode = mode
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115
        spec = {
            **problem._asdict(),
            "rows": str(problem.rows),
            "architecture": mode.architecture,
            "mode": mode.name,
            "settings": {**mode.settings, **settings} if mode.is_ours else {},
        }
        driver = "train_saebase.py" if mode.is_ours else PEERS[mode.trainer].driver
        self._process = subprocess.Popen(
            [str(_python(mode.trainer)), str(HERE / "peers" / driver), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=_environment(mode, problem.threads),
        )
        self.version: str = self._answer()["version"]

    def step(self, *, dead: bool = False, save: Path | None = None) -> float:
        """Seconds of one step. dead: a tenth of the features counts as dead. save: see the server.

        Raises: StepperError.
        """
        command = {"do": "step", "dead": dead, "save": None if save is None else str(save)}
        return float(self._ask(command)["seconds"])

    def memory_mib(self) -> tuple[float, float]:
        """Its peak of resident memory so far, and what it had when all was imported."""
        answer = self._ask({"do": "memory"})
        return answer["peak_mib"], answer["imports_mib"]

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.communicate()
        self._stderr.close()

    def __enter__(self) -> "Stepper":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                answer: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
                return answer
        raise self._failure()

    def _failure(self) -> StepperError:
        self._process.wait()
        self._stderr.seek(0)
        lines = [line for line in self._stderr.read().splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line.split(":")[0]]
        return StepperError(f"{self.mode}: {(errors or lines or ['no message'])[-1][:300]}")


def _python(trainer: str) -> Path:
    if trainer == OURS:
        return Path(sys.executable)
    return ROOT / ".venv-peers" / trainer / "bin" / "python"


def _environment(mode: Mode, threads: int) -> dict[str, str]:
    """A peer sees none of our path; its writes of caches and logs go nowhere near the network."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if mode.is_ours:
        env["PYTHONPATH"] = str(ROOT)
    return {**env, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
