"""Tokens/s of indexing, and how that is made up, in one run.

    python benchmarks/index.py --acts demo/acts --sae demo/run [--json]

`encode` alone is the part that any index pays: every row through the encoder. What lies above it is
the index's own.
"""

import tempfile
from pathlib import Path

import torch
from machine import arguments, in_turn, show

from activation_cache import ActivationCache, LanguageModel
from feature_db import build_index
from sae import SAE


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--acts", default="demo/acts")
    parser.add_argument("--sae", default="demo/run")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
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
    rows = [
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
    show("index", rows, args.json)


if __name__ == "__main__":
    main()
