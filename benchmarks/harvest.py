"""Tokens/s of harvest, against the bare model cut after the hookpoint, in one run.

    python benchmarks/harvest.py [--model demo] [--dtypes float32 bfloat16] [--hookpoints 4]

`linear layers alone` runs every weight matrix up to the hookpoint on a batch of the same size: what
remains to any harvest is attention, norms and overhead. Ratios are medians of the rounds' ratios;
lowest and highest are those over the linear layers. `--clock cpu` counts the processor's seconds of
all threads together, for a machine that is busy: what harvest does beside the model is then counted
as if nothing ran at the same time.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import Paired, arguments, in_rounds, show
from torch import nn

from activation_cache import LanguageModel, harvest, open_corpus

BATCH_BLOCKS = 8


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


def linear_layers(lm: LanguageModel, layer: int, n_rows: int) -> Callable[[int], None]:
    """Every weight matrix of layers 0 to `layer` on `n_rows` rows, so many times as is asked."""
    layers = lm.model.get_decoder().layers[: layer + 1]
    matrices = [m for one in layers for m in one.modules() if isinstance(m, nn.Linear)]
    widths = {m.in_features for m in matrices}
    inputs = {width: torch.randn(n_rows, width, dtype=lm.dtype) for width in widths}

    @torch.no_grad()
    def run(n_batches: int) -> None:
        for _ in range(n_batches):
            for m in matrices:
                m(inputs[m.in_features])

    return run


def measure(args: argparse.Namespace, lm: LanguageModel) -> list[dict[str, Any]]:
    """Tokens/s of one model: harvest at one and at several hookpoints, and its limits."""
    batch_rows = args.ctx_len * BATCH_BLOCKS
    n_batches = args.tokens // batch_rows
    texts = [d.text for d in itertools.islice(open_corpus(args.dataset).documents(), 200)]
    ids = torch.randint(10, lm.tokenizer.vocab_size, (n_batches, BATCH_BLOCKS, args.ctx_len))

    def run_harvest(hookpoints: list[str], n_tokens: int = args.tokens) -> None:
        with tempfile.TemporaryDirectory() as folder:
            harvest(
                lm,
                texts,
                hookpoints=hookpoints,
                out=Path(folder) / "acts",
                n_tokens=n_tokens,
                ctx_len=args.ctx_len,
                batch_blocks=BATCH_BLOCKS,
                storage_dtype=args.storage_dtype or str(lm.dtype).removeprefix("torch."),
            )

    one, several = hookpoints_up_to(args.layer, 1), hookpoints_up_to(args.layer, args.hookpoints)
    run_linear = linear_layers(lm, args.layer, batch_rows)
    candidates = {"harvest to disk": lambda: run_harvest(one)}
    if len(several) > 1:
        candidates[f"harvest, {len(several)} hookpoints"] = lambda: run_harvest(several)
    run_harvest(several, batch_rows)  # to warm up
    run_linear(1)
    seconds = in_rounds(
        candidates
        | {
            "bare model, cut": lambda: bare_forward(lm, args.layer, list(ids)),
            "linear layers alone": lambda: run_linear(n_batches),
        },
        args.repeat,
        clock=time.process_time if args.clock == "cpu" else time.perf_counter,
    )
    bare, linear = seconds["bare model, cut"], seconds["linear layers alone"]
    return [
        {
            "what": name,
            "dtype": str(lm.dtype).removeprefix("torch."),
            "tokens_per_s": n_batches * batch_rows / statistics.median(times),
            "over_bare": Paired.over(times, bare).median,
            "over_linear": Paired.over(times, linear).median,
            "lowest": Paired.over(times, linear).lowest,
            "highest": Paired.over(times, linear).highest,
        }
        for name, times in seconds.items()
    ]


def hookpoints_up_to(layer: int, n: int) -> list[str]:
    """`n` layers evenly, `layer` the last of them."""
    layers = sorted({round((layer + 1) * (i + 1) / n) - 1 for i in range(n)})
    return [f"layers.{max(number, 0)}.resid_post" for number in layers]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dataset", default="demo")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--storage-dtype", help="left out: the model's")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--hookpoints", type=int, default=4, help="so many in one pass, beside one")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--ctx-len", type=int, default=256)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for dtype in args.dtypes:
        rows += measure(args, LanguageModel.load(args.model, device="cpu", dtype=dtype))
    show("harvest", rows, args.json)


if __name__ == "__main__":
    main()
