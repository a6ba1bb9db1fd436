"""The one place where torch hooks are set: reading and replacing what flows through a module.

In: a `Site` (a module and a side of it) and a function of one tensor. While `hooked` is open, each
call of the module passes its stream through the function; afterwards no hook is left.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

Edit = Callable[[Tensor], Tensor]


class Site(NamedTuple):
    """A place in a model: what flows into (`on_input`) or out of `module`."""

    module: nn.Module
    on_input: bool = False


@contextmanager
def hooked(hooks: Sequence[tuple[Site, Edit]]) -> Iterator[None]:
    """While open, replaces the first tensor at each site by what its function returns."""
    handles = []
    try:
        for site, fn in hooks:
            if site.on_input:
                hook = _on_input(fn)
                handles.append(site.module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                handles.append(site.module.register_forward_hook(_on_output(fn)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(value: Any) -> Tensor | None:
    """The tensor that a module's arguments or output carry, or None."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, dict):
        value = [value.get("hidden_states"), *value.values()]
    if isinstance(value, tuple | list):
        return next((v for v in value if isinstance(v, Tensor)), None)
    return None


def replace_first_tensor(value: Any, fn: Edit) -> Any:
    """`value` with `fn` of its first tensor in that tensor's place; the rest stays as it is."""
    x = first_tensor(value)
    if x is None:
        return value
    y = fn(x)
    if isinstance(value, Tensor):
        return y
    if isinstance(value, dict):  # a ModelOutput too: it keeps its attributes in step with its keys
        for key in [key for key, v in value.items() if v is x]:
            value[key] = y
        return value
    items = [y if v is x else v for v in value]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _on_input(fn: Edit) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if first_tensor(args) is not None:
            return replace_first_tensor(args, fn), kwargs
        return args, replace_first_tensor(dict(kwargs), fn)

    return hook


def _on_output(fn: Edit) -> Callable[..., Any]:
    return lambda _, __, output: replace_first_tensor(output, fn)
