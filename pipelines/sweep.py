"""One description of several SAEs -> the runs that are trained side by side.

In: the settings of one run, and axes such as `k=16,32,64`. Out: a `RunSpec` for each point of their
product, each in a folder named after it.
"""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sae import TrainConfig
from sae.architectures import ARCHITECTURES
from sae.training import RunSpec
from sae.wiring import Wiring

from .errors import PipelineError
from .sae_settings import require_settings, sae_config, settings_of

_PLACES = ("architecture", "hookpoint")
_SHARED = ("batch_size", "data_seed")

Axes = dict[str, list[Any]]


class RunSettings(NamedTuple):
    """What is given of a run before its configs are made. sae: settings of the architecture."""

    architecture: str
    place: str | Wiring
    sae: dict[str, Any]
    train: TrainConfig


def axes_of(texts: Iterable[str]) -> Axes:
    """`k=16,32`, `lr=3e-4,1e-3` -> values by setting. A list as a value stands in brackets.

    Raises: PipelineError if a text is no such line, or a setting or a value stands twice.
    """
    axes: Axes = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name.isidentifier():
            raise PipelineError(f"--sweep {text}: expected SETTING=VALUE,VALUE such as k=16,32,64")
        try:
            found = yaml.safe_load(f"[{values}]")
        except yaml.YAMLError:
            found = []
        if name in axes:
            raise PipelineError(f"--sweep {name} is given twice: put its values in one list")
        axes[name] = found
    return checked(axes)


def checked(axes: Axes) -> Axes:
    """The same. Raises: PipelineError if one has no values, the same twice, or can't be swept."""
    for name, values in axes.items():
        if not isinstance(values, list) or not values:
            raise PipelineError(f"sweep of {name}: expected a list of values, such as k=16,32,64")
        for value in values:
            if values.count(value) > 1:
                raise PipelineError(
                    f"sweep of {name}: {value_text(value)} stands twice; once is enough"
                )
        if name in _SHARED:
            raise PipelineError(
                f"{name} can't be swept: SAEs that train side by side share their batches. Train "
                "them one after another"
            )
    return axes


def texts_of(axes: Mapping[str, Any]) -> list[str]:
    """What axes_of reads, from a YAML file's `sweep: {k: [16, 32]}`."""
    lines = []
    for name, values in axes.items():
        listed = values if isinstance(values, list) else [values]
        text = yaml.safe_dump(listed, default_flow_style=True, width=2**20).strip()
        lines.append(f"{name}={text[1:-1]}")
    return lines


def specs_of(base: RunSettings, axes: Axes, out: Path) -> list[RunSpec]:
    """A run for each point of the product of the axes; a point's folder is named after it.

    Each architecture takes the axes and the settings that it has. The order of rows stays that of
    the first seed, so that all share their batches.
    Raises: PipelineError for a setting that nothing has; ConfigError for an impossible value.
    """
    if not axes:
        return [RunSpec(base.place, sae_config(base.architecture, base.sae), base.train, out)]
    architectures = [str(each) for each in axes.get("architecture", [base.architecture])]
    _require_known(base, axes, architectures)
    data_seed = base.train.seed if base.train.data_seed is None else base.train.data_seed
    shared = base.train.model_copy(update={"data_seed": data_seed})
    specs = {}
    for architecture in architectures:
        own = {"architecture": [architecture], **_axes_of_its_own(axes, architecture)}
        named = own if "architecture" in axes else _without(own, "architecture")
        for values in itertools.product(*own.values()):
            point = dict(zip(own, values, strict=True))
            folder = out / _name({name: point[name] for name in axes if name in named})
            specs[folder] = _spec(base._replace(train=shared), point, folder)
    return list(specs.values())


def _spec(base: RunSettings, point: dict[str, Any], folder: Path) -> RunSpec:
    known = settings_of(point["architecture"])
    mine = {name: value for name, value in {**base.sae, **point}.items() if name in known}
    trained = {name: value for name, value in point.items() if name in TrainConfig.model_fields}
    config = sae_config(point["architecture"], mine)
    train = TrainConfig(**{**base.train.model_dump(), **trained})
    return RunSpec(point.get("hookpoint", base.place), config, train, folder)


def _axes_of_its_own(axes: Axes, architecture: str) -> Axes:
    known = {*settings_of(architecture), *TrainConfig.model_fields, "hookpoint"}
    return {name: values for name, values in axes.items() if name in known}


def _without(axes: Axes, left_out: str) -> Axes:
    return {name: values for name, values in axes.items() if name != left_out}


def _require_known(base: RunSettings, axes: Axes, architectures: list[str]) -> None:
    """Raises: PipelineError for an axis or a setting that no run would have."""
    for architecture in architectures:
        if architecture not in ARCHITECTURES:
            raise PipelineError(
                f"unknown architecture {architecture!r}; there are {', '.join(ARCHITECTURES)}"
            )
    of_sae = set(axes) - set(TrainConfig.model_fields) - set(_PLACES)
    require_settings(architectures, [*base.sae, *sorted(of_sae)])
    if "hookpoint" in axes and isinstance(base.place, Wiring):
        raise PipelineError("sweep of hookpoint: a transcoder or crosscoder has its places already")


def _name(point: Mapping[str, Any]) -> str:
    """`k=16,lr=0.0003`: a folder's name."""
    return ",".join(f"{name}={value_text(value)}" for name, value in point.items()).replace(
        "/", "_"
    )


def value_text(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(value_text, value))
    try:
        return f"{value if isinstance(value, int) else float(value):g}"
    except (TypeError, ValueError):
        return str(value)
