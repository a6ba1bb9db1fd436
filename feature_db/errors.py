"""Every error a user of this package can meet.

FeatureDBError                the root; a ValueError
├── IndexingError             build_index can't start, or its parts don't fit together
│   └── DatabaseExistsError   `out` holds something else already
├── OpenError                 the file is missing, is no feature database, is torn or in use
│   ├── SchemaVersionError    the database is of another version than this code
│   └── DatabaseBusyError     it is open elsewhere, in a way that keeps this one out
├── QueryError                SQL that DuckDB refuses, or that fails while it runs
│   └── QueryLimitError       untrusted SQL that takes more time, memory or room than it may
├── NotFoundError             a feature id, SAE or count that the database doesn't hold
├── ExportError               what is to be exported, or where to, can't be
├── MeaningError              an embedding model that can't be used, or has no vectors here
└── LabelError                a label, or a file of labels, that can't be used
    └── EndpointError         the language model that labels can't be used, or not any longer
"""


class FeatureDBError(ValueError):
    """Root of this package's errors: one line that names the value and the way out."""


class IndexingError(FeatureDBError):
    """The model, the SAEs and the cache don't fit together, or the index can't be built."""


class DatabaseExistsError(IndexingError):
    """A different database stands at `out`, and overwriting wasn't asked for."""


class OpenError(FeatureDBError):
    """The path is missing, isn't a feature database, is torn, or is being written."""


class SchemaVersionError(OpenError):
    """The database was written by a newer or an older schema than this code reads."""


class DatabaseBusyError(OpenError):
    """Another process or connection holds the database; it may let go of it soon."""


class QueryError(FeatureDBError):
    """DuckDB refused the SQL, or it failed while it ran."""


class QueryLimitError(QueryError):
    """Untrusted SQL passed one of its `SqlLimits`, or brought its process down."""


class NotFoundError(FeatureDBError):
    """The database holds no such feature, SAE or number of rows."""


class ExportError(FeatureDBError):
    """An unknown format, a place that is taken, or one that can't be written."""


class MeaningError(FeatureDBError):
    """The embedding model can't be loaded, gives no vectors, or the database has none of it."""


class LabelError(FeatureDBError):
    """A label that can't be kept, or settings of labelling that make no sense."""


class EndpointError(LabelError):
    """The endpoint refuses the key or the model, isn't there, or never answers as asked."""
