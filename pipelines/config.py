"""The configuration of a whole run: one YAML file, one frozen model, every option with its owner.

    model: gpt2                          sae:
    dataset: corpus.jsonl                  architecture: batch_topk
    hookpoints: [layers.6.resid_post]      d_sae: 16384
    out: runs/gpt2                         k: 64
    harvest: {n_tokens: 20000000}        train: {lr: 0.0003}
                                         sweep: {k: [32, 64], seed: [0, 1]}

The sections `harvest`, `sae`, `train`, `evaluate` and `index` take the fields of the configs of the
packages that do the work; defaults stand there and nowhere else.
"""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from activation_cache import HarvestConfig
from feature_db import IndexConfig
from sae import EvalConfig, SAEError, TrainConfig
from sae.training import RunSpec
from sae.wiring import Wiring

from .errors import ConfigFileError, PipelineError
from .sae_settings import DEFAULT_ARCHITECTURE
from .sweep import Axes, RunSettings, checked, specs_of


class PipelineConfig(BaseModel):
    """All that a run from text to features needs."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    model: str = Field(description="Hub id, local folder, .gguf file, or demo.")
    dataset: str = Field(description="Hub dataset, .jsonl, .txt or .parquet file, folder, or demo.")
    hookpoints: list[str] = Field(
        default_factory=list, description="Places in the model, an SAE for each."
    )
    wiring: Wiring | None = Field(
        None,
        description="What one transcoder or crosscoder reads and writes, instead of hookpoints; a "
        "crosscoder writes what it reads, and that may be left out.",
    )
    sweep: Axes = Field(
        default_factory=dict, description="Lists of values by setting: an SAE for each combination."
    )
    out: Path = Field(description="Folder for acts, the trained SAEs and the database.")
    acts: str = Field("", description="Folder or URL of the cache; left out, acts in `out`.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps.")
    dtype: str = Field("auto", description="The model's: auto, float32, bfloat16 or float16.")
    harvest: HarvestConfig = Field(default_factory=HarvestConfig)
    sae: dict[str, Any] = Field(
        description="architecture and its settings; those that a sweep varies may be left out."
    )
    train: TrainConfig = Field(default_factory=TrainConfig)
    evaluate: EvalConfig = Field(default_factory=EvalConfig)
    index: IndexConfig = Field(default_factory=IndexConfig)

    @field_validator("wiring", mode="before")
    @classmethod
    def _writes_what_it_reads(cls, section: Any) -> Any:
        is_short = isinstance(section, Mapping) and "reads" in section and "writes" not in section
        return {**section, "writes": section["reads"]} if is_short else section

    @model_validator(mode="after")
    def _runs_can_be_made(self) -> "PipelineConfig":
        try:
            if (self.wiring is None) == (not self.hookpoints):
                raise PipelineError("give one of hookpoints (at least one) and wiring")
            if "hookpoint" in self.sweep:
                raise PipelineError("sweep of hookpoint: list the places under hookpoints instead")
            checked(self.sweep)
            self.runs()
        except (PipelineError, SAEError) as error:
            raise ValueError(str(error)) from error
        return self

    @field_validator("out")
    @classmethod
    def _on_this_machine(cls, out: Path) -> Path:
        try:
            require_local(out)
        except PipelineError as error:
            raise ValueError(str(error)) from error
        return out

    @property
    def acts_place(self) -> str:
        """Folder or URL of the activation cache."""
        return self.acts or str(self.out / "acts")

    @property
    def database(self) -> Path:
        """File of the feature database."""
        return self.out / "features.duckdb"

    @property
    def places(self) -> list[str]:
        """Every place in the model that activations are needed of."""
        return self.hookpoints if self.wiring is None else list(self.wiring.hookpoints)

    def run_folder(self, hookpoint: str) -> Path:
        """Folder of the SAE at `hookpoint`: `run`, or one in `runs` where there are several. A
        sweep's SAEs lie inside."""
        return self.out / "run" if len(self.hookpoints) < 2 else self.out / "runs" / hookpoint

    def runs(self) -> list[tuple[Path, list[RunSpec]]]:
        """By folder what is trained together: one SAE, or all of a sweep."""
        settings = dict(self.sae)
        architecture = str(settings.pop("architecture", DEFAULT_ARCHITECTURE))
        places: list[str | Wiring] = [self.wiring] if self.wiring else [*self.hookpoints]
        made = []
        for place in places:
            out = self.run_folder(place if isinstance(place, str) else place.name)
            base = RunSettings(architecture, place, settings, self.train)
            made.append((out, specs_of(base, self.sweep, out)))
        return made


def require_local(path: Path) -> None:
    """Raises: PipelineError for what was a URL before it became a path."""
    if re.match(r"\w{2,}:/", str(path)):
        raise PipelineError(
            f"{path}: SAEs and databases are made on this machine; give a folder. Only an "
            "activation cache may lie at a URL"
        )


def read_config(path: str | Path, **overrides: Any) -> PipelineConfig:
    """The configuration in a YAML file. overrides: top-level keys that replace what it says.

    Raises: ConfigFileError in one line that names the file, the key and the nearest known one.
    """
    settings = read_yaml(Path(path))
    settings.update({key: value for key, value in overrides.items() if value is not None})
    try:
        return PipelineConfig.model_validate(settings)
    except SAEError as error:
        raise ConfigFileError(f"{path}: {error}") from error
    except ValidationError as error:
        raise ConfigFileError(f"{path}: {one_line(error, PipelineConfig)}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises: ConfigFileError."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigFileError(f"can't read the configuration {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise ConfigFileError(f"{path} is no valid YAML{line}: expected `key: value`") from error
    if not isinstance(content, dict):
        raise ConfigFileError(f"{path} holds {type(content).__name__}: expected `key: value` lines")
    return content


def one_line(error: ValidationError, model: type[BaseModel]) -> str:
    """The first thing that is wrong: key, value, what was expected, and the nearest known key."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return unknown_key(key, _known_keys(model))
    if first["type"] == "missing":
        return f"{key} is missing"
    if first["type"] == "value_error":  # said by a section's own config, in full
        return first["msg"].removeprefix("Value error, ")
    return f"{key}={first['input']!r}: {first['msg'].lower()}"


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Says that `key` is unknown, and which one may have been meant."""
    known = sorted(known)
    near = get_close_matches(key, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key {key!r}: {hint}"


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _known_keys(field.annotation, f"{prefix}{name}.")
    return keys
