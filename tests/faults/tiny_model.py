"""A tiny random Llama and a text for it: what the campaign harvests. Always the same."""

import random
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

_WORDS = [a + b for a in ("ba", "do", "ki", "lu", "me", "no", "ri", "su") for b in "aeioulnrst"]


def texts() -> list[str]:
    """400 documents of 3 to 120 words."""
    rng = random.Random(0)
    return [" ".join(rng.choices(_WORDS, k=rng.randint(3, 120))) for _ in range(400)]


def save_tiny_model(folder: Path) -> None:
    """Write the model (three layers, d_model 32) and its tokenizer into `folder`."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *_WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
