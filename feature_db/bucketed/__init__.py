"""A feature database in buckets: Parquet files by feature, and a small DuckDB file beside them.

db.export("s3://bucket/l6", "buckets")
FeatureDB.open("s3://bucket/l6")
"""

from .opened import Buckets, Some, is_bucketed, is_url, unwritable

__all__ = ["Buckets", "Some", "is_bucketed", "is_url", "unwritable"]
