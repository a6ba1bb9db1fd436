"""Tokens/s of a training step, over one float32 encoder product of its size, in one run.

    python benchmarks/train.py [--d-sae 4608] [--k 32] [--acts demo/acts] [--json]
    python benchmarks/train.py --peers [--d-sae 4608 18432] [--parts topk auxk batch_topk]
    python benchmarks/train.py --sizes [--figure sizes.png]

Alone it measures our own step, on any device. `--peers` sets it against the peers'
(train_peers.py), `--sizes` measures it over d_sae and k (train_sizes.py); both on the CPU.

Rows are the cache's or, without one, random with a few heavy directions. A step is what `train`
does between reading a batch and writing metrics: selecting, decoding, gradients, clipping, Adam,
renormalising.
"""

import itertools
from pathlib import Path
from typing import Any

import torch
import train_peers
import train_sizes
from machine import arguments, in_turn, show
from steppers import PEERS, our_modes
from train_rows import batches_of

from sae import BatchTopKConfig, TensorSource, TopKConfig, TrainConfig
from sae.config import SAEConfig
from sae.initialisation import input_statistics
from sae.reading import Batch
from sae.schedule import resolve
from sae.training_state import TrainingState

# Batches that follow one another: a step on the one before it again would be another one's.
N_BATCHES = 16
KINDS = {"batch_topk": BatchTopKConfig, "topk": TopKConfig}


def state(config: SAEConfig, settings: TrainConfig, x: torch.Tensor) -> TrainingState:
    """A training state after a step on each of the batches x [n, batch, d_model], so that the
    start's dense codes are over."""
    rows, widths = x.flatten(0, 1), (x.shape[2],)
    resolved = resolve(settings, config, TensorSource(rows), "x")
    statistics = input_statistics(Batch(x[0], x[0]), widths, widths)
    made = TrainingState.start(config, resolved, statistics)
    for batch in x:
        made.advance(Batch(batch, batch))
    return made


def advance(state: TrainingState, x: torch.Tensor) -> object:
    """A step on a batch."""
    return state.advance(Batch(x, x))


def synchronized(result: object) -> object:
    """The result, once the GPU has really made it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result


def alone(args: Any, d_sae: int) -> None:
    """Our step in every mode, in this process."""
    x = batches_of(args.acts, N_BATCHES, args.batch, args.d_model).to(args.device)
    W_enc = torch.randn(args.d_model, d_sae, device=args.device)
    settings = TrainConfig(n_steps=1000, batch_size=args.batch, lr=1e-3, warmup_steps=0)
    # No feature dies, so AuxK costs nothing here.
    settings = settings.model_copy(update={"dead_after_tokens": 10**12, "device": args.device})
    candidates = {"float32 encoder product": lambda: synchronized(x[0] @ W_enc)}
    for architecture, kind in KINDS.items():
        for mode in our_modes(architecture):
            if args.device != "cpu" and mode.settings.get("nominate_in") == "bfloat16":
                continue
            chosen = settings.model_copy(update=mode.settings)
            trained = state(kind(d_sae=d_sae, k=args.k), chosen, x)
            name = kind.__name__.removesuffix("Config")
            step = f"{name} step, {mode.name}"
            batches = itertools.cycle(x)
            candidates[step] = lambda t=trained, b=batches: synchronized(advance(t, next(b)))
    seconds = in_turn(candidates, max(args.repeat, 5))
    product = seconds["float32 encoder product"]
    results = [
        {
            "what": name,
            "d_sae": d_sae,
            "k": args.k,
            "ms": 1000 * s,
            "rows_per_s": args.batch / s,
            "over_product": s / product,
        }
        for name, s in seconds.items()
    ]
    show("train", results, args.json)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--d-model", type=int, default=576)
    parser.add_argument("--d-sae", type=int, nargs="+", help="each in turn")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--acts", type=Path, help="a cache whose rows are taken; else random ones")
    parser.add_argument("--warm-up", type=int, default=3, help="steps ahead, in each process")
    parser.add_argument("--peers", action="store_true", help="against the peers, in turn")
    parser.add_argument("--only-peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--parts", nargs="+", choices=train_peers.PARTS, default=train_peers.PARTS)
    parser.add_argument("--sizes", action="store_true", help="over d_sae and k")
    parser.add_argument("--figure", type=Path, help="with --sizes: a PNG to draw")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peers:
        train_peers.measure(args)
    elif args.sizes:
        train_sizes.measure(args)
    else:
        for d_sae in args.d_sae or (4608,):
            alone(args, d_sae)


if __name__ == "__main__":
    main()
