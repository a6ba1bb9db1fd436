"""Nested settings and figures -> one level, with dotted names."""

from collections.abc import Mapping
from typing import Any


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Numbers, texts and lists of numbers by dotted name; of a list of groups each by its name."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple) and any(isinstance(each, dict) for each in value):
            for index, each in enumerate(value):
                if isinstance(each, dict):
                    found |= flat(each, f"{prefix}{each.get('name', index)}.")
        elif isinstance(value, int | float | str):
            found[prefix + name] = value
    return found
