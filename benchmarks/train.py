"""Tokens/s of a training step, over one float32 encoder product of its size, in one run.

    python benchmarks/train.py [--d-sae 4608] [--k 32] [--json]

Rows are random with a few heavy directions; time does not depend on what they mean. A step is what
`train` does between reading a batch and writing metrics: select, decode, gradients, clip, Adam,
renormalise.
"""

import torch
from machine import arguments, in_turn, show

from sae import BatchTopKConfig, TensorSource, TopKConfig, TrainConfig
from sae.config import SAEConfig
from sae.initialisation import input_statistics
from sae.schedule import resolve
from sae.training_state import TrainingState


def rows(n: int, d_model: int) -> torch.Tensor:
    """Random rows with a spectrum that falls off as a residual stream's does."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, d_model + 1).float().pow(-0.5)
    basis = torch.linalg.qr(torch.randn(d_model, d_model, generator=generator)).Q
    return (torch.randn(n, d_model, generator=generator) * scale) @ basis * 10


def state(config: SAEConfig, settings: TrainConfig, x: torch.Tensor) -> TrainingState:
    """A training state after a few steps, so that the start's dense codes are over."""
    resolved = resolve(settings, config, TensorSource(x), "x")
    made = TrainingState.start(config, resolved, input_statistics(x, "mean"))
    for _ in range(5):
        made.advance(x)
    return made


def synchronized(result: object) -> object:
    """The result, once the GPU has really made it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--d-model", type=int, default=576)
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    x = rows(args.batch, args.d_model).to(args.device)
    W_enc = torch.randn(args.d_model, args.d_sae, device=args.device)
    settings = TrainConfig(n_steps=1000, batch_size=args.batch, lr=1e-3, warmup_steps=0)
    # No feature dies, so AuxK costs nothing here.
    settings = settings.model_copy(update={"dead_after_tokens": 10**12, "device": args.device})
    candidates = {"float32 encoder product": lambda: synchronized(x @ W_enc)}
    precisions = ("float32", "bfloat16") if args.device == "cpu" else ("float32",)
    for kind in (BatchTopKConfig, TopKConfig):
        for precision in precisions:
            chosen = settings.model_copy(update={"nominate_in": precision})
            trained = state(kind(d_sae=args.d_sae, k=args.k), chosen, x)
            name = kind.__name__.removesuffix("Config")
            candidates[f"{name} step, {precision}"] = lambda t=trained: synchronized(t.advance(x))
    seconds = in_turn(candidates, max(args.repeat, 5))
    product = seconds["float32 encoder product"]
    results = [
        {
            "what": name,
            "d_sae": args.d_sae,
            "k": args.k,
            "ms": 1000 * s,
            "rows_per_s": args.batch / s,
            "over_product": s / product,
        }
        for name, s in seconds.items()
    ]
    show("train", results, args.json)


if __name__ == "__main__":
    main()
