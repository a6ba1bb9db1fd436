"""Every error that sae raises on purpose. All are ValueErrors: a caller's mistake or a bad file.

SAEError
├── ConfigError              a setting that is unknown, out of range or contradicts another
├── SourceError              activations that don't fit: width, hookpoint, model, too few rows
├── FormatError              an SAE folder that can't be used
│   ├── MissingFileError     a file isn't there
│   ├── CorruptFileError     a file's bytes, shapes or hash aren't what was written
│   └── NewerFormatError     written by a newer version of this library
├── StorageError             the system refused to read or write a file
├── CheckpointError          no checkpoint of a run can be used
│   └── ResumeMismatchError  the run in the folder was started with other settings
└── TrainingError            training can't go on
    ├── RunInUseError        another process trains in the folder
    ├── NonFiniteError       too many batches in a row held NaN or Inf
    ├── DivergedError        the loss has grown beyond hope
    └── TrainingStoppedError the caller asked to stop; a checkpoint was left

Each message is one line: what is wrong, the value, what was expected, the way out.
"""


class SAEError(ValueError):
    """Base of every error raised on purpose by sae."""


class ConfigError(SAEError):
    """A setting is unknown, out of range, or contradicts another."""


class SourceError(SAEError):
    """Activations don't fit: their width, hookpoint or model differ, or there are too few."""


class FormatError(SAEError):
    """An SAE folder can't be used."""


class MissingFileError(FormatError):
    """A file that an SAE folder must hold isn't there."""


class CorruptFileError(FormatError):
    """A file's bytes, shapes or hash aren't what was written."""


class NewerFormatError(FormatError):
    """The folder was written by a newer version of this library."""


class StorageError(SAEError):
    """The system refused to read or write a file: a full disk, a missing permission, a bad disk."""


class CheckpointError(SAEError):
    """A run has checkpoints, but none of them can be used."""


class ResumeMismatchError(CheckpointError):
    """The run in the folder was started with other settings than those asked for."""


class TrainingError(SAEError):
    """Training can't go on."""


class RunInUseError(TrainingError):
    """Another process is training in the folder."""


class NonFiniteError(TrainingError):
    """Too many batches in a row held NaN or Inf."""


class DivergedError(TrainingError):
    """The loss has grown to many times what it was at the start."""


class TrainingStoppedError(TrainingError):
    """The caller asked training to stop; a checkpoint of the last step was left."""
