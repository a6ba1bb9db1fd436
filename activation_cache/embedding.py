"""A folder with a Hugging Face encoder -> vectors of texts: the mean of its last hidden state."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer

from .errors import ModelError

_AT_ONCE = 64
_MOST_TOKENS = 256

Encoder = Callable[[Sequence[str]], NDArray[np.float32]]


def load_encoder(folder: Path) -> Encoder:
    """A function of texts: float32 [n, d_model], means over the tokens that aren't padding.

    That is the pooling of most models that sentence-transformers saves. Texts are cut to 256
    tokens. Raises: ModelError if the folder holds no encoder with its tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"{folder} holds no encoder that can be loaded ({reason}): expected config.json, "
            "weights and a tokenizer"
        ) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    longest = min(_MOST_TOKENS, getattr(model.config, "max_position_embeddings", _MOST_TOKENS))

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> NDArray[np.float32]:
        means = []
        for first in range(0, len(texts), _AT_ONCE):
            tokens = tokenizer(
                list(texts[first : first + _AT_ONCE]),
                padding=True,
                truncation=True,
                max_length=longest,
                return_tensors="pt",
            )
            hidden = model(**tokens).last_hidden_state
            mask = tokens["attention_mask"].unsqueeze(2).to(hidden.dtype)
            means.append((hidden * mask).sum(1) / mask.sum(1).clamp_min(1))
        found: NDArray[np.float32] = torch.cat(means).float().numpy()
        return found

    return encode
