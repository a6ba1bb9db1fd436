"""Trained SAEs that another one is set beside: a frozen decoder's, a random model's."""

from pathlib import Path
from typing import Any, NamedTuple

from activation_cache import ActivationCache, LanguageModel
from sae import SAE, Baseline, EvalConfig, baseline_of
from sae.storage import read_description

from .errors import PipelineError


class BaselineRun(NamedTuple):
    """name: of the report's row. folder: of the SAE. acts: its own activations, if it has some."""

    name: str
    folder: Path
    acts: str | None = None

    @classmethod
    def parse(cls, text: str) -> "BaselineRun":
        """NAME=FOLDER or NAME=FOLDER@ACTS. Raises: PipelineError."""
        name, _, where = text.partition("=")
        folder, _, acts = where.partition("@")
        if not name or not folder:
            raise PipelineError(
                f"--baselines {text!r}: expected NAME=FOLDER, such as frozen_decoder=runs/frozen, "
                "or NAME=FOLDER@ACTS"
            )
        return cls(name, Path(folder), acts or None)

    def identity(self) -> dict[str, Any]:
        """What its row depends on."""
        fingerprint = ActivationCache.open(self.acts).fingerprint_hash if self.acts else None
        weights = read_description(self.folder)["weights_sha256"]
        return {"name": self.name, "weights_sha256": weights, "cache_fingerprint": fingerprint}

    def measured(
        self, acts: ActivationCache, lm: LanguageModel | None, config: EvalConfig
    ) -> Baseline:
        """Its row. acts, lm: of the SAE that it is set beside, for one without its own.

        Raises: SourceError if the SAE and the activations don't fit.
        """
        sae, own = SAE.load(self.folder), ActivationCache.open(self.acts) if self.acts else None
        trained_on = sae.origin.provenance.get("model", "an unknown model")
        what = f"an SAE trained on {trained_on}"
        if (sae.origin.train_config or {}).get("freeze_decoder"):
            what += " with its random decoder frozen"
        if own is None:
            return baseline_of(sae, acts, self.name, what, lm=lm, config=config)
        return baseline_of(sae, own, self.name, what, config=config)
