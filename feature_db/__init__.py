"""SAE + tokens -> features in one DuckDB file: index, SQL, search, labels.

    build_index(lm, [sae], cache, out="l6.duckdb")
    db = FeatureDB.open("l6.duckdb")
    db.sql("SELECT ... FROM features JOIN contexts USING (sae_id, feature_id)").df()
    db.search("golden gate"); db.feature(4021); db.neighbors(4021); db.active(lm, sae, "The keys")

The tables are in feature_db/migrations. Ranks count from 1; every other number counts from 0.
"""

from .active import ActiveFeatures
from .build import build_index
from .config import IndexConfig, IndexProgress
from .database import FeatureDB
from .errors import (
    DatabaseExistsError,
    FeatureDBError,
    IndexingError,
    NotFoundError,
    OpenError,
    QueryError,
    QueryLimitError,
    SchemaVersionError,
)
from .feature import Context, Feature, HistogramBin, LogitEffect, Neighbor, TokenLift
from .result import Result
from .schema import SCHEMA_VERSION
from .token_text import visible
from .untrusted import SqlLimits

__all__ = [
    "SCHEMA_VERSION",
    "ActiveFeatures",
    "Context",
    "DatabaseExistsError",
    "Feature",
    "FeatureDB",
    "FeatureDBError",
    "HistogramBin",
    "IndexConfig",
    "IndexProgress",
    "IndexingError",
    "LogitEffect",
    "Neighbor",
    "NotFoundError",
    "OpenError",
    "QueryError",
    "QueryLimitError",
    "Result",
    "SchemaVersionError",
    "SqlLimits",
    "TokenLift",
    "build_index",
    "visible",
]
