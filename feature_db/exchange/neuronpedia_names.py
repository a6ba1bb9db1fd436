"""What things are called in Neuronpedia: settings, and names made of what the database says."""

import re
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from ..errors import ExportError

_SLUG = r"^[a-zA-Z0-9_-]+$"
# The user to whom imports into an instance of one's own belong. Source: SAEDashboard's exporter.
_DEFAULT_CREATOR_ID = "clkht01d40000jv08hvalcvly"


class NeuronpediaNames(BaseModel):
    """Names in Neuronpedia. What is left out is made of the database."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_id: str | None = Field(
        default=None,
        pattern=_SLUG,
        description="Neuronpedia: id of the model there, such as gpt2-small.",
    )
    source_set: str | None = Field(
        default=None, pattern=_SLUG, description="Neuronpedia: what SAEs of several layers share."
    )
    layer: int | None = Field(
        default=None, ge=0, description="Neuronpedia: layer, where the hookpoint names none."
    )
    release: str = Field(
        default="saebase", pattern=_SLUG, description="Neuronpedia: id of the release."
    )
    creator: str = Field(default="saebase", min_length=1, description="Neuronpedia: who made it.")
    creator_id: str = Field(
        default=_DEFAULT_CREATOR_ID,
        min_length=1,
        description="Neuronpedia: id of the user it belongs to.",
    )


class SourceNames(NamedTuple):
    """One SAE there. source_id: `{layer}-{source_set}`, which Neuronpedia reads the layer from."""

    model_id: str
    source_set: str
    source_id: str


def source_names(sae: dict[str, Any], names: NeuronpediaNames) -> SourceNames:
    """sae: its row of `saes`.

    Raises: ExportError where the hookpoint has no layer and none is given.
    """
    layer = names.layer
    if layer is None:
        found = re.match(r"layers\.(\d+)\.", sae["hookpoint"])
        if found is None:
            raise ExportError(
                f"SAE {sae['sae_id']} reads {sae['hookpoint']}, and Neuronpedia sorts SAEs by "
                "layer: say which (--layer 0)"
            )
        layer = int(found[1])
    model_id = names.model_id or _slug(sae["model"].rstrip("/").split("/")[-1])
    source_set = names.source_set or _slug(re.sub(r"^layers\.\d+\.", "", sae["name"]))
    return SourceNames(model_id, source_set, f"{layer}-{source_set}")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-") or "saebase"
