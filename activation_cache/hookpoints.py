"""Model-independent names of places in a model, found by structure.

In: a Hugging Face model and a name such as `layers.6.resid_post`. Out: a `Site`, the module whose
input or output is that place. `language_model` puts its hooks there.

    embed                       output of the token embedding
    layers.{i}.resid_pre        the stream as layer i receives it
    layers.{i}.attn_heads       the heads' outputs side by side, before the output projection
    layers.{i}.attn_out         what attention adds to the stream (after a post-norm, if any)
    layers.{i}.resid_mid        the stream between attention and MLP (not in parallel layers)
    layers.{i}.mlp_in           what the MLP reads (after its norm, if one stands before it)
    layers.{i}.mlp_acts         the MLP's hidden activations, before its output projection
    layers.{i}.mlp_out          what the MLP adds to the stream
    layers.{i}.resid_post       the stream as layer i leaves it
    final_norm                  output of the last norm, which the unembedding reads

Any other name is taken for the path of a module (`model.layers.3.mlp.gate_proj`): its output.

No table of architectures is kept. The layers are the decoder's longest list of modules; what lies
inside one is found by running it (`layer_probe`).
"""

import re
from collections.abc import Callable
from difflib import get_close_matches
from functools import cached_property

import torch
from torch import Tensor, nn

from .errors import HookpointError
from .layer_probe import Places, is_norm, places_inside, recorded
from .sites import Site

LAYER_PLACES = (
    "resid_pre",
    "attn_heads",
    "attn_out",
    "resid_mid",
    "mlp_in",
    "mlp_acts",
    "mlp_out",
    "resid_post",
)
_LAYER_NAME = re.compile(r"layers\.(\d+)\.(\w+)")
_PROBE_TOKENS = 8


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers: the longest `nn.ModuleList` that lies in no other list.

    Raises: HookpointError if the model has none.
    """
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    root = decoder if isinstance(decoder, nn.Module) else model
    lists = [
        m
        for m in root.modules()
        if isinstance(m, nn.ModuleList) and any(True for _ in m.parameters())
    ]
    nested = {m for outer in lists for m in outer.modules() if m is not outer}
    lists = [m for m in lists if m not in nested]
    if not lists:
        raise HookpointError(
            f"{type(model).__name__} has no list of layers, so layers.{{i}}.* can't be found; "
            "name a module path instead"
        )
    return max(lists, key=len)


class HookpointResolver:
    """Finds sites in one model; what a probe has found is kept.

    run_probe: runs the model on token ids [1, seq], so that the hooks that are set fire.
    """

    def __init__(self, model: nn.Module, run_probe: Callable[[Tensor], None]):
        self.model = model
        self._run_probe = run_probe
        self._inside: dict[int, Places] = {}

    @cached_property
    def layers(self) -> nn.ModuleList:
        return decoder_layers(self.model)

    def resolve(self, name: str) -> Site:
        """The site of `name`. Raises: HookpointError that says which names there are."""
        if match := _LAYER_NAME.fullmatch(name):
            return self._layer_site(name, int(match[1]), match[2])
        if name == "embed":
            return Site(self._embedding())
        if name == "final_norm":
            return Site(self._final_norm)
        modules = {path: m for path, m in self.model.named_modules() if path}
        if name in modules:
            return Site(modules[name])
        raise HookpointError(self._unknown(name, list(modules)))

    def names(self) -> list[str]:
        """Every standard name that resolves in this model, in the order the data flows."""
        found = ["embed"]
        for i in range(len(self.layers)):
            inside = self._probe_layer(i)
            found += [
                f"layers.{i}.{place}"
                for place in LAYER_PLACES
                if place in ("resid_pre", "resid_post") or isinstance(inside[place], Site)
            ]
        return [*found, "final_norm"]

    def _layer_site(self, name: str, index: int, place: str) -> Site:
        if index >= len(self.layers):
            raise HookpointError(
                f"unknown hookpoint {name!r}: the model has layers 0 to {len(self.layers) - 1}"
            )
        if place not in LAYER_PLACES:
            raise HookpointError(self._unknown(name, []))
        if place in ("resid_pre", "resid_post"):
            return Site(self.layers[index], on_input=place == "resid_pre")
        found = self._probe_layer(index)[place]
        if isinstance(found, str):
            raise HookpointError(f"this model has no {name}: {found}")
        return found

    def _embedding(self) -> nn.Module:
        embedding = self.model.get_input_embeddings()  # type: ignore[operator]
        if not isinstance(embedding, nn.Module):
            raise HookpointError(f"{type(self.model).__name__} has no token embedding to hook")
        return embedding

    @cached_property
    def _final_norm(self) -> nn.Module:
        """The last norm that runs after the last layer, outside of any layer."""
        in_layers = set(self.layers.modules())
        outside = [m for m in self.model.modules() if is_norm(m) and m not in in_layers]
        last_layer = self.layers[len(self.layers) - 1]
        with recorded([*outside, last_layer]) as calls:
            self._run()
        order = [call.module for call in calls]
        after = order[order.index(last_layer) + 1 :]
        if not after:
            raise HookpointError("this model has no final_norm: no norm runs after the last layer")
        return after[-1]

    def _probe_layer(self, index: int) -> Places:
        if index not in self._inside:
            self._inside[index] = places_inside(self.layers[index], self._run)
        return self._inside[index]

    def _run(self) -> None:
        """Run the model on a few different tokens that every vocabulary has."""
        n_tokens = len(self._embedding().weight)  # type: ignore[arg-type]
        self._run_probe(torch.arange(_PROBE_TOKENS)[None] * 7 % n_tokens)

    def _unknown(self, name: str, modules: list[str]) -> str:
        standard = ["embed", "final_norm"]
        standard += [f"layers.{i}.{p}" for i in range(len(self.layers)) for p in LAYER_PLACES]
        near = get_close_matches(name, [*standard, *modules], n=1, cutoff=0.75)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return (
            f"unknown hookpoint {name!r}: {hint}expected embed, final_norm, "
            f"layers.0 to layers.{len(self.layers) - 1} with .{'|'.join(LAYER_PLACES)}, "
            "or the path of a module"
        )
