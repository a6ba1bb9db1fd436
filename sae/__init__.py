"""Activations -> sparse autoencoder: training, evaluation, checkpoints. Pure mathematics.

    run = train(source, "layers.6.resid_post", BatchTopKConfig(d_sae=16384, k=64), out="runs/l6")
    sae = SAE.load("runs/l6")
    codes = sae.encode_sparse(x)
    x_hat = sae.decode_sparse(codes)
    report = evaluate(sae, source, lm)

Nothing here knows about language models: activations come from an ActivationSource, and a model
to splice reconstructions into is a SplicedModel.
"""

from sae.architectures import (
    BatchTopKConfig,
    GatedConfig,
    HierarchicalTopKConfig,
    JumpReLUConfig,
    MatryoshkaConfig,
    ReLUConfig,
    TopKConfig,
)
from sae.autoencoder import SAE, Origin
from sae.codes import Codes
from sae.config import EvalConfig, SAEConfig, TrainConfig
from sae.errors import (
    CheckpointError,
    ConfigError,
    CorruptFileError,
    DivergedError,
    FormatError,
    MissingFileError,
    NewerFormatError,
    NonFiniteError,
    ResumeMismatchError,
    RunInUseError,
    SAEError,
    SourceError,
    StorageError,
    TrainingError,
    TrainingStoppedError,
)
from sae.evaluating import (
    Baseline,
    CrossEntropy,
    Reconstruction,
    Report,
    baseline_of,
    evaluate,
)
from sae.finetuning import FinetuneResult, finetune
from sae.finetuning_state import FinetuneConfig, FinetuneMetrics
from sae.metrics import Metrics, fvu
from sae.sources import (
    ActivationSource,
    PairedTensors,
    SplicedModel,
    TensorSource,
    TokenBlock,
)
from sae.training import RunResult, RunSpec, train, train_many
from sae.wiring import Wiring, crosscoder, transcoder

__all__ = [
    "SAE",
    "ActivationSource",
    "Baseline",
    "BatchTopKConfig",
    "CheckpointError",
    "Codes",
    "ConfigError",
    "CorruptFileError",
    "CrossEntropy",
    "DivergedError",
    "EvalConfig",
    "FinetuneConfig",
    "FinetuneMetrics",
    "FinetuneResult",
    "FormatError",
    "GatedConfig",
    "HierarchicalTopKConfig",
    "JumpReLUConfig",
    "MatryoshkaConfig",
    "Metrics",
    "MissingFileError",
    "NewerFormatError",
    "NonFiniteError",
    "Origin",
    "PairedTensors",
    "ReLUConfig",
    "Reconstruction",
    "Report",
    "ResumeMismatchError",
    "RunInUseError",
    "RunResult",
    "RunSpec",
    "SAEConfig",
    "SAEError",
    "SourceError",
    "SplicedModel",
    "StorageError",
    "TensorSource",
    "TokenBlock",
    "TopKConfig",
    "TrainConfig",
    "TrainingError",
    "TrainingStoppedError",
    "Wiring",
    "baseline_of",
    "crosscoder",
    "evaluate",
    "finetune",
    "fvu",
    "train",
    "train_many",
    "transcoder",
]
