"""FeatureDB: a feature database, opened. SQL, single features, search, neighbours, live text."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa
import xxhash

from sae import SAE

from .active import ActiveFeatures, active_features, text_codes
from .bucketed import Some
from .embedders import Embed, Embedder
from .errors import NotFoundError, QueryError
from .exchange import Format, export
from .explanations import (
    BEST_FIRST,
    FeatureLabel,
    add_explanations,
    drop_label,
    label_text,
    put_labels,
)
from .feature import Feature, features_of
from .feature_rows import FeatureRows
from .feature_set import FeatureSet, Frame
from .known_saes import KnownSAEs
from .label_file import LabelRow, label_of
from .meaning import Meanings, OnEmbedded, nearest, require_meanings, write_meanings
from .pages import Pages
from .queries import Queries
from .result import Result
from .search import (
    Match,
    found_table,
    is_one_word,
    require_text,
    strongest_texts,
    with_examples,
    word_matches,
)
from .search_texts import phrase_query, regex_query, text_matches
from .untrusted import Params, SqlLimits

if TYPE_CHECKING:
    from activation_cache import LanguageModel

_PAGES_AT_ONCE = 256
_NEIGHBORS = pa.schema(
    {
        "neighbor_id": pa.int32(),
        "cosine": pa.float32(),
        "label": pa.string(),
        "density": pa.float64(),
    }
)
_BATCH_ROWS = 65_536


class FeatureDB:
    """A feature database. Open one with `FeatureDB.open`; use it in a `with`, or close it.

    Methods that take `sae_id` need it only where the database holds several SAEs.
    """

    def __init__(self, queries: Queries) -> None:
        self._queries, self._saes = queries, KnownSAEs(queries.rows, queries.path)
        self._vocabulary: Sequence[str] | None = None
        self._meanings: dict[str, Meanings] = {}
        self._features = FeatureRows(queries.arrow)
        self._pages = (
            queries.buckets.pages(queries.rows, self._features)
            if queries.buckets
            else Pages(queries.rows, self._features, queries.threads)
        )
        self.path = queries.path

    @classmethod
    def open(
        cls, path: str | Path, *, read_only: bool = True, external_access: bool = True
    ) -> "FeatureDB":
        """Open a database that `build_index` made, or the folder or URL that one was exported to
        with `export(out, "buckets")`.

        read_only: several processes may read at once; only one may have it open for writing. An
            older schema is brought up to date when it is opened for writing.
        external_access: whether SQL may read and write other files (COPY, read_csv, ATTACH); a
            read-only database alone does not keep COPY from writing one.
        Raises: OpenError if it is missing, no feature database, torn or in use, or is to be written
            and in buckets; SchemaVersionError if it is of another version.
        """
        return cls(Queries.open(path, read_only=read_only, external_access=external_access))

    def close(self) -> None:
        """Close the database; results already fetched stay usable."""
        self._saes.forget()
        self._queries.close()

    def __enter__(self) -> "FeatureDB":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"FeatureDB({str(self.path)!r})"

    @property
    def name(self) -> str:
        """The last part of its path or URL."""
        return str(self.path).rstrip("/").rpartition("/")[2]

    @property
    def is_bucketed(self) -> bool:
        """Whether its large tables lie in buckets: see docs/buckets.md."""
        return self._queries.buckets is not None

    def sql(
        self,
        query: str,
        params: Params | None = None,
        *,
        untrusted: bool = False,
        limits: SqlLimits | None = None,
    ) -> Result:
        """Run SQL. params: a list for `?`, a dict for `$name`.

        untrusted: the SQL comes from a page or another person. One SELECT runs in a process of its
            own, which can read this database and nothing else, within `limits`; it adds 0.3 s.
        Raises: QueryError in one line, with the tables where one is unknown; QueryLimitError for
            untrusted SQL that takes too much.
        """
        if untrusted:
            return self._result(self._queries.untrusted(query, params, limits or SqlLimits()))
        if limits is not None:
            raise QueryError("limits hold for untrusted SQL alone: pass untrusted=True with them")
        return self._result(self._queries.arrow(query, params))

    def sql_about(self, ids: Sequence[tuple[int, int]], query: str, params: Params) -> Result:
        """SQL that asks about these features, (sae_id, feature_id), alone.

        Of a database in buckets the rows of no others are read, nor seen by the query.
        """
        return self._result(self._queries.arrow(query, params, Some(ids)))

    def batches(self, query: str, params: Params | None = None) -> Iterator[pa.Table]:
        """The rows of a query, some ten thousand at a time: the result is never whole in memory."""
        with self._queries.asking(query) as cursor:
            reader = cursor.sql(query, params=params).to_arrow_reader(_BATCH_ROWS)
            for batch in reader:
                yield pa.Table.from_batches([batch])

    def vocabulary(self) -> Sequence[str]:
        """The text of every token, by token id; read once. ("" where an old database forgot it.)"""
        if self._vocabulary is None:
            rows = self._queries.rows("SELECT token FROM vocabulary ORDER BY token_id")
            self._vocabulary = [row["token"] for row in rows]
        return self._vocabulary

    def content_hash(self) -> str:
        """A hash of all tables' rows, in their order: the same for databases of equal content.

        Their bytes differ all the same: DuckDB gives each file a random identifier.
        """
        digest = xxhash.xxh3_128()
        for table in self._queries.tables():
            digest.update(table.encode())
            rows = self._queries.rows(f"SELECT md5(row::VARCHAR) AS digest FROM {table} AS row")
            digest.update("".join(row["digest"] for row in rows).encode())
        return digest.hexdigest()

    def saes(self) -> Result:
        """The SAEs that the database holds."""
        return self.sql("SELECT * FROM saes ORDER BY sae_id")

    def feature(self, feature_id: int, sae_id: int | None = None) -> Feature:
        """Everything about one feature. Raises: NotFoundError if there is no such feature."""
        return next(self.pages([(self.require_sae(sae_id), feature_id)]))

    def pages(self, ids: Sequence[tuple[int, int]]) -> Iterator[Feature]:
        """Everything about many features, (sae_id, feature_id), in their order, a few hundred read
        at once. Raises: NotFoundError for one that there isn't."""
        for first in range(0, len(ids), _PAGES_AT_ONCE):
            some = ids[first : first + _PAGES_AT_ONCE]
            found: dict[tuple[int, int], Feature] = {}
            for sae_id in dict.fromkeys(pair[0] for pair in some):
                mine = list(dict.fromkeys(pair[1] for pair in some if pair[0] == sae_id))
                sae, rows = self._saes.row(sae_id), self._pages.rows(sae_id, mine)
                pages = features_of(sae, rows, self.vocabulary())
                found |= {(sae_id, feature_id): page for feature_id, page in pages.items()}
            for sae_id, feature_id in some:
                if (sae_id, feature_id) not in found:
                    raise self._saes.no_feature(feature_id, sae_id)
                yield found[sae_id, feature_id]

    def features(self, found: Frame | Sequence[int]) -> FeatureSet:
        """The features of a frame with feature_id (and sae_id, where there are several SAEs), or of
        a list of ids: to look at, steer by or export. Raises: NotFoundError."""
        return FeatureSet.of(self, found)

    def export(self, out: str | Path, format: Format, **options: Any) -> Path | str:  # noqa: A002
        """All features, or those that are said, as one of `feature_db.exchange.FORMATS`, with the
        options of `feature_db.exchange.export`."""
        return export(self, out, format, **options)

    def embed(self, model: str | Path | Embed, on_embedded: OnEmbedded | None = None) -> int:
        """Keep what an embedding model makes of every feature, for `search(meaning=model)`.

        model: a folder with an encoder, `wordllama`, `package:function`, or a function of texts:
            see feature_db/embedders.py. on_embedded: told how many features of how many are done.
        Returns: the number of features. Raises: MeaningError; OpenError unless the database is
            open for writing.
        """
        embedder = Embedder.of(model)
        self._meanings.pop(embedder.name, None)
        with self._writing() as connection:
            return write_meanings(connection, embedder, self.vocabulary(), on_embedded)

    def search(
        self,
        text: str,
        limit: int = 20,
        *,
        regex: bool = False,
        meaning: str | Path | Embed | None = None,
    ) -> Result:
        """Features about a word, phrase or regular expression, best first, over all SAEs; case
        doesn't matter.

        Looks at labels, tokens by lift, contexts and promoted tokens: see feature_db/search.py.
        meaning: an embedding model, of which `embed` has kept vectors: by meaning instead, score
            being the cosine.
        Returns: sae_id, feature_id, label, score, reason, example, density.
        Raises: NotFoundError for an empty text, or a regular expression that isn't one;
            MeaningError without vectors of the model.
        """
        require_text(text, limit)
        if meaning is not None:
            matches = self._meant(text, limit, meaning)
        elif not regex and is_one_word(text):
            found = word_matches(self._queries.rows, text.strip().lower(), limit)
            matches = with_examples(self._queries.rows, found)
        else:
            query = regex_query(text) if regex else phrase_query(text)
            matches = text_matches(self._queries.rows, self.vocabulary(), query, limit)
        return self._result(found_table(self._features, matches))

    def _meant(self, text: str, limit: int, model: str | Path | Embed) -> list[Match]:
        embedder = Embedder.of(model)
        if embedder.name not in self._meanings:
            table = self._queries.arrow(
                "SELECT sae_id, feature_id, field, vector FROM meanings WHERE model = ?",
                [embedder.name],
            )
            known = [
                row["model"] for row in self._queries.rows("SELECT DISTINCT model FROM meanings")
            ]
            self._meanings[embedder.name] = require_meanings(
                table, embedder.name, known, str(self.path)
            )
        found = nearest(self._meanings[embedder.name], embedder([text])[0], limit)
        examples = strongest_texts(self._queries.rows, [each[:2] for each in found])
        return [Match.by_meaning(*each, examples.get(each[:2])) for each in found]

    def neighbors(self, feature_id: int, n: int = 10, sae_id: int | None = None) -> Result:
        """The n features of nearest direction: neighbor_id, cosine, label, density.

        Raises: NotFoundError for an unknown feature, or more neighbours than the index keeps.
        """
        sae_id = self.require_sae(sae_id)
        _require_positive(n, "n")
        found = self._queries.rows(
            "SELECT neighbor_id, cosine FROM neighbors "
            "WHERE sae_id = ? AND feature_id = ? AND rank <= ? ORDER BY rank",
            [sae_id, feature_id, n],
        )
        if not len(found) or len(found) < n < self._saes.d_sae(sae_id):
            self._saes.require_feature(feature_id, sae_id)
            raise NotFoundError(
                f"{n} neighbours asked for, {len(found)} kept: ask for no more, or index again "
                f"with IndexConfig(n_neighbors={n})"
            )
        known = self._features.of([(sae_id, row["neighbor_id"]) for row in found])
        for row in found:
            row |= {name: known[sae_id, row["neighbor_id"]][name] for name in ("label", "density")}
        return self._result(pa.Table.from_pylist(found, _NEIGHBORS))

    def label(self, feature_id: int, text: str, sae_id: int | None = None) -> None:
        """Give a feature a person's label, in place of an earlier one. No machine overwrites it.

        Raises: LabelError for an empty or overlong text; NotFoundError for an unknown feature;
            OpenError unless the database is open for writing.
        """
        sae_id = self.require_sae(sae_id)
        self._saes.require_feature(feature_id, sae_id)
        label = FeatureLabel(sae_id, feature_id, label_text(text))
        with self._writing() as connection:
            put_labels(connection, [label])

    def remove_label(self, feature_id: int, sae_id: int | None = None) -> None:
        """Take a person's label away: the feature shows what it would without it.

        Raises: NotFoundError if there is none; otherwise as `label`.
        """
        sae_id = self.require_sae(sae_id)
        self._saes.require_feature(feature_id, sae_id)
        with self._writing() as connection:
            if not drop_label(connection, sae_id, feature_id):
                raise NotFoundError(
                    f"feature {feature_id} in SAE {sae_id} of {self.path} has no label by a "
                    "person: there is nothing to remove"
                )

    def import_labels(self, rows: Sequence[LabelRow]) -> None:
        """Keep all labels of a file (`read_label_file`), or none of them.

        Raises: LabelError that names the line of an unknown feature or SAE; OpenError.
        """
        sizes: dict[int, int] = dict(self.sql("SELECT sae_id, d_sae FROM saes").fetchall())
        labels = [label_of(row, sizes, self.path) for row in rows]
        with self._writing() as connection:
            put_labels(connection, labels)

    def add_explanations(self, rows: pa.Table) -> None:
        """Append rows to `explanations`, without explanation_id and created_at; show the best.

        Raises: OpenError unless the database is open for writing; QueryError.
        """
        with self._writing() as connection:
            add_explanations(connection, rows)

    def explanations(self, feature_id: int, sae_id: int | None = None) -> Result:
        """All that is kept of what was said of a feature, what it shows first: docs/labels.md."""
        sae_id = self.require_sae(sae_id)
        self._saes.require_feature(feature_id, sae_id)
        return self.sql(
            "SELECT method, model, text, detection_score, fuzzing_score, n_detection, n_fuzzing, "
            "created_at FROM explanations WHERE sae_id = ? AND feature_id = ? "
            f"ORDER BY {BEST_FIRST}",
            [sae_id, feature_id],
        )

    def active(self, lm: "LanguageModel", sae: SAE, text: str, n: int = 5) -> ActiveFeatures:
        """The features that fire on `text`, the n strongest of each token.

        lm, sae: those that the database was made with.
        Raises: NotFoundError if the database holds another SAE, or was made with another model.
        """
        _require_positive(n, "n")
        row = self._saes.row_of(sae)
        if row["model_revision"] != lm.revision:
            raise NotFoundError(
                f"the model is {lm.name} (revision {lm.revision[:12]}); {self.path} was made with "
                f"{row['model']} (revision {str(row['model_revision'])[:12]}): pass that one"
            )
        tokens, codes = text_codes(lm, sae, row["hookpoint"], text)
        known = self._queries.arrow(
            "SELECT feature_id, label, max_act, density FROM features WHERE sae_id = ? "
            "ORDER BY feature_id",
            [row["sae_id"]],
        )
        return active_features(tokens, codes, known, n)

    def require_sae(self, sae_id: int | None) -> int:
        """The SAE meant. Raises: NotFoundError if that is unknown or not plain."""
        return self._saes.sae_id(sae_id)

    def sae_id_of(self, sae: SAE) -> int:
        """The number of an SAE here. Raises: NotFoundError if the database wasn't made of it."""
        return int(self._saes.row_of(sae)["sae_id"])

    @contextmanager
    def _writing(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """One transaction, after which labels are read anew. Raises: OpenError, QueryError."""
        with self._queries.writing() as connection:
            yield connection
        self._features.forget()

    def _result(self, table: pa.Table) -> Result:
        is_shaded = {"token_ids", "acts"} <= set(table.column_names)
        return Result(table, self.vocabulary() if is_shaded else (), self.features)


def _require_positive(value: int, name: str) -> None:
    if value < 1:
        raise NotFoundError(f"{name}={value}: expected 1 or more")
