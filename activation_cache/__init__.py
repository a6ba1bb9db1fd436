"""Tokens -> activations on disk; the only home of model loading and torch hooks.

`LanguageModel` opens a model, `harvest` stores its activations, `ActivationCache` reads them back,
`cache_statistics` says what is in it.
"""

from .block_cache import configure_block_cache
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
from .statistics import CacheStatistics, StatisticsProgress, cache_statistics
from .stream import ActivationStream

__all__ = [
    "ActivationCache",
    "ActivationCacheError",
    "ActivationStream",
    "CacheBusy",
    "CacheCorrupt",
    "CacheError",
    "CacheMismatch",
    "CacheStatistics",
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
    "StatisticsProgress",
    "TokenBlock",
    "cache_statistics",
    "configure_block_cache",
    "harvest",
    "open_corpus",
]
