"""Model-independent names of places in a model, found by structure.

In: a Hugging Face model and a name such as `layers.6.resid_post`. Out: a `Site`, the module whose
input or output is that place. `language_model` puts its hooks there.

    embed                       output of the token embedding
    layers.{i}.resid_pre        the stream as layer i receives it
    layers.{i}.attn_heads       the heads' outputs side by side, before the output projection
    layers.{i}.attn_out         what attention adds to the stream (after a post-norm, if any)
    layers.{i}.resid_mid        the stream between attention and MLP (not in parallel layers)
    layers.{i}.mlp_acts         the MLP's hidden activations, before its output projection
    layers.{i}.mlp_out          what the MLP adds to the stream
    layers.{i}.resid_post       the stream as layer i leaves it
    final_norm                  output of the last norm, which the unembedding reads

Any other name is taken for the path of a module (`model.layers.3.mlp.gate_proj`): its output.

No table of architectures is kept. The layers are the decoder's longest list of modules. Inside one
layer a probe of a few tokens is run, and a place is accepted only where the numbers say so:
`resid_mid` must equal `resid_pre + attn_out`, and `resid_post` must equal `resid_mid + mlp_out`.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import HookpointError

LAYER_PLACES = (
    "resid_pre",
    "attn_heads",
    "attn_out",
    "resid_mid",
    "mlp_acts",
    "mlp_out",
    "resid_post",
)
_LAYER_NAME = re.compile(r"layers\.(\d+)\.(\w+)")
_ATTENTION_CLASS = re.compile(r"attention|attn|mixer|mamba|deltanet|linearatt|shortconv", re.I)
_PROBE_TOKENS = 8


class Site(NamedTuple):
    """A place in a model: what flows into (`on_input`) or out of `module`."""

    module: nn.Module
    on_input: bool = False


class Call(NamedTuple):
    """One call of a module during a probe: its first tensor in and out, [batch, seq, width]."""

    module: nn.Module
    x: Tensor
    y: Tensor


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
        self._layers: nn.ModuleList | None = None
        self._inside: dict[int, dict[str, Site | str]] = {}

    @property
    def layers(self) -> nn.ModuleList:
        if self._layers is None:
            self._layers = decoder_layers(self.model)
        return self._layers

    def resolve(self, name: str) -> Site:
        """The site of `name`. Raises: HookpointError that says which names there are."""
        if match := _LAYER_NAME.fullmatch(name):
            return self._layer_site(name, int(match[1]), match[2])
        if name == "embed":
            return Site(self._embedding())
        if name == "final_norm":
            return Site(self._final_norm())
        modules = dict(self.model.named_modules())
        if name and name in modules:
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

    def _final_norm(self) -> nn.Module:
        """The last norm that runs after the last layer, outside of any layer."""
        in_layers = set(self.layers.modules())
        outside = [m for m in self.model.modules() if _is_norm(m) and m not in in_layers]
        last_layer = self.layers[len(self.layers) - 1]
        with _record([*outside, last_layer]) as calls:
            self._run_probe(_probe_ids(self.model))
        order = [call.module for call in calls]
        after = order[order.index(last_layer) + 1 :]
        if not after:
            raise HookpointError("this model has no final_norm: no norm runs after the last layer")
        return after[-1]

    def _probe_layer(self, index: int) -> dict[str, Site | str]:
        if index not in self._inside:
            layer = self.layers[index]
            with _record(list(layer.modules())) as calls:
                self._run_probe(_probe_ids(self.model))
            self._inside[index] = _places_inside(layer, calls)
        return self._inside[index]

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


def first_tensor(value: Any) -> Tensor | None:
    """The tensor that a hook's `args`, `kwargs` or `output` carries, or None."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, dict):
        value = [value.get("hidden_states"), *value.values()]
    if isinstance(value, tuple | list):
        return next((v for v in value if isinstance(v, Tensor)), None)
    return None


def _places_inside(layer: nn.Module, calls: list[Call]) -> dict[str, Site | str]:
    """Sites of the five inner places of a layer, or the reason why one is missing."""
    whole = next((c for c in calls if c.module is layer), None)
    children = set(layer.children())
    top = [c for c in calls if c.module in children]
    attention = next((c for c in top if _ATTENTION_CLASS.search(type(c.module).__name__)), None)
    mlp = [
        c for c in top if c is not attention and _has_matrix(c.module) and not _is_norm(c.module)
    ]
    if whole is None or attention is None or not mlp:
        missing = "its layers have no separate attention and MLP modules"
        return dict.fromkeys(LAYER_PLACES, missing)

    attn_added = _through_post_norm(attention, top)
    mlp_added = _through_post_norm(mlp[-1], top)
    mid = next((c for c in top if _adds_up(whole.x, attn_added.y, c.x)), None)
    serial = mid is not None and _adds_up(mid.x, mlp_added.y, whole.y)
    parallel = _adds_up(whole.x + attn_added.y, mlp_added.y, whole.y)
    unclear = "what is added to the stream is not the output of one module"
    return {
        "attn_heads": _input_of_last_projection(attention.module, calls, whole.x.shape[-1]),
        "attn_out": Site(attn_added.module) if mid or parallel else unclear,
        "resid_mid": Site(mid.module, on_input=True)
        if mid is not None and not (parallel and not serial)
        else ("attention and MLP run in parallel" if parallel else unclear),
        "mlp_acts": _input_of_last_projection(mlp[-1].module, calls, whole.x.shape[-1]),
        "mlp_out": Site(mlp_added.module) if serial or parallel else unclear,
    }


def _through_post_norm(call: Call, top: list[Call]) -> Call:
    """The call itself, or the norm that reads its very output (Gemma's post-norms)."""
    chained = (c for c in top if c.x is call.y and _is_norm(c.module))
    return next(chained, call)


def _adds_up(stream: Tensor, added: Tensor, total: Tensor) -> bool:
    """Whether stream + added = total up to rounding, in nearly all elements."""
    if not stream.shape == added.shape == total.shape:
        return False
    eps = torch.finfo(total.dtype).eps
    stream, added, total = stream.double(), added.double(), total.double()
    slack = 4 * eps * (stream.abs() + added.abs() + total.abs())
    return bool(((stream + added - total).abs() <= slack).double().mean() > 0.98)


def _input_of_last_projection(root: nn.Module, calls: list[Call], d_model: int) -> Site | str:
    inside = set(root.modules())
    linear = [
        c.module
        for c in calls
        if c.module in inside
        and isinstance(getattr(c.module, "weight", None), Tensor)
        and c.module.weight.dim() == 2  # type: ignore[operator]
        and c.y.shape[-1] == d_model
        and not _is_norm(c.module)
    ]
    if linear:
        return Site(linear[-1], on_input=True)
    return f"{type(root).__name__} ends in no single output projection"


@contextmanager
def _record(modules: list[nn.Module]) -> Iterator[list[Call]]:
    """Collects the calls of `modules` while the context is open, in the order they end."""
    calls: list[Call] = []

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        x, y = first_tensor(args), first_tensor(output)
        x = first_tensor(kwargs) if x is None else x
        if x is not None and y is not None:
            calls.append(Call(module, x, y))

    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _probe_ids(model: nn.Module) -> Tensor:
    """A few different token ids, [1, seq], that every vocabulary has."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    n_tokens = int(embedding.weight.shape[0])
    return torch.arange(_PROBE_TOKENS)[None] * 7 % n_tokens


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _has_matrix(module: nn.Module) -> bool:
    return any(p.dim() >= 2 for p in module.parameters())
