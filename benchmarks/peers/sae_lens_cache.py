"""SAELens' cache of activations: written and read through its own classes, for `storage.py`.

    .venv-peers/sae-lens/bin/python benchmarks/peers/sae_lens_cache.py \
        --passes FILE --cache FOLDER --rows N write|read

`write`: its CacheActivationsRunner, whose store is replaced by one that gives the rows of FILE, in
turn. `read`: its ActivationsStore on that folder, next_batch() as its trainer calls it. Prints one
JSON object as its last line.
"""

import argparse
import importlib.metadata
import json
import time
import warnings
from pathlib import Path

import datasets
import sae_lens.cache_activations_runner as runner_module
import torch
from sae_lens import ActivationsStore, CacheActivationsRunner, CacheActivationsRunnerConfig
from safetensors.torch import load_file
from transformer_lens import HookedTransformer, HookedTransformerConfig

HOOK = "blocks.0.hook_resid_post"
CTX_LEN, BATCH = 256, 4_096


class Rows:
    """In place of the runner's store: passes of rows, [2048, d_model] each, in turn."""

    def __init__(self, passes: list[torch.Tensor]):
        self._passes, self._at = passes, 0

    def get_raw_llm_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self._passes[self._at % len(self._passes)]
        self._at += 1
        return rows, torch.arange(len(rows)) % CTX_LEN


def small_model() -> HookedTransformer:
    """What the classes ask for; it never runs."""
    config = HookedTransformerConfig(
        n_layers=1, d_model=16, n_ctx=CTX_LEN, d_head=8, d_vocab=64, act_fn="relu", device="cpu"
    )
    return HookedTransformer(config)


def write(args: argparse.Namespace) -> float:
    """Seconds of writing, from memory to its folder."""
    passes = list(load_file(args.passes).values())
    dtype = getattr(torch, args.dtype)
    pass_rows, d_model = passes[0].shape
    # its shards have as many passes each, and the last one too: one shard, or equal ones
    n_passes = args.rows // pass_rows
    per_shard = next(n for n in range(min(n_passes, 256), 0, -1) if n_passes % n == 0)
    config = CacheActivationsRunnerConfig(
        dataset_path="",
        model_name="",
        model_batch_size=pass_rows // CTX_LEN,
        hook_name=HOOK,
        d_in=d_model,
        training_tokens=args.rows,
        context_size=CTX_LEN,
        new_cached_activations_path=str(args.cache),
        shuffle=False,
        dtype=args.dtype,
        device="cpu",
        buffer_size_gb=(per_shard * pass_rows + 0.5) * d_model * dtype.itemsize / 1e9,
    )
    runner_module.load_model = lambda **_: small_model()
    tokens = datasets.Dataset.from_dict({"input_ids": [[0] * CTX_LEN] * 4})
    runner = CacheActivationsRunner(config, override_dataset=tokens)
    runner.activations_store = Rows([rows.to(dtype) for rows in passes])
    started = time.perf_counter()
    runner.run()
    return time.perf_counter() - started


def read(args: argparse.Namespace) -> float:
    """Seconds of as many batches as an epoch has, after the first one, which fills the buffer."""
    d_model = next(iter(load_file(args.passes).values())).shape[1]
    store = ActivationsStore(
        model=small_model(),
        dataset=None,
        streaming=False,
        hook_name=HOOK,
        hook_head_index=None,
        context_size=CTX_LEN,
        d_in=d_model,
        n_batches_in_buffer=args.buffer_rows // CTX_LEN,  # prompts, in spite of its name
        total_training_tokens=args.rows,
        store_batch_size_prompts=32,  # its default
        train_batch_size_tokens=BATCH,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        cached_activations_path=str(args.cache),
    )
    store.next_batch()
    started = time.perf_counter()
    for _ in range(args.rows // BATCH):
        batch = store.next_batch()
    seconds = time.perf_counter() - started
    if batch.shape != (BATCH, d_model) or batch.dtype != torch.float32:
        raise SystemExit(f"expected float32 batches of {BATCH}, got {batch.dtype} {batch.shape}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=["write", "read"])
    parser.add_argument("--passes", type=Path, required=True, help="safetensors of float32 passes")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--dtype", default="float32", help="on disk: float32 or float16")
    parser.add_argument("--buffer-rows", type=int, default=20 * CTX_LEN, help="that are mixed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    seconds = {"write": write, "read": read}[args.task](args)
    version = importlib.metadata.version("sae-lens")
    print(json.dumps({"version": version, "rows": args.rows, "seconds": seconds}))


if __name__ == "__main__":
    main()
