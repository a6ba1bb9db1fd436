"""Embedding models that a user names: a folder, a package, or a function of one's own.

    models/all-MiniLM-L6-v2      a folder with a Hugging Face encoder: its mean last hidden state
    wordllama                    the package of that name, which carries its weights
    mypackage:load               what the function returns: a function of texts, or an object with
                                 `encode` or `embed`

In: texts. Out: vectors of length 1. Nothing is downloaded.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import MeaningError
from .indexing.sorting import Float32

Embed = Callable[[Sequence[str]], Any]

_FORMS = "a folder with an encoder, wordllama, or package:function"


class Embedder:
    """name: what it is called in a database. Call it with texts: float32 [n, dim], rows of norm 1
    (0 for a text in which the model finds nothing)."""

    def __init__(self, name: str, embed: Embed) -> None:
        self.name, self._embed = name, embed

    @classmethod
    def of(cls, model: "str | Path | Embed") -> "Embedder":
        """A model by its name, or a function. Raises: MeaningError."""
        if callable(model):
            return cls(f"{model.__module__}:{getattr(model, '__qualname__', 'function')}", model)
        if Path(model).is_dir():
            return cls(Path(model).name, _of_folder(Path(model)))
        name = str(model)
        if name == "wordllama":
            return cls(name, _wordllama())
        if ":" not in name:
            raise MeaningError(f"embedding model {name!r}: expected {_FORMS}")
        return cls(name, _of_package(*name.split(":", 1)))

    def __call__(self, texts: Sequence[str]) -> Float32:
        """Raises: MeaningError if the model gives no vectors."""
        found = np.asarray(self._embed(list(texts)))
        if found.ndim != 2 or len(found) != len(texts) or found.dtype.kind != "f":
            raise MeaningError(
                f"{self.name} gave {found.dtype} {list(found.shape)} for {len(texts)} texts: "
                "expected a vector of floats for each"
            )
        lengths = np.linalg.norm(found, axis=1, keepdims=True)
        vectors: Float32 = (found / np.maximum(lengths, 1e-12)).astype(np.float32)
        return vectors


def _of_folder(folder: Path) -> Embed:
    from activation_cache.embedding import load_encoder

    return load_encoder(folder)


def _wordllama() -> Embed:
    module = _imported("wordllama")
    home = Path(inspect.getfile(module)).parent
    model = module.WordLlama.load(cache_dir=home, disable_download=True)
    embed: Embed = model.embed
    return embed


def _of_package(package: str, path: str) -> Embed:
    found: Any = _imported(package)
    for part in path.split("."):
        if not hasattr(found, part):
            raise MeaningError(f"embedding model {package}:{path}: {package} has no {part}")
        found = getattr(found, part)
    made = found()
    for name in ("encode", "embed"):
        if hasattr(made, name):
            embed: Embed = getattr(made, name)
            return embed
    if not callable(made):
        raise MeaningError(
            f"embedding model {package}:{path} gave a {type(made).__name__}: expected a function "
            "of texts, or an object with encode or embed"
        )
    return made  # type: ignore[no-any-return]


def _imported(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MeaningError(
            f"embedding model {package}: it can't be imported ({error}): install it, or name "
            f"{_FORMS}"
        ) from None
