"""Activations whose true features are known: to see whether an SAE finds them.

    source = SyntheticSource(SyntheticTruth(SyntheticConfig()))
    run = train(source, "synthetic", BatchTopKConfig(d_sae=16384, k=24), out="runs/synthetic")
    print("\\n".join(score(run.sae, source).lines()))

`truth` says which features there are and how they fire, `source` makes rows of them as they are
asked for, `scores` compares an SAE with them.
"""

from sae.synthetic.scores import SyntheticScores, score
from sae.synthetic.source import SyntheticSource, TrueRows
from sae.synthetic.truth import SyntheticConfig, SyntheticTruth

__all__ = [
    "SyntheticConfig",
    "SyntheticScores",
    "SyntheticSource",
    "SyntheticTruth",
    "TrueRows",
    "score",
]
