"""eai-delphi's way to every feature's strongest contexts, for `index_peers.py`, of given codes.

Its own functions: `InMemoryCache.add` of dense acts by batch, `save`, `LatentCache.save_splits`,
then of every feature `TensorBuffer` and `constructor` (windows by their maximum, strongest first).
Left out, all in its favour: its model, firing counts, non-active windows, sampler and decoding of
tokens. All features are kept, where its default drops those with fewer than 200 windows.
"""

import importlib.metadata
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from delphi.config import CacheConfig, ConstructorConfig
from delphi.latents import LatentCache, LatentRecord, constructor
from delphi.latents.loader import TensorBuffer
from peak import peak_bytes

HOOKPOINT = "rows"


def main() -> None:
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    codes = {name: torch.from_numpy(each) for name, each in np.load(spec["codes"]).items()}
    before = psutil.Process().memory_info().rss
    with tempfile.TemporaryDirectory() as folder:
        seconds, peaks = index(codes, spec["d_sae"], Path(folder))
    np.save(spec["strongest"], peaks)
    version = importlib.metadata.version("eai-delphi")
    peak_gb = (peak_bytes() - before) / 1e9
    print(json.dumps({"seconds": seconds, "peak_gb": peak_gb, "version": version}))


def index(
    codes: dict[str, torch.Tensor], d_sae: int, folder: Path
) -> tuple[dict[str, float], np.ndarray]:
    """Cache, save and read by feature. Returns: seconds by stage, [d_sae] the strongest acts."""
    seconds = {"dense acts": 0.0}
    settings = CacheConfig()
    cache: Any = LatentCache(None, {}, settings.batch_size)
    cache.width = d_sae
    started = time.perf_counter()
    for number, rows in enumerate(codes["tokens"].split(settings.batch_size)):
        built = time.perf_counter()
        place = slice(number * settings.batch_size, number * settings.batch_size + len(rows))
        acts = torch.zeros(*rows.shape, d_sae)
        acts.scatter_(2, codes["features"][place].long(), codes["acts"][place])
        seconds["dense acts"] += time.perf_counter() - built
        cache.cache.add(acts, rows, number, HOOKPOINT)
    cache.cache.save()
    seconds["cache"] = time.perf_counter() - started - seconds["dense acts"]
    started = time.perf_counter()
    cache.save_splits(settings.n_splits, folder)
    seconds["splits"] = time.perf_counter() - started
    started = time.perf_counter()
    peaks = contexts(folder, d_sae)
    seconds["contexts"] = time.perf_counter() - started
    return seconds, peaks


def contexts(folder: Path, d_sae: int) -> np.ndarray:
    """Windows of every feature. Returns: [d_sae] the act that each feature's first one is for."""
    config = ConstructorConfig(min_examples=1, n_non_activating=0)
    strongest = np.zeros(d_sae, np.float32)
    for path in sorted((folder / HOOKPOINT).glob("*.safetensors")):
        buffer = TensorBuffer(str(path), HOOKPOINT)
        tokens = buffer.tokens
        for data in buffer:
            record = LatentRecord(data.latent)
            record = constructor(record, data.activation_data, config, tokens, None)
            strongest[data.latent.latent_index] = record.examples[0].activations.max()
    return strongest


if __name__ == "__main__":
    main()
