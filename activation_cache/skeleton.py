"""The shape of a model without its weights: what planning needs, at the price of a config file.

In: a model's name. Out: a `ModelShape`, counted on a skeleton that takes no memory.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from .errors import ModelError
from .hookpoints import decoder_layers
from .hub import hub_answers
from .loading import _LOADING_ERRORS, _cannot_load, _local_source, _quiet, base_and_seed


class ModelShape(NamedTuple):
    """n_params: of the whole model. params_per_layer: of one decoder layer, on average.
    d_model: width of the stream. vocab_size: rows of the unembedding."""

    n_params: int
    n_layers: int
    params_per_layer: int
    d_model: int
    vocab_size: int


def model_shape(name: str, *, trust_remote_code: bool = False) -> ModelShape:
    """The shape of a model by hub id, folder, `.gguf` file or "demo". Raises: ModelError."""
    name, _ = base_and_seed(name)
    folder, _ = _local_source(name)
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(
                str(folder) if folder else name,
                trust_remote_code=trust_remote_code,
                local_files_only=bool(folder) or not hub_answers(),
            )
            with torch.device("meta"):
                model: nn.Module = AutoModelForCausalLM.from_config(config)
    except _LOADING_ERRORS as error:
        raise ModelError(_cannot_load(name, folder, error)) from error
    layers, text = decoder_layers(model), config.get_text_config()
    return ModelShape(
        n_params=sum(p.numel() for p in model.parameters()),
        n_layers=len(layers),
        params_per_layer=sum(p.numel() for p in layers.parameters()) // len(layers),
        d_model=int(text.hidden_size),
        vocab_size=int(text.vocab_size),
    )
