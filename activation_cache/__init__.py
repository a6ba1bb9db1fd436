"""Tokens -> activations on disk; the only home of model loading and torch hooks.

`LanguageModel` opens a model, `harvest` stores its activations, `ActivationCache` reads them back.
"""

from .cache import ActivationCache
from .chunks import CachedDocument, Chunk, DocumentActs, TokenBlock
from .documents import Corpus, Document, open_corpus
from .errors import (
    ActivationCacheError,
    CacheBusy,
    CacheCorrupt,
    CacheError,
    CacheMismatch,
    CorpusError,
    DiskFull,
    HookpointError,
    ModelError,
)
from .harvest import harvest
from .harvest_config import HarvestConfig, HarvestProgress
from .language_model import Captured, LanguageModel

__all__ = [
    "ActivationCache",
    "ActivationCacheError",
    "CacheBusy",
    "CacheCorrupt",
    "CacheError",
    "CacheMismatch",
    "CachedDocument",
    "Captured",
    "Chunk",
    "Corpus",
    "CorpusError",
    "DiskFull",
    "Document",
    "DocumentActs",
    "HarvestConfig",
    "HarvestProgress",
    "HookpointError",
    "LanguageModel",
    "ModelError",
    "TokenBlock",
    "harvest",
    "open_corpus",
]
