"""Tokens/s of harvest, against the bare model cut after the hookpoint, in one run.

    python benchmarks/harvest.py [--model demo] [--dtype bfloat16] [--json]

`linear layers alone` runs every weight matrix up to the hookpoint on a batch of the same size: what
remains to any harvest is attention, norms and overhead.
"""

import itertools
import tempfile
from pathlib import Path

import torch
from machine import arguments, in_turn, show
from torch import nn

from activation_cache import LanguageModel, harvest, open_corpus


class _Stop(Exception):
    """Leaves the forward pass."""


def bare_forward(lm: LanguageModel, layer: int, batches: list[torch.Tensor]) -> None:
    """The Hugging Face model alone, left after `layer` by the barest of hooks."""

    def stop(*_: object) -> None:
        raise _Stop

    handle = lm.site(f"layers.{layer}.resid_post").module.register_forward_hook(stop)
    for ids in batches:
        try:
            with torch.no_grad():
                lm.model(input_ids=ids, use_cache=False)
        except _Stop:
            pass
    handle.remove()


def linear_layers(lm: LanguageModel, layer: int, n_rows: int, n_batches: int) -> None:
    """Every weight matrix of layers 0 to `layer`, on `n_rows` rows, `n_batches` times."""
    layers = lm.site("layers.0.resid_pre").module, lm.model.get_decoder().layers
    matrices = [
        m for one in layers[1][: layer + 1] for m in one.modules() if isinstance(m, nn.Linear)
    ]
    inputs = {m.in_features: torch.randn(n_rows, m.in_features, dtype=lm.dtype) for m in matrices}
    with torch.no_grad():
        for _ in range(n_batches):
            for m in matrices:
                m(inputs[m.in_features])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dataset", default="demo")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--ctx-len", type=int, default=256)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lm = LanguageModel.load(args.model, dtype=args.dtype)
    hookpoint, ctx_len, batch_blocks = f"layers.{args.layer}.resid_post", args.ctx_len, 8
    n_batches = args.tokens // (ctx_len * batch_blocks)
    texts = [d.text for d in itertools.islice(open_corpus(args.dataset).documents(), 200)]
    ids = torch.randint(10, lm.tokenizer.vocab_size, (n_batches, batch_blocks, ctx_len))

    def run_harvest() -> None:
        with tempfile.TemporaryDirectory() as folder:
            harvest(
                lm,
                texts,
                hookpoints=[hookpoint],
                out=Path(folder) / "acts",
                n_tokens=args.tokens,
                max_doc_tokens=1_000,
                ctx_len=ctx_len,
                batch_blocks=batch_blocks,
            )

    seconds = in_turn(
        {
            "harvest to disk": run_harvest,
            "bare model, cut": lambda: bare_forward(lm, args.layer, list(ids)),
            "linear layers alone": lambda: linear_layers(
                lm, args.layer, ctx_len * batch_blocks, n_batches
            ),
        },
        args.repeat,
    )
    fastest = {name: args.tokens / s for name, s in seconds.items()}
    rows = [
        {
            "what": name,
            "dtype": args.dtype,
            "tokens_per_s": speed,
            "harvest_over_this": fastest["harvest to disk"] / speed,
        }
        for name, speed in fastest.items()
    ]
    show("harvest", rows, args.json)


if __name__ == "__main__":
    main()
