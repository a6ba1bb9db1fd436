"""Report: what an evaluation found, as documented fields, JSON and lines of text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from sae.atomic_files import write_text
from sae.config import Config


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
    cosine: float = Field(description="Mean over rows of the cosine of x and x_hat, not centred.")


class CrossEntropy(Config):
    """What putting x_hat in the place of x does to the model's predictions, in nats a token.

    Rows of massive norm stay as they are in every variant, the ablated ones included.
    """

    n_tokens: int = Field(description="Target tokens counted: those in the split.")
    clean: float = Field(description="Cross-entropy of the untouched model.")
    spliced: float = Field(description="With x_hat in the place of x.")
    zero_ablated: float = Field(description="With zeros in the place of x.")
    mean_ablated: float = Field(description="With the mean train row in the place of x.")
    recovered: float | None = Field(
        description="(zero_ablated - spliced) / (zero_ablated - clean); none if undefined."
    )
    kl: float = Field(description="Mean KL(clean || spliced).")


class Baseline(Config):
    """What something without learned features reaches on the same rows and tokens."""

    name: str = Field(description="untrained, or pca.")
    what: str = Field(description="What it is, in a few words.")
    reconstruction: Reconstruction = Field(description="As for the SAE.")
    spliced: float | None = Field(
        default=None, description="Cross-entropy with its x_hat in the place of x."
    )
    recovered: float | None = Field(default=None, description="As for the SAE.")


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
    cross_entropy: CrossEntropy | None = Field(
        default=None, description="The SAE spliced into its model; none if no model was given."
    )
    baselines: tuple[Baseline, ...] = Field(description="untrained and pca.")
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

    def lines(self) -> list[str]:
        """A table of the SAE beside its baselines, and the rest in sentences."""
        rows = [["", "L0", "FVU", "FVU median", "cosine", "CE", "CE recovered"]]
        ce = self.cross_entropy
        spliced, recovered = (ce.spliced, ce.recovered) if ce else (None, None)
        rows.append(_row("SAE", self.reconstruction, spliced, recovered))
        rows += [_row(b.name, b.reconstruction, b.spliced, b.recovered) for b in self.baselines]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        table = ["  ".join(map(str.rjust, row, widths)).rstrip() for row in rows]
        return [*table, *self._sentences()]

    def _sentences(self) -> list[str]:
        sentences = [
            f"{self.n_rows:,} {self.split} rows of {self.hookpoint}; {self.n_massive:,} of massive "
            f"norm left out{'' if self.max_norm is None else f' (above {self.max_norm:,.0f})'}",
            f"{self.n_features:,} features: {self.n_dead:,} dead (active in no row), "
            f"{self.n_dense:,} dense (active in more than 10% of rows)",
        ]
        if ce := self.cross_entropy:
            sentences.append(
                f"cross-entropy over {ce.n_tokens:,} tokens: clean {ce.clean:.3f}, spliced "
                f"{ce.spliced:.3f}, zero-ablated {ce.zero_ablated:.3f}, mean-ablated "
                f"{ce.mean_ablated:.3f}; KL {ce.kl:.3f}"
            )
        return sentences


def _row(
    name: str, found: Reconstruction, spliced: float | None, recovered: float | None
) -> list[str]:
    return [
        name,
        f"{found.l0:.1f}",
        f"{found.fvu:.4f}",
        f"{found.fvu_token_median:.4f}",
        f"{found.cosine:.4f}",
        "-" if spliced is None else f"{spliced:.3f}",
        "-" if recovered is None else f"{recovered:.3f}",
    ]
