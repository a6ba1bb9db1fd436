"""What indexers and labellers do, in a child of the host."""

import datetime
import os
from collections.abc import Sequence

import torch

from activation_cache import ActivationCache, LanguageModel
from feature_db import FeatureDB, IndexConfig, build_index
from sae import SAE, Origin, TopKConfig

HOOKPOINT = "layers.1.resid_post"
D_SAE = 96
_CREATED_AT = datetime.datetime(2026, 1, 1)


def save_saes(_: LanguageModel, *, acts: str, folders: Sequence[str]) -> None:
    """SAEs of random directions, one into each folder."""
    cache = ActivationCache.open(acts)
    for seed, folder in enumerate(folders):
        sae = SAE(
            TopKConfig(d_sae=D_SAE, k=6),
            cache.d_model(HOOKPOINT),
            Origin(hookpoint=HOOKPOINT, max_norm=cache.max_norm(HOOKPOINT)),
        )
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(D_SAE, sae.d_model, generator=generator)
        sae.W_dec.copy_(torch.nn.functional.normalize(directions, dim=1))
        sae.W_enc_rows.copy_(sae.W_dec)
        sae.save(folder)


def index_saes(lm: LanguageModel, *, acts: str, folders: Sequence[str], out: str) -> None:
    """Index SAEs in parts of some shards; a database of the first of them is extended."""
    config = IndexConfig(part_rows=4_000, chunk_rows=2_000, n_top=5, tokens_before=6)
    cache = ActivationCache.open(acts)
    build_index(lm, list(folders), cache, out=out, config=config, created_at=_CREATED_AT)


def label_in_turn(_: LanguageModel, *, db: str, trace: str, first: int) -> None:
    """Give feature after feature a label; each one that was kept is told in `trace`, durably."""
    with FeatureDB.open(db, read_only=False) as opened, open(trace, "a") as told:  # noqa: PTH123
        for n in range(first, 10_000):
            opened.label(n % D_SAE, f"label {n}")
            print(n, file=told, flush=True)
            os.fsync(told.fileno())
