"""Every error that a user of `activation_cache` can meet, as one tree.

    ActivationCacheError(ValueError)
    ├── ModelError            a model that can't be found, loaded or used
    │   └── HookpointError    a place that the model does not have
    ├── CorpusError           a text source that can't be read, or holds no text
    └── CacheError            a cache that can't be opened, trusted or written
        ├── CacheMismatch     made from something else than what it is used with
        ├── CacheCorrupt      a file is missing, torn or altered
        ├── CacheBusy         another process is writing it
        └── DiskFull          no room for the next shard

Each message is one line: what is wrong, the value, what was expected, the way out.
"""

MEND = "Make it again with `saebase harvest --repair`, or restore it"
"""The way out of damage."""


class ActivationCacheError(ValueError):
    """Root of the tree."""


class ModelError(ActivationCacheError):
    """A model can't be found, loaded or used."""


class HookpointError(ModelError):
    """The model has no such hookpoint."""


class CorpusError(ActivationCacheError):
    """A text source can't be read or holds no text."""


class CacheError(ActivationCacheError):
    """A cache can't be opened, trusted or written."""


class CacheMismatch(CacheError):
    """A cache was made from something else than what it is used with."""


class CacheCorrupt(CacheError):
    """A file of the cache is missing, torn or altered."""


class CacheBusy(CacheError):
    """Another process is writing the cache."""


class DiskFull(CacheError):
    """There is no room for what would be written."""
