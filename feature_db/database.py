"""FeatureDB: a feature database, opened. SQL, single features, search, neighbours, live text."""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa
import xxhash

from sae import SAE

from .activations import activations_view
from .active import ActiveFeatures, active_features, text_codes
from .bucketed import Buckets, Some, is_bucketed, is_url, unwritable
from .embedders import Embed, Embedder
from .errors import NotFoundError, OpenError, QueryError
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
from .indexing.parts import parts_folder
from .inputs import weights_hash
from .label_file import LabelRow, label_of
from .meaning import Meanings, OnEmbedded, nearest, require_meanings, write_meanings
from .opening import connected, one_line, require_file, version_of
from .pages import Pages
from .result import Result
from .schema import check_version, migrate
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
from .token_text import visible
from .transactions import transaction
from .untrusted import Params, SqlLimits, run_untrusted

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

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        path: Path | str,
        activations: str | None = None,
        buckets: Buckets | None = None,
    ) -> None:
        """path: the file, or the folder or URL of buckets. activations: SQL that makes the view of
        that name, which each cursor needs anew. buckets: what lies beside the file."""
        self._connection, self._activations, self._buckets = connection, activations, buckets
        self._vocabulary: Sequence[str] | None = None
        self._saes: list[dict[str, Any]] | None = None
        self._meanings: dict[str, Meanings] = {}
        self._thread = ThreadPoolExecutor(1, "feature-db")
        self._features = FeatureRows(self._arrow)
        self._pages = (
            buckets.pages(self._rows, self._features)
            if buckets
            else Pages(self._rows, self._features, self._thread)
        )
        self.path = path

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
        buckets = Buckets.open(path, read_only=read_only) if is_bucketed(path) else None
        file = buckets.small if buckets else Path(path)
        require_file(file)
        connection = connected(file, read_only)
        try:
            version = version_of(connection, file)
            check_version(version, str(path), may_migrate=not read_only)
            if not read_only:
                migrate(connection, version)
            view = None if buckets else activations_view(connection, file)
            if not external_access:
                if view:
                    connection.execute("SET allowed_directories = [?]", [f"{parts_folder(file)}/"])
                connection.execute("SET enable_external_access = false")
                connection.execute("SET lock_configuration = true")
        except BaseException:
            connection.close()
            raise
        shown = buckets.root if buckets and is_url(path) else Path(path)
        return cls(connection, shown, view, buckets)

    def close(self) -> None:
        """Close the database; results already fetched stay usable."""
        self._thread.shutdown()
        if self._buckets:
            self._buckets.close()
        self._saes = None  # so that whoever asks on is told
        self._connection.close()

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
        return self._buckets is not None

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
            return self._result(self._untrusted_arrow(query, params, limits or SqlLimits()))
        if limits is not None:
            raise QueryError("limits hold for untrusted SQL alone: pass untrusted=True with them")
        return self._result(self._arrow(query, params))

    def sql_about(self, ids: Sequence[tuple[int, int]], query: str, params: Params) -> Result:
        """SQL that asks about these features, (sae_id, feature_id), alone.

        Of a database in buckets the rows of no others are read, nor seen by the query.
        """
        return self._result(self._arrow(query, params, Some(ids)))

    def batches(self, query: str, params: Params | None = None) -> Iterator[pa.Table]:
        """The rows of a query, some ten thousand at a time: the result is never whole in memory."""
        with self._asking(query) as cursor:
            reader = cursor.sql(query, params=params).to_arrow_reader(_BATCH_ROWS)
            for batch in reader:
                yield pa.Table.from_batches([batch])

    def vocabulary(self) -> Sequence[str]:
        """The text of every token, by token id; read once. ("" where an old database forgot it.)"""
        if self._vocabulary is None:
            rows = self._rows("SELECT token FROM vocabulary ORDER BY token_id")
            self._vocabulary = [row["token"] for row in rows]
        return self._vocabulary

    def content_hash(self) -> str:
        """A hash of all tables' rows, in their order: the same for databases of equal content.

        Their bytes differ all the same: DuckDB gives each file a random identifier.
        """
        digest = xxhash.xxh3_128()
        for table in self._tables():
            digest.update(table.encode())
            rows = self._rows(f"SELECT md5(row::VARCHAR) AS digest FROM {table} AS row")
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
                sae, rows = self._sae(sae_id), self._pages.rows(sae_id, mine)
                pages = features_of(sae, rows, self.vocabulary())
                found |= {(sae_id, feature_id): page for feature_id, page in pages.items()}
            for sae_id, feature_id in some:
                if (sae_id, feature_id) not in found:
                    raise NotFoundError(self._no_feature(feature_id, sae_id))
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
            found = word_matches(self._rows, text.strip().lower(), limit)
            matches = with_examples(self._rows, found)
        else:
            query = regex_query(text) if regex else phrase_query(text)
            matches = text_matches(self._rows, self.vocabulary(), query, limit)
        return self._result(found_table(self._features, matches))

    def _meant(self, text: str, limit: int, model: str | Path | Embed) -> list[Match]:
        embedder = Embedder.of(model)
        if embedder.name not in self._meanings:
            table = self._arrow(
                "SELECT sae_id, feature_id, field, vector FROM meanings WHERE model = ?",
                [embedder.name],
            )
            known = [row["model"] for row in self._rows("SELECT DISTINCT model FROM meanings")]
            self._meanings[embedder.name] = require_meanings(
                table, embedder.name, known, str(self.path)
            )
        found = nearest(self._meanings[embedder.name], embedder([text])[0], limit)
        examples = strongest_texts(self._rows, [each[:2] for each in found])
        return [Match.by_meaning(*each, examples.get(each[:2])) for each in found]

    def neighbors(self, feature_id: int, n: int = 10, sae_id: int | None = None) -> Result:
        """The n features of nearest direction: neighbor_id, cosine, label, density.

        Raises: NotFoundError for an unknown feature, or more neighbours than the index keeps.
        """
        sae_id = self.require_sae(sae_id)
        _require_positive(n, "n")
        found = self._rows(
            "SELECT neighbor_id, cosine FROM neighbors "
            "WHERE sae_id = ? AND feature_id = ? AND rank <= ? ORDER BY rank",
            [sae_id, feature_id, n],
        )
        if not len(found) or len(found) < n < self._d_sae(sae_id):
            self._require_feature(feature_id, sae_id)
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
        self._require_feature(feature_id, sae_id)
        label = FeatureLabel(sae_id, feature_id, label_text(text))
        with self._writing() as connection:
            put_labels(connection, [label])

    def remove_label(self, feature_id: int, sae_id: int | None = None) -> None:
        """Take a person's label away: the feature shows what it would without it.

        Raises: NotFoundError if there is none; otherwise as `label`.
        """
        sae_id = self.require_sae(sae_id)
        self._require_feature(feature_id, sae_id)
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
        self._require_feature(feature_id, sae_id)
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
        row = self._row_of(sae)
        if row["model_revision"] != lm.revision:
            raise NotFoundError(
                f"the model is {lm.name} (revision {lm.revision[:12]}); {self.path} was made with "
                f"{row['model']} (revision {str(row['model_revision'])[:12]}): pass that one"
            )
        tokens, codes = text_codes(lm, sae, row["hookpoint"], text)
        known = self._arrow(
            "SELECT feature_id, label, max_act, density FROM features WHERE sae_id = ? "
            "ORDER BY feature_id",
            [row["sae_id"]],
        )
        return active_features(tokens, codes, known, n)

    def _result(self, table: pa.Table) -> Result:
        is_shaded = {"token_ids", "acts"} <= set(table.column_names)
        return Result(table, self.vocabulary() if is_shaded else (), self.features)

    def _arrow(self, query: str, params: Params | None, about: Some | None = None) -> pa.Table:
        with self._asking(query, about) as cursor:
            relation = cursor.sql(query, params=params)
            return pa.table({}) if relation is None else relation.to_arrow_table()

    @contextmanager
    def _asking(self, query: str, about: Some | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
        """A cursor that has the tables that a query names. about: of these rows alone, where that
        saves reading. Raises: QueryError; OpenError for buckets that can't be read."""
        try:
            with self._connection.cursor() as cursor:
                if self._buckets:
                    self._buckets.attach(cursor, query, about)
                elif self._activations and "activations" in query.lower():
                    cursor.execute(self._activations).fetchall()
                yield cursor
        except duckdb.Error as error:
            raise QueryError(self._explained(str(error))) from None

    def _untrusted_arrow(self, query: str, params: Params | None, limits: SqlLimits) -> pa.Table:
        try:
            self._connection.cursor().close()  # closed, this says so as it does for other SQL
            if self._buckets is None:
                return run_untrusted(Path(self.path), query, params, limits)
            named = self._buckets.for_strangers(self._connection, query)
            return run_untrusted(self._buckets.small, query, params, limits, named)
        except (duckdb.Error, QueryError) as error:
            kind = type(error) if isinstance(error, QueryError) else QueryError
            raise kind(visible(self._explained(str(error)))) from None

    @contextmanager
    def _writing(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """One transaction. Raises: OpenError if the database is read-only; QueryError."""
        try:
            with transaction(self._connection):
                yield self._connection
            self._features.forget()
        except duckdb.Error as error:
            if "read-only" in str(error) and self._buckets:
                raise unwritable(self.path) from None
            if "read-only" in str(error):
                raise OpenError(
                    f"{self.path} is open for reading alone: to write labels, "
                    "FeatureDB.open(path, read_only=False)"
                ) from None
            raise QueryError(self._explained(str(error))) from None

    def _rows(self, query: str, params: Params | None = None) -> list[dict[str, Any]]:
        """Few rows, in less time than by way of Arrow."""
        with self._asking(query, Some.of(params)) as cursor:
            found = cursor.execute(query, params)
            names = [column[0] for column in found.description]
            return [dict(zip(names, row, strict=True)) for row in found.fetchall()]

    def _explained(self, message: str) -> str:
        """DuckDB's message in one line; where a table is unknown, with those that there are."""
        message = one_line(message)
        if self._buckets:
            message = self._buckets.explained(message)
        if not re.search(r"Table with name .* does not exist", message):
            return message
        return f"{message}; the tables are {', '.join(self._tables())}"

    def _tables(self) -> list[str]:
        """The names of the tables, in order."""
        found = self._rows(
            "SELECT DISTINCT table_name FROM duckdb_columns() "
            "WHERE NOT internal AND database_name = current_database() ORDER BY table_name"
        )
        return [row["table_name"] for row in found]

    def require_sae(self, sae_id: int | None) -> int:
        """The SAE meant. Raises: NotFoundError if that is unknown or not plain."""
        return int(self._sae(sae_id)["sae_id"])

    def _sae(self, sae_id: int | None) -> dict[str, Any]:
        """The row of the SAE meant. Raises: NotFoundError."""
        saes = self._all_saes()
        for row in saes:
            if row["sae_id"] == sae_id or (sae_id is None and len(saes) == 1):
                return row
        names = ", ".join(f"{row['sae_id']} ({row['name']})" for row in saes)
        if sae_id is None:
            raise NotFoundError(f"{self.path} holds {len(saes)} SAEs: pass sae_id, one of {names}")
        raise NotFoundError(f"{self.path} has no SAE {sae_id}: pass sae_id, one of {names}")

    def _all_saes(self) -> list[dict[str, Any]]:
        """The rows of `saes`, which nothing changes while a database is open."""
        if self._saes is None:
            self._saes = self._rows("SELECT * FROM saes ORDER BY sae_id")
        return self._saes

    def sae_id_of(self, sae: SAE) -> int:
        """The number of an SAE here. Raises: NotFoundError if the database wasn't made of it."""
        return int(self._row_of(sae)["sae_id"])

    def _d_sae(self, sae_id: int) -> int:
        return int(self._sae(sae_id)["d_sae"])

    def _no_feature(self, feature_id: int, sae_id: int) -> str:
        return (
            f"no feature {feature_id} in SAE {sae_id} of {self.path}: expected 0 to "
            f"{self._d_sae(sae_id) - 1}"
        )

    def _require_feature(self, feature_id: int, sae_id: int) -> None:
        if not 0 <= feature_id < self._d_sae(sae_id):
            raise NotFoundError(self._no_feature(feature_id, sae_id))

    def _row_of(self, sae: SAE) -> dict[str, Any]:
        """The row of `saes` that was made from exactly this SAE."""
        saes = self._all_saes()
        digest = weights_hash(sae)
        for row in saes:
            if row["weights_hash"] == digest:
                return row
        names = ", ".join(row["name"] for row in saes)
        raise NotFoundError(
            f"{self.path} wasn't made from this SAE ({sae.architecture}, d_sae={sae.d_sae}, "
            f"{sae.hookpoint}); it holds {names}: pass one of these, or index this one"
        )


def _require_positive(value: int, name: str) -> None:
    if value < 1:
        raise NotFoundError(f"{name}={value}: expected 1 or more")
