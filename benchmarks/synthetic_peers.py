"""SAELens' trainer beside ours on known features: same rows in the same order, scored alike.

    benchmarks/peers/make_env.sh sae-lens
    python benchmarks/synthetic_peers.py --threads 1 --worlds saebase
    python benchmarks/synthetic_peers.py --threads 1 --worlds sae-lens --k 11 --n-steps 800

A world is made by our generator or by SAELens' own, once for each seed, and its rows are written to
disk; both trainers read them in that order. Architecture, d_sae, k, batch, steps, Adam, warm-up,
decay and after how many rows a feature is dead are the same; all else is each trainer's own. The
first seed is trained at every learning rate; the others at the one of the best `matched_cosine`.
"sae-lens scaled" has SAELens scale rows to norm sqrt(d_model) first, as ours does. Every SAE is
scored by `sae.synthetic` and, columns "their ...", by `sae_lens.synthetic`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from machine import arguments, show
from safetensors.torch import load_file, save_file
from steppers import OURS, ROOT
from torch import Tensor

from sae import SAE, TrainConfig, train
from sae.architectures import config_of
from sae.codes import Codes
from sae.synthetic import SyntheticConfig, SyntheticSource, SyntheticTruth, TrueRows, score
from sae.synthetic.source import BLOCK_ROWS
from sae.synthetic.truth import rows_of

PEER = "sae-lens"
PEERS_PYTHON = ROOT / ".venv-peers" / PEER / "bin" / "python"
DRIVER = ROOT / "benchmarks" / "peers" / "synthetic_sae_lens.py"
SHOWN = (
    "true_l0",
    "l0",
    "fvu",
    "fvu_truth",
    "n_dead",
    "matched_cosine",
    "recovery",
    "recovered",
    "uniqueness",
    "f1",
    "f1_of_features",
    "absorbed",
    "parent_missed_with_child",
    "parent_missed_alone",
)
# Generators seeded alike draw alike: an SAE with its world's seed would start at SAELens' truth.
START_SEED = 1000
WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")


class WrittenTruth(NamedTuple):
    """The part of a SyntheticTruth that scores look at."""

    directions: Tensor
    bias: Tensor
    parents: Tensor


class WrittenWorld(SyntheticSource):
    """A world on disk, whoever made it: train rows come in the order in which they lie there."""

    def __init__(self, folder: Path) -> None:
        self._rows = {name: np.load(folder / f"{name}.npy", "r") for name in ("train", "heldout")}
        self._n_blocks = {name: len(rows) // BLOCK_ROWS for name, rows in self._rows.items()}
        arrays = {name: torch.from_numpy(x) for name, x in np.load(folder / "truth.npz").items()}
        self.truth = WrittenTruth(*(arrays[name] for name in WrittenTruth._fields))
        self._codes = Codes(*(arrays[name] for name in Codes._fields))

    def d_model(self, hookpoint: str) -> int:
        """Width of rows."""
        del hookpoint
        return len(self.truth.bias)

    def block(self, split: str, number: int) -> TrueRows:
        """A block of held-out rows; what fired in train rows isn't kept."""
        assert split == "heldout"
        start = number * BLOCK_ROWS
        offsets = self._codes.offsets[start : start + BLOCK_ROWS + 1]
        part = slice(int(offsets[0]), int(offsets[-1]))
        codes = Codes(self._codes.acts[part], self._codes.feature_ids[part], offsets - offsets[0])
        clean = rows_of(codes, self.truth.directions) + self.truth.bias
        return TrueRows(self._at(split, start, start + BLOCK_ROWS), codes, clean)

    def batches(self, hookpoint: str, batch_size: int, *, split: str = "train", **how: Any) -> Any:
        """Rows in their order; the seed of an order is ignored, one process reads all."""
        del hookpoint
        start_batch, epochs = how.get("start_batch", 0), how.get("epochs", 1)
        n_rows = self.n_rows("", split=split)
        assert n_rows % batch_size == 0 or epochs == 1
        batch = start_batch
        while epochs is None or batch * batch_size < epochs * n_rows:
            start = batch * batch_size % n_rows
            yield self._at(split, start, start + batch_size)
            batch += 1

    def provenance(self, hookpoint: str) -> dict[str, Any]:
        """That it was read from disk."""
        return {"source": "written", "hookpoint": hookpoint}

    def _at(self, split: str, start: int, stop: int) -> Tensor:
        return torch.from_numpy(self._rows[split][start:stop].copy())


class Bench:
    """One world of one seed, in a folder, and the trainings on it."""

    def __init__(self, maker: str, seed: int, folder: Path, args: argparse.Namespace) -> None:
        self._maker, self._seed, self._folder, self._args = maker, seed, folder, args
        if maker == OURS:
            write_ours(folder, seed, args)
        else:
            self._ask("make", n_rows=args.n_steps * args.batch_size, d_model=args.d_model)
        self._source = WrittenWorld(folder)

    def row(self, trainer: str, architecture: str, lr: float) -> dict[str, Any]:
        """Train, and score with both scorers."""
        path = self._folder / "sae.safetensors"
        asked = {"architecture": architecture, "lr": lr, "sae": str(path)}
        asked |= {"start_seed": START_SEED + self._seed}
        if trainer == OURS:
            started = time.perf_counter()
            sae = self._train_ours(architecture, lr)
            seconds = time.perf_counter() - started
            save(sae, path)
            theirs = self._ask("score", **asked) if PEERS_PYTHON.exists() else {}
        else:
            answer = self._ask("train", **asked, is_normalised=trainer.endswith("scaled"))
            seconds, theirs = answer["s"], answer["scores"]
            sae = loaded(path, architecture, self._args.k)
        found = score(sae, self._source)
        return {
            "world": self._maker,
            "what": f"{trainer}, {architecture}",
            "lr": lr,
            "seed": self._seed,
            **{name: getattr(found, name) for name in SHOWN},
            **{f"their {name}": value for name, value in theirs.items()},
            "s": seconds,
        }

    def _train_ours(self, architecture: str, lr: float) -> SAE:
        args = self._args
        how = TrainConfig(
            n_steps=args.n_steps,
            batch_size=args.batch_size,
            lr=lr,
            seed=START_SEED + self._seed,
            device="cpu",
            dead_after_tokens=args.n_steps // 10 * args.batch_size,
            checkpoint_every_steps=args.n_steps,
        )
        config = config_of(architecture, {"d_sae": args.d_sae, "k": args.k})
        with tempfile.TemporaryDirectory() as run:
            return train(self._source, "written", config, how, out=run).sae

    def _ask(self, command: str, **more: Any) -> dict[str, Any]:
        """What the driver answers, in the peer's environment."""
        spec = {**vars(self._args), "world": str(self._folder), "seed": self._seed, **more}
        asked = [PEERS_PYTHON, DRIVER, command, json.dumps(spec)]
        done = subprocess.run(asked, stdout=subprocess.PIPE, check=True)
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer


def write_ours(folder: Path, seed: int, args: argparse.Namespace) -> None:
    """A world of ours, as the driver's `make` writes one of theirs."""
    n_rows = args.n_steps * args.batch_size
    config = SyntheticConfig(
        n_features=args.n_features,
        d_model=args.d_model,
        n_parents=args.n_features // 16,
        n_rows=n_rows,
        n_heldout_rows=args.n_heldout_rows,
        seed=seed,
    )
    source = SyntheticSource(SyntheticTruth(config))
    shape = (n_rows, args.d_model)
    train_rows = np.lib.format.open_memmap(folder / "train.npy", "w+", np.float32, shape)
    for number, x in enumerate(source.batches("", args.batch_size, seed=seed)):
        start = number * args.batch_size
        train_rows[start : start + args.batch_size] = x[: n_rows - start].numpy()
    blocks = [source.block("heldout", i) for i in range(args.n_heldout_rows // BLOCK_ROWS)]
    np.save(folder / "heldout.npy", torch.cat([block.x for block in blocks]).numpy())
    codes = Codes.concatenate(block.codes for block in blocks)
    truth = WrittenTruth(*(getattr(source.truth, name) for name in WrittenTruth._fields))
    arrays = {**truth._asdict(), **codes._asdict()}
    np.savez(folder / "truth.npz", **{name: each.numpy() for name, each in arrays.items()})


def save(sae: SAE, path: Path) -> None:
    """The weights, and BatchTopK's threshold feature by feature."""
    weights = {name: getattr(sae, name).detach().contiguous() for name in WEIGHTS}
    if sae.architecture == "batch_topk":
        weights["threshold"] = sae.threshold.float().expand(sae.d_sae).contiguous()
    save_file(weights, path)


@torch.no_grad()
def loaded(path: Path, architecture: str, k: int) -> SAE:
    """What the driver saved, as an SAE of ours: decoder rows are of norm 1 in both."""
    weights = load_file(path)
    d_model, d_sae = weights["W_enc"].shape
    sae = SAE(config_of(architecture, {"d_sae": d_sae, "k": k}), d_model)
    for name in WEIGHTS:
        getattr(sae, name).copy_(weights[name])
    if architecture == "batch_topk":
        sae.threshold.copy_(weights["threshold"][0])
    return sae


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--worlds", nargs="+", default=[OURS, PEER], choices=[OURS, PEER])
    parser.add_argument("--architectures", nargs="+", default=["batch_topk"])
    trainers = [OURS, PEER, f"{PEER} scaled"]
    parser.add_argument("--trainers", nargs="+", default=trainers[:2], choices=trainers)
    parser.add_argument("--lrs", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--n-features", type=int, default=2048)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--n-steps", type=int, default=2400)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--n-heldout-rows", type=int, default=16_384)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if {*args.worlds, *args.trainers} != {OURS} and not PEERS_PYTHON.exists():
        raise SystemExit(f"{PEERS_PYTHON} isn't there: benchmarks/peers/make_env.sh {PEER}")
    rows: list[dict[str, Any]] = []
    for maker in args.worlds:
        best: dict[tuple[str, str], float] = {}
        for seed in range(args.seeds):
            with tempfile.TemporaryDirectory() as folder:
                bench = Bench(maker, seed, Path(folder), args)
                for each in [(t, a) for a in args.architectures for t in args.trainers]:
                    lrs = [best[each]] if each in best else args.lrs
                    trained = [shown(bench.row(*each, lr)) for lr in lrs]
                    best[each] = max(trained, key=lambda row: row["matched_cosine"])["lr"]
                    rows += trained
    show(f"synthetic --peers: {args.n_features:,} features, {args.n_steps} steps", rows, args.json)


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """The row, printed: all of them take long."""
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


if __name__ == "__main__":
    main()
