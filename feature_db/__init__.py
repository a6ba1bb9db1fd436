"""SAE + tokens -> features in one DuckDB file: index, SQL, search, labels.

    build_index(lm, [sae], cache, out="l6.duckdb")
    db = FeatureDB.open("l6.duckdb")
    db.sql("SELECT ... FROM features JOIN contexts USING (sae_id, feature_id)").df()
    db.sql("SELECT sae_id, feature_id ...").features().steer(lm, sae, strength=2)
    db.search("golden gate"); db.feature(4021); db.neighbors(4021); db.active(lm, sae, "The keys")
    label_features("l6.duckdb", Endpoint(base_url="http://localhost:8000/v1", model="qwen"))

The tables are in feature_db/migrations. Ranks count from 1; every other number counts from 0.
"""

from .active import ActiveFeatures
from .build import build_index, index_parts
from .config import IndexConfig, IndexProgress
from .database import FeatureDB
from .errors import (
    DatabaseBusyError,
    DatabaseExistsError,
    EndpointError,
    ExportError,
    FeatureDBError,
    IndexingError,
    LabelError,
    MeaningError,
    NotFoundError,
    OpenError,
    QueryError,
    QueryLimitError,
    SchemaVersionError,
)
from .exchange import ExportProgress, NeuronpediaNames, export
from .explanations import carry_explanations
from .feature import Coactivation, Context, Feature, HistogramBin, LogitEffect, Neighbor, TokenLift
from .feature_set import FeatureSet
from .label_file import LabelRow, read_label_file
from .labelling import (
    Endpoint,
    LabelConfig,
    LabelEstimate,
    LabelProgress,
    LabelSummary,
    estimate_labels,
    label_features,
)
from .result import Result
from .schema import SCHEMA_VERSION
from .token_text import visible
from .untrusted import SqlLimits

__all__ = [
    "SCHEMA_VERSION",
    "ActiveFeatures",
    "Coactivation",
    "Context",
    "DatabaseBusyError",
    "DatabaseExistsError",
    "Endpoint",
    "EndpointError",
    "ExportError",
    "ExportProgress",
    "Feature",
    "FeatureDB",
    "FeatureDBError",
    "FeatureSet",
    "HistogramBin",
    "IndexConfig",
    "IndexProgress",
    "IndexingError",
    "LabelConfig",
    "LabelError",
    "LabelEstimate",
    "LabelProgress",
    "LabelRow",
    "LabelSummary",
    "LogitEffect",
    "MeaningError",
    "Neighbor",
    "NeuronpediaNames",
    "NotFoundError",
    "OpenError",
    "QueryError",
    "QueryLimitError",
    "Result",
    "SchemaVersionError",
    "SqlLimits",
    "TokenLift",
    "build_index",
    "carry_explanations",
    "estimate_labels",
    "export",
    "index_parts",
    "label_features",
    "read_label_file",
    "visible",
]
