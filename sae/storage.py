"""SAE <-> folder: config.json (what it is, and the weights' hash) and sae.safetensors.

config.json is written last: without it there is no SAE, and with it the hash says whether the
weights are those it was written for.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from sae.architectures import config_of
from sae.atomic_files import sha256, told, write_json, write_tensors
from sae.autoencoder import SAE, Origin
from sae.errors import ConfigError, CorruptFileError, MissingFileError, NewerFormatError

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "sae.safetensors"
RESTORE = "copy the folder again, or train it again"


def save_sae(sae: SAE, folder: Path) -> Path:
    """Write an SAE into a folder, replacing one that is there. Returns: the folder."""
    digest = write_tensors(folder / WEIGHTS_FILE, tensors_of(sae))
    write_json(folder / CONFIG_FILE, _description(sae, digest))
    return folder


def load_sae(folder: Path) -> SAE:
    """Read an SAE; see SAE.load."""
    description = read_description(folder)
    sae = _described(description, folder / CONFIG_FILE)
    weights = folder / WEIGHTS_FILE
    with told(weights):
        _check_shapes(weights, {name: list(each.shape) for name, each in tensors_of(sae).items()})
        digest, expected = sha256(weights), description["weights_sha256"]
    if digest != expected:
        raise CorruptFileError(
            f"{weights} has sha256 {digest[:12]}..., but {CONFIG_FILE} expects "
            f"{str(expected)[:12]}...: the file is damaged or of another SAE; {RESTORE}"
        )
    with told(weights):
        tensors = load_file(weights)
    for name, parameter in sae.named_parameters():
        parameter.copy_(tensors["W_enc"].T if name == "W_enc_rows" else tensors[name])
    for name, buffer in sae.named_buffers():
        buffer.copy_(tensors[name])
    return sae


def tensors_of(sae: SAE) -> dict[str, Tensor]:
    """What sae.safetensors holds, by name."""
    names = ["W_enc", "b_enc", "W_dec", "b_dec", "threshold", "max_act", "density"]
    names += [] if sae.W_skip is None else ["W_skip"]
    return {name: getattr(sae, name).detach().float() for name in names}


def read_description(folder: Path) -> dict[str, Any]:
    """config.json as it is, its format version checked.

    Raises: MissingFileError, CorruptFileError, NewerFormatError.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        what = "holds no config.json" if folder.is_dir() else "doesn't exist"
        raise MissingFileError(
            f"{folder} {what}; an SAE is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, "
            "such as training writes when it is finished"
        )
    with told(path):
        text = path.read_bytes()
    try:
        description = json.loads(text)
        version = int(description["format_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(f"{path} is no SAE's description ({error!r}); {RESTORE}") from None
    if version > FORMAT_VERSION:
        raise NewerFormatError(
            f"{path} has format_version {version}; this version reads up to {FORMAT_VERSION}. "
            "Upgrade saebase"
        )
    return dict(description)


def _description(sae: SAE, digest: str) -> dict[str, Any]:
    origin = sae.origin
    return {
        "format_version": FORMAT_VERSION,
        "architecture": sae.architecture,
        "sae": sae.config.model_dump(mode="json"),
        "d_model": sae.d_model,
        "d_out": sae.d_out,
        "hookpoint": origin.hookpoint,
        "wiring": None if origin.wiring is None else origin.wiring.model_dump(mode="json"),
        "max_norm": origin.max_norm if math.isfinite(origin.max_norm) else None,
        "n_tokens_trained": origin.n_tokens_trained,
        "train": origin.train_config,
        "provenance": origin.provenance,
        "made_with": {"torch": torch.__version__},
        "weights_sha256": digest,
    }


def _described(description: dict[str, Any], path: Path) -> SAE:
    """The SAE described, its weights still zero; nothing is allocated for an absurd size."""
    try:
        d_model = int(description["d_model"])
        d_out = int(description.get("d_out", d_model))
        max_norm = description["max_norm"]
        config = config_of(description["architecture"], description["sae"])
        origin = Origin(
            hookpoint=description["hookpoint"],
            wiring=description.get("wiring"),
            max_norm=math.inf if max_norm is None else max_norm,
            n_tokens_trained=description["n_tokens_trained"],
            train_config=description["train"],
            provenance=description["provenance"],
        )
        str(description["weights_sha256"])
    except (KeyError, TypeError, ConfigError) as error:
        raise CorruptFileError(f"{path} can't be used: {_reason(error)}; {RESTORE}") from None
    weights = path.parent / WEIGHTS_FILE
    if not weights.is_file():
        raise MissingFileError(f"{path.parent} holds no {WEIGHTS_FILE}; {RESTORE}")
    n_bytes = 4 * (d_model + d_out + 3) * config.d_sae
    if not n_bytes < weights.stat().st_size + 1:
        raise CorruptFileError(
            f"{weights} has {weights.stat().st_size} bytes; d_sae={config.d_sae} and "
            f"d_model={d_model} need more than {n_bytes}: it is cut short; {RESTORE}"
        )
    return SAE(config, d_model, origin, d_out=d_out)


def _reason(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def _check_shapes(path: Path, expected: dict[str, list[int]]) -> None:
    """Compare the file's own list of tensors with what the config says, before reading them."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        found = {name: [*each.get_shape(), each.get_dtype()] for name, each in slices.items()}
    except SafetensorError as error:
        raise CorruptFileError(f"{path} is no safetensors file ({error}); {RESTORE}") from None
    for name, shape in expected.items():
        if found.get(name) != [*shape, "F32"]:
            raise CorruptFileError(
                f"{path}: {name} is {found.get(name, 'missing')}; expected {[*shape, 'F32']}; "
                f"{RESTORE}"
            )
