"""Our own training step, for `train_peers.py`, in a process of its own as the peers' are.

PYTHONPATH=. python benchmarks/peers/train_saebase.py SPEC
"""

import numpy as np
import torch
from step_server import Spec, StepServer, Watched
from torch import Tensor

from sae import BatchTopKConfig, TensorSource, TopKConfig, TrainConfig
from sae.reading import Batch
from sae.run import started
from sae.run_folder import RunPlan
from sae.schedule import resolve
from sae.training_state import TrainingState
from sae.wiring import wiring_of

NEVER = 10**12


def new_state(spec: Spec, rows: Tensor) -> TrainingState:
    """All that is asked of `sae`: a state whose `advance` is one step.

    rows: [n_batches, batch, d_model].
    """
    kind = BatchTopKConfig if spec.architecture == "batch_topk" else TopKConfig
    config, sample = kind(d_sae=spec.d_sae, k=spec.k), rows.flatten(0, 1)
    settings = TrainConfig(
        n_steps=100_000,
        batch_size=rows.shape[1],
        lr=spec.lr,
        warmup_steps=0,
        dead_after_tokens=NEVER,
        device="cpu",
        **spec.settings,
    )
    source, wiring = TensorSource(sample), wiring_of("rows")
    plan = RunPlan.of(source, wiring, config, resolve(settings, config, source, wiring))
    return started(source, plan)


class OurServer(StepServer):
    """Reads gradients off Adam's mean of them, which whatever computes a step has to keep."""

    def __init__(self) -> None:
        super().__init__("saebase")
        self.state = new_state(self.spec, self.rows)
        sae = self.state.sae
        weights = {
            "W_enc": (sae.W_enc, True),
            "W_dec": (sae.W_dec, False),
            "b_enc": (sae.b_enc, False),
            "b_dec": (sae.b_dec, False),
        }
        scale = float(self.state.normalisation.in_scale[0])
        watched = Watched(weights, self.set_dead, scale, self.state.variance)
        self.watch(watched)

    def set_dead(self, ids: Tensor, dead: bool) -> None:
        """Make features count as dead, or as just active."""
        self.state.tokens_since_active[ids] = NEVER if dead else 0

    def snapshot(self) -> dict[str, np.ndarray]:
        """The weights, and Adam's means as they are ahead of the step."""
        self._means = self._adam_means()
        return super().snapshot()

    def gradients(self) -> dict[str, np.ndarray]:
        """Of the step just made: the mean is beta1 * (what it was) + (1 - beta1) * gradient."""
        beta1 = self.state.config.beta1
        return {
            name: (mean - beta1 * self._means[name]) / (1 - beta1)
            for name, mean in self._adam_means().items()
        }

    def _adam_means(self) -> dict[str, np.ndarray]:
        tensors = self.state.to_checkpoint().tensors
        return {
            name.removeprefix("adam.mean."): each.double().numpy().copy()
            for name, each in tensors.items()
            if name.startswith("adam.mean.")
        }


def main() -> None:
    server = OurServer()
    with torch.no_grad():
        for x in server.batches():
            server.state.advance(Batch(x, x))


if __name__ == "__main__":
    main()
