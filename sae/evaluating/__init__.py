"""SAE + held-out activations (+ language model, labels, other SAEs) -> Report.

`evaluation` puts the parts together; each part measures one thing, with its definition beside it.
"""

from sae.evaluating.baselines import baseline_of
from sae.evaluating.evaluation import evaluate
from sae.evaluating.labelled import Label, LabelledRows
from sae.evaluating.report import Baseline, CrossEntropy, Reconstruction, Report
from sae.evaluating.stability import stability

__all__ = [
    "Baseline",
    "CrossEntropy",
    "Label",
    "LabelledRows",
    "Reconstruction",
    "Report",
    "baseline_of",
    "evaluate",
    "stability",
]
