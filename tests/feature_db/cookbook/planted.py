"""Three SAEs whose features are known, indexed the real way: what the cookbook must find.

The model's token embeddings are orthonormal and an SAE reads them, so that a feature whose encoder
is a sum of some tokens' embeddings fires on exactly these tokens; its decoder says which tokens it
promotes.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from activation_cache import ActivationCache, LanguageModel, harvest
from feature_db import IndexConfig, build_index
from sae import SAE, Origin, TopKConfig

SUBJECTS, VERBS = ["people", "members", "women", "men"], ["are", "were", "have"]
MUSIC, WATER, WAR = (
    ["piano", "guitar", "violin"],
    ["river", "ocean", "sea"],
    ["war", "army", "battle"],
)
COLOURS = ["red", "green", "blue"]
OTHERS = ["the", "very", "same", "age", "since", "of", "in", "old", "new", "good", "."]
WORDS = [*SUBJECTS, *VERBS, *MUSIC, *WATER, *WAR, *COLOURS, *OTHERS]
WIDTH, N_DOCUMENTS = 32, 24


class Planted(NamedTuple):
    """One feature. on: words it fires on. says: those it promotes, as a direction; else `on`."""

    on: Sequence[str]
    says: Mapping[str, float] = {}


NARROW = {
    "subjects": Planted(SUBJECTS),
    "verbs": Planted(VERBS),
    "subjects and verbs": Planted([*SUBJECTS, *VERBS]),
    "reacts": Planted(["same"], {"since": 1.0, "same": -0.5}),
    "says": Planted(["very"], {"same": 1.0}),
    "says and reacts": Planted(["same", "age"], {"same": 1.0}),
    "same and age": Planted(["same", "age"], {"of": 1.0, "same": -0.5}),
    "piano and river": Planted(["piano", "river"]),
    "music": Planted(MUSIC),
    "piano and guitar": Planted(["piano", "guitar"]),
    "water": Planted(WATER),
    "river and ocean": Planted(["river", "ocean"]),
    "everything": Planted(WORDS),
    "war": Planted(WAR),
    "the": Planted(["the"]),
    "colours": Planted(COLOURS),
    "nothing": Planted([], {".": 1.0}),
}
# Another run: the same but for one feature, which became another.
AGAIN = {
    ("sea and old" if name == "war" else name): planted for name, planted in NARROW.items()
} | {"sea and old": Planted(["old", "new"], {"good": 1.0})}
# A wider one: the feature of colours is split.
WIDE = {name: planted for name, planted in NARROW.items() if name != "colours"} | {
    word: Planted([word]) for word in COLOURS
}
SAES = [NARROW, AGAIN, WIDE]


def feature_id(name: str, sae_id: int = 0) -> int:
    """The number of a planted feature."""
    return list(SAES[sae_id]).index(name)


def planted_database(folder: Path) -> Path:
    """The database of all three SAEs, with every activation kept."""
    lm = planted_lm()
    cache = harvest(
        lm,
        documents(),
        hookpoints=["embed"],
        out=folder / "acts",
        ctx_len=64,
        prepend_bos=False,
        storage_dtype="float32",
        shard_bytes=100_000,
    )
    saes: list[SAE | str | Path] = [planted_sae(lm, each, cache) for each in SAES]
    config = IndexConfig(keep_activations=True, n_logits=3, part_rows=1000)
    return build_index(lm, saes, cache, out=folder / "planted.duckdb", config=config)


def documents() -> list[str]:
    """Every second one speaks of war; nothing else tells them apart."""
    rng = random.Random(0)
    return [" ".join(_sentence(rng, n % 2 == 0) for _ in range(12)) for n in range(N_DOCUMENTS)]


def _sentence(rng: random.Random, on_war: bool) -> str:
    place = [rng.choice(["old", "new", *COLOURS]), rng.choice([*MUSIC, *WATER])]
    time = rng.choice([["very", "same"], ["old", "age"], ["since", "the", "same"]])
    about = ["of", rng.choice(WAR)] if on_war else ["of", "good"]
    words = ["the", rng.choice(SUBJECTS), rng.choice(VERBS), "in", *place, *time, *about, "."]
    return " ".join(words)


def planted_lm() -> LanguageModel:
    """A Llama whose tokens are words with the space before them, of orthonormal embeddings."""
    vocabulary = {
        word: i for i, word in enumerate([*WORDS, *(f" {word}" for word in WORDS), "<|end|>"])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|end|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" [^ ]+"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=2 * WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    torch.nn.init.orthogonal_(model.get_input_embeddings().weight)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    return LanguageModel(model, wrapped, name="planted")


def planted_sae(lm: LanguageModel, features: Mapping[str, Planted], cache: ActivationCache) -> SAE:
    """An SAE of these features, in their order."""
    vectors = lm.logit_matrix().T
    origin = Origin(hookpoint="embed", max_norm=cache.max_norm("embed"))
    sae = SAE(TopKConfig(d_sae=len(features), k=8), vectors.shape[1], origin)
    of_word = {
        word: sum(vectors[i] for i in lm.tokenizer.convert_tokens_to_ids([word, f" {word}"]))
        for word in WORDS
    }
    sae.W_enc_rows.zero_()
    sae.b_enc.fill_(-0.5)  # of rounding none fires
    for row, planted in enumerate(features.values()):
        says = planted.says or dict.fromkeys(planted.on, 1.0)
        for word in planted.on:
            sae.W_enc_rows[row] += of_word[word]
        direction = sum(weight * of_word[word] for word, weight in says.items())
        sae.W_dec[row] = torch.nn.functional.normalize(direction, dim=0)
    return sae
