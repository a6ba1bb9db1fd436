"""Report: what an evaluation found, as documented fields, rows, JSON and lines of text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from sae.atomic_files import write_text
from sae.config import Config
from sae.evaluating.report_rows import Figure, figures_of
from sae.evaluating.report_text import report_lines


class Reconstruction(Config):
    """How well rows are reconstructed, and from how many features."""

    l0: float = Field(description="Mean active features a row (for PCA, its rank).")
    fvu: float = Field(
        description="Sum of squared error over sum of squared deviation from the mean of these "
        "rows, both over all rows, divided once. 1 - fvu is the explained variance."
    )
    fvu_token_median: float = Field(
        description="Median over rows of squared error over squared deviation from the mean."
    )
    fvu_token_quantiles: dict[str, float] = Field(
        default_factory=dict,
        description="Quantiles over rows of squared error over squared deviation from the mean, "
        "linear between neighbours: 95% is what a row in twenty exceeds.",
    )
    cosine: float = Field(description="Mean over rows of the cosine of x and x_hat, not centred.")


class CrossEntropy(Config):
    """What putting x_hat in the place of x does to the model's predictions, in nats a token.

    Rows of massive norm stay as they are in every variant, the ablated ones included.
    """

    n_tokens: int = Field(description="Target tokens counted: those in the split.")
    clean: float = Field(description="Cross-entropy of the untouched model, in nats a token.")
    spliced: float = Field(description="Cross-entropy with x_hat in the place of x.")
    zero_ablated: float = Field(description="Cross-entropy with zeros in the place of x.")
    mean_ablated: float = Field(
        description="Cross-entropy with the mean train row in the place of x."
    )
    recovered: float | None = Field(
        description="(zero_ablated - spliced) / (zero_ablated - clean); none if ablating costs "
        "less than 0.02 nats."
    )
    recovered_from_mean: float | None = Field(
        default=None,
        description="(mean_ablated - spliced) / (mean_ablated - clean), the stricter of the two; "
        "none if ablating costs less than 0.02 nats.",
    )
    kl: float = Field(description="Mean KL(clean || spliced) over target tokens, in nats.")


class Histogram(Config):
    """Counts between edges."""

    edges: tuple[float, ...] = Field(description="Ascending; bin i is edges[i] to edges[i + 1].")
    counts: tuple[int, ...] = Field(description="How many are in each bin.")


class Dictionary(Config):
    """How features are used, and how their decoder directions lie to each other."""

    density_histogram: Histogram = Field(
        description="Features that aren't dead, by log10 of the fraction of the rows evaluated in "
        "which they are active; the lowest bin has those below it too."
    )
    n_compared: int = Field(
        description="Features, not dead, whose decoder row was compared with all others that are "
        "not dead: the next five figures are of them."
    )
    duplicate_cosine: float = Field(description="The cosine above which two are duplicates.")
    n_duplicates: int = Field(
        description="Compared features with a decoder cosine above duplicate_cosine with another."
    )
    max_cosine_mean: float | None = Field(
        description="Mean over compared features of the largest cosine of their decoder row with "
        "another one."
    )
    max_cosine_quantiles: dict[str, float] | None = Field(
        description="Quantiles over compared features of the largest cosine of their decoder row "
        "with another one."
    )
    decoder_norm_quantiles: dict[str, float] | None = Field(
        description="Quantiles of the L2 norm of decoder rows, over features that aren't dead."
    )


class Stability(Config):
    """How far SAEs that differ in their seed found the same features."""

    n_others: int = Field(description="SAEs compared with; the figures are means over them.")
    n_features: int = Field(description="Features compared: those of this SAE that aren't dead.")
    matched_cosine: float = Field(
        description="Mean over features of the cosine of their decoder row with that of their "
        "partner in the other SAE. Partners are one to one: the nearest pair first, then the "
        "nearest of what is left (greedy); a feature without one counts as 0."
    )
    matched_fraction: float = Field(
        description="Fraction of features whose cosine with their one-to-one partner is above 0.7."
    )
    max_cosine: float = Field(
        description="Mean over features of the largest cosine of their decoder row with any of the "
        "other SAE: several may share one."
    )


class ProbeScore(Config):
    """What a probe reaches on rows that it was not fitted on, as many positive as negative."""

    accuracy: float = Field(description="Fraction of test rows told right; chance is 0.5.")
    f1: float = Field(description="2 TP / (2 TP + FP + FN) on test rows.")
    auroc: float = Field(
        description="Chance that a positive test row scores above a negative one; chance is 0.5."
    )


class ProbedLabel(Config):
    """What features tell of one label."""

    name: str = Field(description="The label.")
    n_train: int = Field(description="Rows that the probes were fitted on, half of them positive.")
    n_test: int = Field(description="Rows that they were scored on, half of them positive.")
    feature_ids: tuple[int, ...] = Field(description="The features that were chosen, best first.")
    x: ProbeScore = Field(description="A probe on all of x.")
    features: dict[str, ProbeScore] = Field(
        description="A probe on the k features that differ most."
    )
    coordinates: dict[str, ProbeScore] = Field(
        description="A probe on the k coordinates of x that differ most."
    )


class Probing(Config):
    """k-sparse probing: logistic regression (L2, C = 1) on k features, beside x itself.

    The k features, or coordinates of x, are those whose mean differs most between positive and
    negative train rows, in units of the standard deviation within the classes.
    """

    n_labels: int = Field(description="Labels probed: 20 examples or more of each class and side.")
    x: ProbeScore = Field(description="Mean over labels, of a probe on all of x.")
    features: dict[str, ProbeScore] = Field(
        description="Mean over labels, of a probe on the k features whose mean differs most in "
        "units of its standard deviation."
    )
    coordinates: dict[str, ProbeScore] = Field(
        description="Mean over labels, of a probe on the k coordinates of x whose mean differs "
        "most in units of its standard deviation."
    )
    labels: tuple[ProbedLabel, ...] = Field(description="One by one.")


class AbsorbedLabel(Config):
    """Absorption of one broad label."""

    name: str = Field(description="The label.")
    n_rows: int = Field(description="Positive test rows that the probe on x finds.")
    main_feature_ids: tuple[int, ...] = Field(description="Features that stand for the label.")
    full: float = Field(description="Fraction of these rows that are fully absorbed.")
    fraction: float = Field(description="Mean over these rows of the fraction absorbed.")


class Absorption(Config):
    """Feature absorption on broad labels: see `sae.evaluating.absorption` for the steps.

    Of positive test rows that a logistic probe on x finds, w being its unit direction.
    """

    n_labels: int = Field(
        description="Broad labels measured: F1 of the probe on x 0.6 or more, 20 rows or more."
    )
    full: float = Field(
        description="Mean over labels of the fraction of rows in which no main feature of the "
        "label is active, and one other feature gives 0.4 or more of (x - b_dec) . w (after Chanin "
        "et al. 2024, on tokens of running text)."
    )
    fraction: float = Field(
        description="Mean over labels and rows of absorbed / (absorbed + main): what up to 3 other "
        "features of decoder cosine 0.1 or more give to (x - b_dec) . w, beside the main features; "
        "0 if they give less than 0.4 of it (after SAEBench, on tokens of running text)."
    )
    n_main_features: float = Field(
        description="Mean over labels of the features that stand for a label: k is raised while it "
        "gains more than 0.03 in F1 on train rows."
    )
    labels: tuple[AbsorbedLabel, ...] = Field(description="One by one.")


class Baseline(Config):
    """What something that an SAE must beat reaches, by the same definitions."""

    name: str = Field(description="untrained, pca, or as the caller calls it.")
    what: str = Field(description="What it is, in a few words.")
    reconstruction: Reconstruction = Field(description="As for the SAE.")
    spliced: float | None = Field(
        default=None, description="Cross-entropy with its x_hat in the place of x."
    )
    recovered: float | None = Field(
        default=None,
        description="(zero_ablated - spliced) / (zero_ablated - clean) for it; none if undefined.",
    )
    kl: float | None = Field(
        default=None, description="Mean KL(clean || spliced) for it, over target tokens, in nats."
    )
    probing: Probing | None = Field(
        default=None, description="As for the SAE, without single labels; none if not measured."
    )


class Report(Config):
    """An SAE's evaluation on held-out rows, beside its baselines."""

    hookpoint: str = Field(description="Place in the model that rows were taken from.")
    split: str = Field(description="Split that rows and tokens were taken from.")
    n_rows: int = Field(description="Rows evaluated.")
    n_massive: int = Field(description="Rows of the split left out: their norm is massive.")
    max_norm: float | None = Field(description="Norm above which rows are massive; none if off.")
    reconstruction: Reconstruction = Field(description="The SAE's own.")
    n_features: int = Field(description="d_sae.")
    n_dead: int = Field(description="Features active in none of the rows evaluated.")
    n_dense: int = Field(description="Features active in more than 10% of the rows evaluated.")
    dictionary: Dictionary | None = Field(
        default=None, description="Densities and decoder directions; none in older reports."
    )
    cross_entropy: CrossEntropy | None = Field(
        default=None, description="The SAE spliced into its model; none if no model was given."
    )
    stability: Stability | None = Field(
        default=None, description="Beside SAEs of other seeds; none if none was given."
    )
    probing: Probing | None = Field(
        default=None, description="What k features tell of labels; none if not asked for."
    )
    absorption: Absorption | None = Field(
        default=None, description="Of broad labels; none if not asked for, or none is plain in x."
    )
    baselines: tuple[Baseline, ...] = Field(
        description="untrained and pca, then those that the caller measured."
    )
    made_from: dict[str, Any] = Field(
        default_factory=dict,
        description="What the figures depend on, as far as the caller says it: weights, cache.",
    )

    @property
    def fvu(self) -> float:
        """The SAE's FVU: see Reconstruction."""
        return self.reconstruction.fvu

    @property
    def l0(self) -> float:
        """The SAE's L0."""
        return self.reconstruction.l0

    @property
    def ce_recovered(self) -> float | None:
        """Fraction of cross-entropy recovered; None if no model was given."""
        return self.cross_entropy.recovered if self.cross_entropy else None

    def write(self, path: str | Path) -> Path:
        """Write as JSON, atomically. Returns: the path."""
        write_text(Path(path), self.model_dump_json(indent=1) + "\n")
        return Path(path)

    @classmethod
    def read(cls, path: str | Path) -> Report:
        """Read what write wrote."""
        return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))

    def figures(self) -> list[Figure]:
        """Every figure by itself: name, value, definition."""
        return figures_of(self)

    def lines(self) -> list[str]:
        """A table of the SAE beside its baselines, and the rest in sentences."""
        return report_lines(self)
