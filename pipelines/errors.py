"""The errors that are a user's to mend, from every package, and those of `pipelines` itself.

    ValueError
    ├── activation_cache.ActivationCacheError   models, hookpoints, text, caches
    ├── sae.SAEError                            settings, training, saved SAEs
    ├── feature_db.FeatureDBError               the database and its SQL
    ├── interp.InterpError                      steering
    └── PipelineError                           this package
        └── ConfigFileError                     a YAML file that can't be used

The command line prints each as one line and exits with status 2.
"""

from activation_cache import ActivationCacheError
from feature_db import FeatureDBError
from interp import InterpError
from sae import SAEError


class PipelineError(ValueError):
    """Root of this package's errors."""


class ConfigFileError(PipelineError):
    """A configuration file can't be read, or says something impossible."""


USER_ERRORS = (ActivationCacheError, SAEError, FeatureDBError, InterpError, PipelineError)
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
