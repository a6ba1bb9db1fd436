"""Settings: small frozen models. Each option stands once, with its default and its description.

The architectures' own settings lie beside them in sae/architectures.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sae.errors import ConfigError


class Config(BaseModel):
    """A frozen group of settings; an unknown or impossible one is a one-line ConfigError."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ConfigError(_one_line(type(self), error)) from None


Split = Literal["train", "heldout"]


class SAEConfig(Config):
    """What every architecture needs; each adds its own."""

    d_sae: int = Field(gt=0, description="Number of features.")

    @property
    def expected_l0(self) -> float | None:
        """The L0 that training aims at; None if it isn't fixed beforehand."""
        return None


# Settings that may differ when a run goes on: they decide how often it is saved and, at most, how
# results are rounded, so it may go on on another machine.
FREE_SETTINGS = (
    "checkpoint_every_steps",
    "keep_checkpoints",
    "kernels",
    "nominate_in",
    "device",
)


class LearningConfig(Config):
    """What training and fine-tuning have in common."""

    beta1: float = Field(default=0.9, ge=0, lt=1, description="Adam's decay of the mean gradient.")
    beta2: float = Field(
        default=0.999, ge=0, lt=1, description="Adam's decay of the squared gradient."
    )
    max_grad_norm: float | None = Field(
        default=1.0,
        gt=0,
        description="Gradients of a larger L2 norm are scaled down to it. None: never.",
    )
    calibration_rows: int = Field(
        default=131_072,
        gt=0,
        description="Train rows for threshold, max_act and density at the end.",
    )
    max_skipped_batches: int = Field(
        default=10,
        gt=0,
        description="Batches with NaN or Inf in a row, after which learning stops.",
    )
    keep_checkpoints: int = Field(default=2, gt=0, description="Newest checkpoints that are kept.")
    log_every_steps: int = Field(default=10, gt=0, description="Steps between lines of metrics.")
    kernels: Literal["auto", "torch", "compiled", "triton"] = Field(
        default="auto", description="Tier of kernels. auto: the fastest that works here."
    )
    nominate_in: Literal["auto", "float32", "bfloat16", "float16", "int8"] = Field(
        default="auto",
        description="Precision that candidates for active features are found in; the choice is "
        "made from float32 scores. auto: the fastest here.",
    )
    device: str | None = Field(
        default=None, description="Torch device. None: cuda if there, else cpu."
    )


class TrainConfig(LearningConfig):
    """How an SAE is trained. None means: resolved at the start, and saved resolved."""

    n_steps: int | None = Field(
        default=None,
        gt=0,
        description="Steps. None: as n_tokens says, or one pass over the activations.",
    )
    n_tokens: int | None = Field(
        default=None,
        gt=0,
        description="Tokens to train on, instead of n_steps; passes repeat as needed.",
    )
    batch_size: int = Field(default=4096, gt=0, description="Rows a step.")
    lr: float | None = Field(
        default=None, gt=0, description="Peak learning rate. None: 2e-4 / sqrt(d_sae / 16384)."
    )
    warmup_steps: int | None = Field(
        default=None,
        ge=0,
        description="Steps of linear warm-up. None: 5% of the steps, at most 1000.",
    )
    decay_fraction: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="Last fraction of the steps, over which lr falls to zero.",
    )
    optimizer: Literal["adam", "adam_lean"] = Field(
        default="adam",
        description="adam: 16 bytes a parameter, gradient and weight included; adam_lean: 8, with "
        "gradients and their mean in bfloat16 and one second moment a feature.",
    )
    auxk_coefficient: float = Field(
        default=1 / 32,
        ge=0,
        description="Weight of the dead features' loss (AuxK); 0 turns it off.",
    )
    k_aux: int | None = Field(
        default=None, gt=0, description="Dead features active in a row for AuxK. None: d_model / 2."
    )
    dead_after_tokens: int = Field(
        default=1_000_000, gt=0, description="A feature not active for this many tokens is dead."
    )
    b_dec_init: Literal["mean", "geometric_median"] = Field(
        default="mean", description="Where b_dec starts: the first rows' mean or geometric median."
    )
    init_rows: int = Field(
        default=16_384,
        gt=0,
        description="Rows that the input scale, variance and b_dec start from.",
    )
    checkpoint_every_steps: int = Field(default=500, gt=0, description="Steps between checkpoints.")
    center: bool = Field(
        default=False,
        description="Take the rows' mean away before they are scaled: helps where a few channels "
        "are far off zero.",
    )
    aligned: bool = Field(
        default=False,
        description="Hold each feature's encoder and decoder at inner product 1: fewer dead "
        "features, more alike over seeds (arXiv 2605.18629).",
    )
    orthogonality_coefficient: float = Field(
        default=0.0,
        ge=0,
        description="Weight of OrtSAE's penalty on decoder rows' largest squared cosines.",
    )
    freeze_decoder: bool = Field(
        default=False, description="Leave W_dec at its random start: a baseline."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the start and of the order of rows.")
    data_seed: int | None = Field(
        default=None, ge=0, description="Seed of the order of rows, if another than seed."
    )

    @model_validator(mode="after")
    def _only_one_length(self) -> TrainConfig:
        if self.n_steps is not None and self.n_tokens is not None:
            raise ValueError(
                f"n_steps={self.n_steps} and n_tokens={self.n_tokens} both say how long to "
                "train; give one of them"
            )
        return self


class EvalConfig(Config):
    """What an SAE is evaluated on."""

    n_rows: int | None = Field(
        default=262_144, gt=0, description="Held-out rows, at most. None: all."
    )
    batch_size: int = Field(default=4096, gt=0, description="Rows encoded at a time.")
    split: Split = Field(
        default="heldout", description="Split that rows and tokens are taken from."
    )
    n_lm_tokens: int = Field(
        default=8192,
        gt=0,
        description="Target tokens, at most, that cross-entropies are taken over.",
    )
    lm_batch_size: int = Field(
        default=8, gt=0, description="Token blocks run through the model at a time."
    )
    baseline_rows: int = Field(
        default=32_768, gt=0, description="Train rows that baselines are fitted on."
    )
    seed: int = Field(
        default=0, ge=0, description="Seed of the row order and of the untrained baseline."
    )
    duplicate_cosine: float = Field(
        default=0.9,
        gt=-1,
        le=1,
        description="A feature with a decoder cosine above this with another is a duplicate.",
    )
    n_compared_features: int | None = Field(
        default=8192,
        gt=0,
        description="Features, at most, whose decoder is compared with all others. None: all.",
    )
    n_probe_rows: int = Field(
        default=0,
        ge=0,
        description="Held-out rows that labels are made for, for k-sparse probing and feature "
        "absorption; 0: neither is measured. 16384 is a good number.",
    )
    n_probe_examples: int = Field(
        default=1000,
        ge=20,
        description="Rows of either class, at most, that a probe is fitted on, and scored on.",
    )
    probe_k: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        default=(1, 2, 5), min_length=1, description="Features that a k-sparse probe may use."
    )


def _one_line(config: type[BaseModel], error: ValidationError) -> str:
    """The first thing wrong, in one line that names the setting, its value and the way out."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        near = get_close_matches(name, config.model_fields, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(config.model_fields)}"
        return f"{config.__name__} has no setting {name!r}; {hint}"
    if not name:
        return f"{config.__name__}: {first['msg'].removeprefix('Value error, ')}"
    value = "nothing was given" if first["type"] == "missing" else f"got {first['input']!r}"
    return f"{config.__name__}.{name}: {first['msg'].removeprefix('Value error, ')}; {value}"
