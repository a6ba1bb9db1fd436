"""The settings of every architecture as one group of flags, and what was given -> its config.

Flags, descriptions and defaults are made from the fields of the architectures' own configs; here
stands none of them.
"""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from cyclopts import Group, Parameter
from pydantic import BaseModel, ConfigDict, create_model
from pydantic.fields import FieldInfo

from sae import SAEConfig
from sae.architectures import ARCHITECTURES, config_of

from .errors import PipelineError

DEFAULT_ARCHITECTURE = "batch_topk"
OF_EVERY_ARCHITECTURE = Group("Of every architecture", sort_key=(2, 0))
"""Headings of --help stand in the order of their keys."""
if TYPE_CHECKING:
    ArchitectureName = str
else:
    ArchitectureName = Literal[tuple(ARCHITECTURES)]


def sae_config(architecture: str, given: Mapping[str, Any]) -> SAEConfig:
    """The config of an architecture with the settings that were given.

    Raises: PipelineError for a setting that it doesn't have, naming the architectures that do;
    ConfigError for an unknown architecture or an impossible value.
    """
    if architecture in ARCHITECTURES:
        require_settings([architecture], given)
    return config_of(architecture, dict(given))


def require_settings(architectures: Sequence[str], given: Iterable[str]) -> None:
    """Raises: PipelineError if none of the architectures has a setting that was given."""
    known = {name for each in architectures for name in settings_of(each)}
    for name in given:
        if name in known:
            continue
        mine = f"{' and '.join(architectures)} has {', '.join(sorted(known))}"
        if owners := owners_of(name):
            raise PipelineError(
                f"{name} is a setting of {', '.join(owners)}; {mine}. Choose one of those "
                f"architectures, or leave {name} out"
            )
        near = get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"{mine}"
        raise PipelineError(f"no architecture has a setting {name!r}; {hint}")


def settings_of(architecture: str) -> dict[str, FieldInfo]:
    """Fields of an architecture's config, by name."""
    return dict(ARCHITECTURES[architecture].config_class.model_fields)


def owners_of(setting: str) -> list[str]:
    """The architectures that have a setting."""
    return [name for name in ARCHITECTURES if setting in settings_of(name)]


def _all_settings() -> list[str]:
    """Each setting of any architecture once, those of the most first."""
    names = dict.fromkeys(name for each in ARCHITECTURES for name in settings_of(each))
    return sorted(names, key=lambda name: -len(owners_of(name)))


def _flag(setting: str) -> Any:
    """A flag's type, description and group; left out it is None, and counts as not given."""
    fields = {owner: settings_of(owner)[setting] for owner in owners_of(setting)}
    first = next(iter(fields.values()))
    is_list = any(str(each).startswith("tuple") for each in (first.annotation, *_parts(first)))
    parameter = Parameter(
        help=f"{_description(fields)} [{_defaults(fields)}]",
        group=_group(tuple(fields)),
        show_default=False,
        negative=() if is_list else None,
        consume_multiple=is_list or None,
    )
    return Annotated[first.annotation | None, parameter]  # type: ignore[operator]


def _parts(field: FieldInfo) -> tuple[Any, ...]:
    return get_args(field.annotation)


def _description(fields: Mapping[str, FieldInfo]) -> str:
    """One for all, or one for each architecture where they differ."""
    by_text: dict[str, list[str]] = {}
    for owner, field in fields.items():
        by_text.setdefault(field.description or "", []).append(owner)
    if len(by_text) == 1:
        return next(iter(by_text))
    return " ".join(f"{', '.join(owners)}: {text}" for text, owners in by_text.items())


def _defaults(fields: Mapping[str, FieldInfo]) -> str:
    by_default: dict[str, list[str]] = {}
    for owner, field in fields.items():
        said = "required" if field.is_required() else f"default: {_plain(field.default)}"
        by_default.setdefault(said, []).append(owner)
    if len(by_default) == 1:
        return next(iter(by_default))
    return "; ".join(f"{said} ({', '.join(owners)})" for said, owners in by_default.items())


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


_GROUPS: dict[tuple[str, ...], Group] = {tuple(ARCHITECTURES): OF_EVERY_ARCHITECTURE}


def _group(owners: tuple[str, ...]) -> Group:
    """The heading in --help of settings that these architectures alone have."""
    if owners not in _GROUPS:
        place = len(ARCHITECTURES) + 1 - len(owners)  # what most have comes first
        _GROUPS[owners] = Group(f"Of {', '.join(owners)}", sort_key=(2, place, owners))
    return _GROUPS[owners]


if TYPE_CHECKING:
    SAESettings = BaseModel
else:
    SAESettings = create_model(
        "SAESettings",
        __config__=ConfigDict(extra="forbid", frozen=True),
        __doc__="What was given of the settings of all architectures; None is not given.",
        **{name: (_flag(name), None) for name in _all_settings()},
    )


def given_settings(settings: BaseModel) -> dict[str, Any]:
    """What was given of SAESettings."""
    return settings.model_dump(exclude_unset=True)
