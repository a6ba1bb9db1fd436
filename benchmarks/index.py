"""Tokens/s of indexing, and how that is made up, in one run.

    python benchmarks/index.py --acts demo/acts --sae demo/run [--json]

`encode` alone is the part that any index pays: every row through the encoder. What lies above it is
the index's own.

    python benchmarks/index.py --synthetic [--n-tokens 1048576] [--d-sae 16384] [--k 32] [--json]

Counting alone, of a synthetic text on one thread: microseconds a token of each share, medians of
--repeat processes, and the most memory that one had beside the text.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import arguments, in_turn, show

from activation_cache import ActivationCache, LanguageModel
from feature_db import build_index
from sae import SAE

_NUMBERS = ("n-tokens", "d-sae", "k")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--acts", default="demo/acts")
    parser.add_argument("--sae", default="demo/run")
    parser.add_argument("--synthetic", action="store_true", help="counting alone; no model, no SAE")
    parser.add_argument("--n-tokens", type=int, default=1 << 20)
    parser.add_argument("--d-sae", type=int, default=16_384)
    parser.add_argument("--k", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(1 if args.synthetic else args.threads)
    title = "index, counting" if args.synthetic else "index"
    show(title, counted(args) if args.synthetic else indexed(args), args.json)


def indexed(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A whole index of a cache, beside its rows through the encoder alone."""
    cache, sae = ActivationCache.open(args.acts), SAE.load(args.sae)
    made_with = cache.manifest.fingerprint
    lm = LanguageModel.load(made_with.model, dtype=made_with.model_dtype)
    hookpoint = str(sae.hookpoint)

    def encode() -> None:
        for chunk in cache.chunks(hookpoint):
            sae.encode_sparse(chunk.acts[~chunk.is_massive])

    def index() -> None:
        with tempfile.TemporaryDirectory() as folder:
            build_index(lm, [args.sae], cache, out=Path(folder) / "i.duckdb")

    seconds = in_turn({"encode": encode, "index, all tables": index}, args.repeat)
    return [
        {
            "what": name,
            "tokens": cache.n_tokens,
            "d_sae": sae.d_sae,
            "seconds": s,
            "tokens_per_s": cache.n_tokens / s,
            "microseconds_per_token": 1e6 * s / cache.n_tokens,
        }
        for name, s in seconds.items()
    ]


def counted(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Shares of counting, from processes one after the other."""
    numbers = [f"--{name}={vars(args)[name.replace('-', '_')]}" for name in _NUMBERS]
    command = [sys.executable, Path(__file__).with_name("counting.py"), *numbers]
    found = [json.loads(subprocess.check_output(command)) for _ in range(args.repeat)]
    taken = [each["microseconds"] for each in found]
    peak_gb = max(each["peak_gb"] for each in found)
    return [
        {
            "part": name,
            "microseconds_per_token": statistics.median(each[name] for each in taken),
            "peak_gb": peak_gb if name == "counting" else None,
        }
        for name in taken[0]
    ]


if __name__ == "__main__":
    main()
