"""Labels by a language model: explanations from contexts, with detection and fuzzing scores.

    endpoint = Endpoint(base_url="http://localhost:8000/v1", model="qwen")
    print(estimate_labels("l6.duckdb", endpoint, features=[4021]))
    label_features("l6.duckdb", endpoint, features="SELECT feature_id FROM features LIMIT 100")

In: contexts of a feature database, and any OpenAI-compatible endpoint. Out: rows of `explanations`
in it, and the best of them as labels. The way of it is that of Paulo et al. 2024, arXiv 2410.13928.
"""

from .config import Endpoint, LabelConfig, LabelEstimate, LabelProgress, LabelSummary
from .run import estimate_labels, label_features

__all__ = [
    "Endpoint",
    "LabelConfig",
    "LabelEstimate",
    "LabelProgress",
    "LabelSummary",
    "estimate_labels",
    "label_features",
]
