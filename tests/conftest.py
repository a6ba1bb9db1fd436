"""What the tests of every package share: a tiny tokenizer, tiny random models, a corpus, a cache.

Nothing here needs the network, and all of it is made in a second or two.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from hypothesis import settings

from activation_cache import ActivationCache, LanguageModel, harvest
from tests.tiny_tokenizers import byte_level_bpe

# Other work on the machine must not fail a test.
settings.register_profile("saebase", deadline=None)
settings.load_profile("saebase")

pytest_plugins = ["tests.s3_server"]

READING_AND_WRITING = ("read-ahead", "read_", "cache-writer", "remote")


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """Threads of the cache end with what began them, in success and in error."""
    before = set(threading.enumerate())
    yield
    left = {t.name for t in set(threading.enumerate()) - before}
    assert not [name for name in left if name.startswith(READING_AND_WRITING)]


_SUBJECTS = ["The river", "A small bird", "My neighbour", "The old engine", "Her brother", "Paris"]
_VERBS = ["crosses", "remembers", "paints", "repairs", "forgets", "admires"]
_OBJECTS = ["the bridge", "a naïve song", "three keys", "the capital of France", "日本の本", "1984"]

_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
_NEOX = {k: v for k, v in _SMALL.items() if k != "num_key_value_heads"}
_MOE = {**_SMALL, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "initializer_range": 0.15}

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", _GPT2),
    "llama": ("Llama", _SMALL),
    "gpt_neox": ("GPTNeoX", {**_NEOX, "use_parallel_residual": True}),
    "gpt_neox_serial": ("GPTNeoX", {**_NEOX, "use_parallel_residual": False}),
    "gemma": ("Gemma", {**_SMALL, "head_dim": 8}),
    "gemma2": ("Gemma2", {**_SMALL, "head_dim": 8, "sliding_window": 16}),
    "gemma3": ("Gemma3Text", {**_SMALL, "head_dim": 8, "sliding_window": 16}),
    "qwen2": ("Qwen2", _SMALL),
    "qwen3": ("Qwen3", {**_SMALL, "head_dim": 8}),
    "mistral": ("Mistral", _SMALL),
    "phi": ("Phi", _SMALL),
    "opt": (
        "OPT",
        {
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 32,
            "init_std": 0.15,
        },
    ),
    "falcon": ("Falcon", {k: v for k, v in _NEOX.items() if k != "intermediate_size"}),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.15}),
    "mixtral": ("Mixtral", {**_SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2Moe", {**_MOE, "shared_expert_intermediate_size": 32}),
}


@pytest.fixture(scope="session")
def tiny_corpus() -> list[str]:
    """Forty short documents, some of a few tokens, some of over a hundred; all different."""
    return [
        f"Note {i}. "
        + " ".join(
            f"{_SUBJECTS[(i + j) % 6]} {_VERBS[(i * j + 1) % 6]} {_OBJECTS[(i + 2 * j) % 6]}."
            for j in range(1 + i % 7)
        )
        for i in range(40)
    ]


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_corpus: list[str]) -> Any:
    """A real byte-level BPE tokenizer of 400 tokens, <bos>, <eos> and <pad> among them."""
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return byte_level_bpe(tiny_corpus, 400, **special)


@pytest.fixture(scope="session")
def tiny_model(tiny_tokenizer: Any) -> Callable[[str], Any]:
    """`tiny_model(arch)`: a new random model of three layers, d_model 32, always the same weights.

    arch: gpt2, llama, gpt_neox, gpt_neox_serial, gemma, gemma2, gemma3, qwen2, qwen3, mistral, phi,
    opt, falcon, bloom, mixtral, qwen2_moe. Biases and norm scales are random too.
    """

    def make(arch: str) -> Any:
        name, settings = _CONFIGS[arch]
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        config = getattr(transformers, f"{name}Config")(
            vocab_size=len(tiny_tokenizer), **special, **settings
        )
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def tiny_lm(tiny_model: Callable[[str], Any], tiny_tokenizer: Any) -> LanguageModel:
    """A Llama of three layers. Shared: leave its weights as they are."""
    return LanguageModel(tiny_model("llama"), tiny_tokenizer, name="tiny-llama")


@pytest.fixture(scope="session")
def tiny_cache(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path_factory: pytest.TempPathFactory
) -> ActivationCache:
    """`layers.1.resid_post` and `layers.1.mlp_out` of `tiny_lm` over `tiny_corpus`, in blocks of 16
    tokens and several shards. Shared: leave its files as they are."""
    return harvest(
        tiny_lm,
        tiny_corpus,
        hookpoints=["layers.1.resid_post", "layers.1.mlp_out"],
        out=tmp_path_factory.mktemp("tiny") / "acts",
        n_tokens=100_000,
        ctx_len=16,
        batch_blocks=4,
        shard_bytes=32_768,
        storage_dtype="float32",
    )
