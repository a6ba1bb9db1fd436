"""Finds the places inside one decoder layer by running it, whatever its modules are called.

In: a layer and a way to run its model on a few tokens. Out: a `Site` for each of the inner places,
or the reason why the layer has none. A first run shows which modules there are and in which order
they run. Then known noise, as large as the stream, replaces what attention and MLP seem to add, and
a place is accepted only where the sums come out: `resid_mid = resid_pre + attn_out` and
`resid_post = resid_mid + mlp_out`. The noise is what makes the sums tell: what a trained layer adds
may be so small against the stream that in bfloat16 anything adds up. `mlp_in` is where the same
noise twice makes the same `mlp_out`, whatever the stream is.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .sites import Edit, Site, first_tensor, hooked

INNER_PLACES = ("attn_heads", "attn_out", "resid_mid", "mlp_in", "mlp_acts", "mlp_out")
_ATTENTION_CLASS = re.compile(r"attention|attn|mixer|mamba|deltanet|linearatt|shortconv", re.I)
_PARALLEL = "attention and MLP run in parallel"
_UNCLEAR = "what is added to the stream is not the output of one module"

Places = dict[str, Site | str]


class Call(NamedTuple):
    """One call of a module: copies of its first tensor in and out, and those tensors themselves."""

    module: nn.Module
    x: Tensor
    y: Tensor
    tensor_in: Tensor
    tensor_out: Tensor


class Sums(NamedTuple):
    """What adds up: `mid` reads the stream after attention; the layer ends as stream + MLP's."""

    mid: nn.Module | None
    is_serial: bool
    is_parallel: bool


def places_inside(layer: nn.Module, run: Callable[[], None]) -> Places:
    """The inner places of `layer`: a site, or the reason why it is missing."""
    with recorded(list(layer.modules())) as calls:
        run()
    whole = next((c for c in calls if c.module is layer), None)
    parts = _attention_and_mlp(layer, calls)
    if whole is None or parts is None:
        return dict.fromkeys(INNER_PLACES, "its layers have no separate attention and MLP modules")
    attention, others = parts
    mlp = others[-1]
    projections = _last_projection(attention, calls), _last_projection(mlp, calls)
    found: Places = dict.fromkeys(INNER_PLACES, _UNCLEAR)
    for attn_added in _candidates(attention, projections[0], calls):
        for mlp_added in _candidates(mlp, projections[1], calls):
            sums = _probe_sums(layer, run, whole.x, attn_added, mlp_added)
            if sums.is_serial or sums.is_parallel or sums.mid:
                found = _outputs(sums, attn_added, mlp_added)
            if sums.is_serial or sums.is_parallel:
                break
        if found["mlp_out"] != _UNCLEAR:
            break
    found["attn_heads"] = _hidden(attention, projections[0], found["attn_out"])
    found["mlp_acts"] = _hidden(mlp, projections[1], found["mlp_out"])
    found["mlp_in"] = _mlp_input(whole, others, run, found["mlp_out"])
    return found


@contextmanager
def recorded(modules: list[nn.Module]) -> Iterator[list[Call]]:
    """Collects the calls of `modules` while the context is open, in the order they end."""
    calls: list[Call] = []

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        x, y = first_tensor(args), first_tensor(output)
        x = first_tensor(kwargs) if x is None else x
        if x is not None and y is not None:
            calls.append(Call(module, x.clone(), y.clone(), x, y))

    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _attention_and_mlp(layer: nn.Module, calls: list[Call]) -> tuple[Call, list[Call]] | None:
    """The calls of the layer's attention and of its other children with a matrix: the last of them
    is the MLP, or the MLP's output projection where the layer itself holds its matrices (OPT)."""
    children = set(layer.children())
    top = [c for c in calls if c.module in children]
    attention = next((c for c in top if _ATTENTION_CLASS.search(type(c.module).__name__)), None)
    others = [
        c
        for c in top
        if c is not attention
        and not is_norm(c.module)
        and any(p.dim() >= 2 for p in c.module.parameters())
    ]
    return (attention, others) if attention and others else None


def _candidates(call: Call, projection: Call | None, calls: list[Call]) -> list[nn.Module]:
    """Modules whose output may be what is added: the norm that reads the call's very output
    (Gemma), the module itself, or its last projection (BLOOM adds the stream inside)."""
    norms = [c.module for c in calls if c.tensor_in is call.tensor_out and is_norm(c.module)]
    last = [projection.module] if projection else []
    return list(dict.fromkeys([*norms[:1], call.module, *last]))


def _probe_sums(
    layer: nn.Module, run: Callable[[], None], x: Tensor, attention: nn.Module, mlp: nn.Module
) -> Sums:
    """Run with noise in the place of what `attention` and `mlp` put out, and see what adds up."""
    attn_noise, mlp_noise = _noise_like(x, seed=1), _noise_like(x, seed=2)
    noisy = [(Site(attention), _replace_by(attn_noise)), (Site(mlp), _replace_by(mlp_noise))]
    with hooked(noisy), recorded([layer, *layer.children()]) as calls:
        run()
    whole = calls[-1]
    mids = [c for c in calls if c.module is not layer and _adds_up(x, attn_noise, c.x)]
    return Sums(
        mid=mids[0].module if mids else None,
        is_serial=bool(mids) and _adds_up(mids[0].x, mlp_noise, whole.y),
        is_parallel=_adds_up(x + attn_noise, mlp_noise, whole.y),
    )


def _outputs(sums: Sums, attention: nn.Module, mlp: nn.Module) -> Places:
    return {
        "attn_out": Site(attention),
        "resid_mid": Site(sums.mid, on_input=True) if sums.mid else _PARALLEL,
        "mlp_out": Site(mlp) if sums.is_serial or sums.is_parallel else _UNCLEAR,
    }


def _last_projection(call: Call, calls: list[Call]) -> Call | None:
    """The last call of a matrix inside a module that puts out as many numbers as the module."""
    inside = set(call.module.modules())
    linear = [
        c
        for c in calls
        if c.module in inside
        and isinstance(weight := getattr(c.module, "weight", None), Tensor)
        and weight.dim() == 2
        and c.y.numel() == call.y.numel()
        and not is_norm(c.module)
    ]
    return linear[-1] if linear else None


def _hidden(call: Call, projection: Call | None, added: Site | str) -> Site | str:
    """The input of the projection, if nothing but the projection makes the module's output."""
    if projection:
        is_added = isinstance(added, Site) and added.module is projection.module
        if is_added or torch.equal(projection.y.flatten(), call.y.flatten()):
            return Site(projection.module, on_input=True)
    return f"{type(call.module).__name__} ends in no single output projection"


def _mlp_input(
    whole: Call, others: list[Call], run: Callable[[], None], mlp_out: Site | str
) -> Site | str:
    """The input of the first child that alone decides what the MLP puts out."""
    if isinstance(mlp_out, str):
        return mlp_out
    for call in others:
        held = _replace_by(_noise_like(call.x, seed=3))
        outputs = []
        for seed in (4, 5):
            stream = _replace_by(_noise_like(whole.x, seed=seed))
            hooks = [(Site(whole.module, True), stream), (Site(call.module, True), held)]
            with hooked(hooks), recorded([mlp_out.module]) as calls:
                run()
            outputs.append(calls[-1].y)
        if _adds_up(outputs[0], torch.zeros_like(outputs[0]), outputs[1]):
            return Site(call.module, on_input=True)
    return "what the MLP puts out depends on more than the input of one module"


def _noise_like(x: Tensor, seed: int) -> Tensor:
    """Noise of either sign, element by element about as large as `x`."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.rand(x.shape, generator=generator) * 1.5 + 0.5
    sign = torch.randint(0, 2, x.shape, generator=generator) * 2 - 1
    scale = x.abs() + 0.1 * x.abs().mean()
    return scale * (factor * sign).to(x)


def _replace_by(noise: Tensor) -> Edit:
    return lambda y: noise.reshape(y.shape).clone() if y.numel() == noise.numel() else y


def _adds_up(stream: Tensor, added: Tensor, total: Tensor) -> bool:
    """Whether stream + added = total up to rounding, in nearly all elements."""
    if not stream.numel() == added.numel() == total.numel():
        return False
    eps = torch.finfo(total.dtype).eps
    a, b, c = (t.double().flatten() for t in (stream, added, total))
    slack = 4 * eps * (a.abs() + b.abs() + c.abs())
    return bool(((a + b - c).abs() <= slack).double().mean() > 0.98)
