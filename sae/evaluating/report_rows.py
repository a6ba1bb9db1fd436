"""A report -> its figures one by one, each with its definition, as a table wants them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from sae.config import Config


class Figure(NamedTuple):
    """name: its path in the report, such as baselines.pca.reconstruction.fvu. value: the number.
    definition: what it is, as its field in the report says."""

    name: str
    value: float
    definition: str


def figures_of(report: Config) -> list[Figure]:
    """The numbers in a report: fields in fields by dots, list members by their `name`, histogram
    bins by their edges. What is undefined (None) or no number is left out."""
    return list(_walk(report, ""))


def _walk(group: Config, path: str) -> Iterator[Figure]:
    for name, field in type(group).model_fields.items():
        if name == "made_from":  # what the figures depend on, none of them
            continue
        yield from _of_value(getattr(group, name), f"{path}{name}", field.description or "")


def _of_value(value: Any, name: str, definition: str) -> Iterator[Figure]:
    if isinstance(value, bool | int | float):
        yield Figure(name, float(value), definition)
    elif isinstance(value, Config):
        edges, counts = getattr(value, "edges", None), getattr(value, "counts", None)
        if edges is None or counts is None:
            yield from _walk(value, f"{name}.")
        else:
            for low, high, count in zip(edges, edges[1:], counts, strict=False):
                yield Figure(f"{name}.{low:g}..{high:g}", float(count), definition)
    elif isinstance(value, dict):
        for key, inner in value.items():
            for figure in _of_value(inner, f"{name}.{key}", definition):
                # A group under a key, such as k, is explained by both.
                whole = f"{definition} {figure.definition}"
                yield figure._replace(definition=whole) if isinstance(inner, Config) else figure
    elif isinstance(value, tuple):
        for inner in value:
            if isinstance(inner, Config):
                yield from _of_value(inner, f"{name}.{getattr(inner, 'name', '')}", definition)
