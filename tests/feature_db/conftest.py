"""A tiny random GPT-2, a real cache of it and two real SAEs, made once for all tests here."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from activation_cache import ActivationCache, LanguageModel, harvest
from feature_db import FeatureDB, IndexConfig, build_index
from sae import SAE, BatchTopKConfig, Origin, TopKConfig
from tests.tiny_tokenizers import byte_level_bpe

HOOKPOINT = "layers.1.resid_post"
SUBJECTS = ["The president", "A keeper of keys", "Every judge", "The golden gate", "Café owners"]
VERBS = ["spoke of", "opened", "ruled on", "stood before", "forgot"]
OBJECTS = ["the treaty", "many doors", "a court", "the bay <b>", "their\nnames", "été", "日本"]


class World(NamedTuple):
    """What the tests index, and the database of it."""

    lm: LanguageModel
    cache: ActivationCache
    sae: SAE
    other: SAE
    path: Path


def texts() -> list[str]:
    """Twelve documents of a few dozen words."""
    sentences = [f"{s} {v} {o}." for s in SUBJECTS for v in VERBS for o in OBJECTS]
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(len(sentences), generator=generator).tolist()
    return [" ".join(sentences[i] for i in order[n * 12 : n * 12 + 12]) for n in range(12)]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_bpe(texts(), 320, bos_token="<|end|>", eos_token="<|end|>")


def random_gpt2(n_vocab: int, n_embd: int, n_layer: int) -> GPT2LMHeadModel:
    """Of torch's seed as it stands; token 0 begins and ends a text."""
    config = GPT2Config(
        vocab_size=n_vocab,
        n_positions=128,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def tiny_lm(seed: int = 0) -> LanguageModel:
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    model = random_gpt2(len(tokenizer), n_embd=16, n_layer=2)
    return LanguageModel(model, tokenizer, name=f"tiny-{seed}")


def random_sae(config: TopKConfig | BatchTopKConfig, seed: int, cache: ActivationCache) -> SAE:
    """An SAE of random directions; its last feature can never fire."""
    generator = torch.Generator().manual_seed(seed)
    origin = Origin(
        hookpoint=HOOKPOINT,
        max_norm=cache.max_norm(HOOKPOINT),
        n_tokens_trained=4096,
        provenance=cache.provenance(HOOKPOINT),
    )
    sae = SAE(config, cache.d_model(HOOKPOINT), origin)
    directions = torch.randn(config.d_sae, sae.d_model, generator=generator)
    sae.W_dec.copy_(torch.nn.functional.normalize(directions, dim=1))
    sae.W_enc_rows.copy_(sae.W_dec)
    sae.b_enc[-1] = -1e6
    sae.threshold.fill_(0.4)
    return sae


def made_world(folder: Path) -> World:
    """All of it, made in `folder`."""
    lm = tiny_lm()
    cache = harvest(
        lm,
        texts(),
        hookpoints=[HOOKPOINT],
        out=folder / "acts",
        n_tokens=1500,
        ctx_len=64,
        prepend_bos=True,
        storage_dtype="float32",
        shard_bytes=20_000,
    )
    sae = random_sae(TopKConfig(d_sae=48, k=4), 0, cache)
    other = random_sae(BatchTopKConfig(d_sae=20, k=3), 1, cache)
    path = build_index(lm, [sae], cache, out=folder / "one.duckdb", config=small_config())
    return World(lm, cache, sae, other, path)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return made_world(tmp_path_factory.mktemp("feature_db"))


def small_config(**changes: object) -> IndexConfig:
    """Small numbers, so that every limit is met."""
    options: dict[str, object] = {"n_top": 6, "quantile_sample": 12, "n_quantiles": 4}
    options |= {"tokens_before": 6, "tokens_after": 3, "chunk_rows": 500, "n_neighbors": 5}
    options |= {"part_rows": 400}
    return IndexConfig.model_validate(options | changes)


@pytest.fixture
def db(world: World) -> "Iterator[FeatureDB]":
    with FeatureDB.open(world.path) as opened:
        yield opened


@pytest.fixture
def world_copy(world: World, tmp_path: Path) -> Path:
    """A copy of the world's database, to write into."""
    return Path(shutil.copy(world.path, tmp_path / "db.duckdb"))
