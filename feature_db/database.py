"""FeatureDB: a feature database, opened. SQL, single features, search, neighbours, live text."""

import re
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa

from sae import SAE

from .active import ActiveFeatures, active_features, text_codes
from .errors import NotFoundError, OpenError, QueryError
from .feature import Feature, load_feature
from .inputs import weights_hash
from .result import Result
from .schema import check_version, get_meta, migrate
from .search import search_statement
from .token_text import visible
from .untrusted import Params, SqlLimits, run_untrusted

if TYPE_CHECKING:
    from activation_cache import LanguageModel

# A DuckDB file is three headers of 4 KiB, then blocks.
_HEADER_BYTES = 3 * 4096


class FeatureDB:
    """A feature database. Open one with `FeatureDB.open`; use it in a `with`, or close it.

    Methods that take `sae_id` need it only where the database holds several SAEs.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection, path: Path) -> None:
        self._connection = connection
        self.path = path

    @classmethod
    def open(
        cls, path: str | Path, *, read_only: bool = True, external_access: bool = True
    ) -> "FeatureDB":
        """Open a database that `build_index` made.

        read_only: several processes may read at once; only one may have it open for writing. An
            older schema is brought up to date when it is opened for writing.
        external_access: whether SQL may read and write other files (COPY, read_csv, ATTACH); a
            read-only database alone does not keep COPY from writing one.
        Raises: OpenError if it is missing, no feature database, torn or in use;
            SchemaVersionError if it is of another version.
        """
        path = Path(path)
        if not path.is_file():
            raise OpenError(
                f"{path} {'is a folder' if path.is_dir() else 'does not exist'}: expected a "
                "feature database, such as `saebase index` makes"
            )
        connection = _connected(path, read_only)
        try:
            version = _version_of(connection, path)
            check_version(version, str(path), may_migrate=not read_only)
            if not read_only:
                migrate(connection, version)
            if not external_access:
                connection.execute("SET enable_external_access = false")
                connection.execute("SET lock_configuration = true")
        except BaseException:
            connection.close()
            raise
        return cls(connection, path)

    def close(self) -> None:
        """Close the database; results already fetched stay usable."""
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
            return Result(self._untrusted_arrow(query, params, limits or SqlLimits()))
        if limits is not None:
            raise QueryError("limits hold for untrusted SQL alone: pass untrusted=True with them")
        return Result(self._arrow(query, params))

    def saes(self) -> Result:
        """The SAEs that the database holds."""
        return self.sql("SELECT * FROM saes ORDER BY sae_id")

    def feature(self, feature_id: int, sae_id: int | None = None) -> Feature:
        """Everything about one feature. Raises: NotFoundError if there is no such feature."""
        sae_id = self._sae_id(sae_id)
        found = load_feature(self._rows, sae_id, feature_id)
        if found is None:
            raise NotFoundError(self._no_feature(feature_id, sae_id))
        return found

    def search(self, text: str, limit: int = 20) -> Result:
        """Features about a word or phrase, best first, over all SAEs; case doesn't matter.

        Looks at labels, tokens by lift, contexts and promoted tokens: see feature_db/search.py.
        Returns: sae_id, feature_id, label, score, reason, example, density.
        """
        search = search_statement(text, limit)
        return self.sql(search.sql, search.params)

    def neighbors(self, feature_id: int, n: int = 10, sae_id: int | None = None) -> Result:
        """The n features of nearest direction: neighbor_id, cosine, label, density.

        Raises: NotFoundError for an unknown feature, or more neighbours than the index keeps.
        """
        sae_id = self._sae_id(sae_id)
        _require_positive(n, "n")
        found = self.sql(
            "SELECT neighbor_id, cosine, label, density FROM neighbors JOIN "
            "(SELECT sae_id, feature_id AS neighbor_id, label, density FROM features) "
            "USING (sae_id, neighbor_id) WHERE sae_id = ? AND feature_id = ? AND rank <= ? "
            "ORDER BY rank",
            [sae_id, feature_id, n],
        )
        if not len(found) or len(found) < n < self._d_sae(sae_id):
            self._require_feature(feature_id, sae_id)
            raise NotFoundError(
                f"{n} neighbours asked for, {len(found)} kept: ask for no more, or index again "
                f"with IndexConfig(n_neighbors={n})"
            )
        return found

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

    def _arrow(self, query: str, params: Params | None) -> pa.Table:
        try:
            with self._connection.cursor() as cursor:
                relation = cursor.sql(query, params=params)
                return pa.table({}) if relation is None else relation.to_arrow_table()
        except duckdb.Error as error:
            raise QueryError(self._explained(str(error))) from None

    def _untrusted_arrow(self, query: str, params: Params | None, limits: SqlLimits) -> pa.Table:
        try:
            self._connection.cursor().close()  # closed, this says so as it does for other SQL
            return run_untrusted(self.path, query, params, limits)
        except (duckdb.Error, QueryError) as error:
            kind = type(error) if isinstance(error, QueryError) else QueryError
            raise kind(visible(self._explained(str(error)))) from None

    def _rows(self, query: str, params: Params | None = None) -> list[dict[str, Any]]:
        return self._arrow(query, params).to_pylist()  # type: ignore[no-any-return]

    def _explained(self, message: str) -> str:
        """DuckDB's message in one line; where a table is unknown, with those that there are."""
        message = one_line(message)
        if not re.search(r"Table with name .* does not exist", message):
            return message
        tables = self._rows("SELECT table_name FROM duckdb_tables() ORDER BY table_name")
        names = ", ".join(row["table_name"] for row in tables)
        return f"{message}; the tables are {names}"

    def _sae_id(self, sae_id: int | None) -> int:
        """The SAE meant. Raises: NotFoundError if that is unknown or not plain."""
        saes = self._rows("SELECT sae_id, name FROM saes ORDER BY sae_id")
        if sae_id is None and len(saes) == 1:
            return int(saes[0]["sae_id"])
        if sae_id is not None and any(row["sae_id"] == sae_id for row in saes):
            return sae_id
        names = ", ".join(f"{row['sae_id']} ({row['name']})" for row in saes)
        if sae_id is None:
            raise NotFoundError(f"{self.path} holds {len(saes)} SAEs: pass sae_id, one of {names}")
        raise NotFoundError(f"{self.path} has no SAE {sae_id}: pass sae_id, one of {names}")

    def _d_sae(self, sae_id: int) -> int:
        return int(self._rows("SELECT d_sae FROM saes WHERE sae_id = ?", [sae_id])[0]["d_sae"])

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
        saes = self._rows("SELECT * FROM saes ORDER BY sae_id")
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


def one_line(message: str) -> str:
    """DuckDB's message without its line breaks and its picture of where the error is."""
    text, _, picture = message.partition("\nLINE ")
    near = re.search(r"^( *)\^", picture, re.MULTILINE)
    if near and "near" not in text:
        line = picture.splitlines()[0]
        shown = line[max(len(near[1]) - len("LINE "), 0) :].strip()
        text = f"{text.strip()}; near {shown[:60]!r}"
    return " ".join(text.split())


def _connected(path: Path, read_only: bool) -> duckdb.DuckDBPyConnection:
    try:
        return duckdb.connect(str(path), read_only=read_only)
    except duckdb.Error as error:
        message = one_line(str(error))
        if "not a valid DuckDB database" in message:
            what = "is no DuckDB file: expected a feature database, such as `saebase index` makes"
        elif "lock" in message or "different configuration" in message:
            what = f"is open elsewhere for writing: close it there first ({message})"
        elif "Could not read enough bytes" in message:
            what = f"is torn: build the index again ({message})"
        else:
            what = f"can't be opened: build the index again if it is damaged ({message})"
        raise OpenError(f"{path} {what}") from None


def _version_of(connection: duckdb.DuckDBPyConnection, path: Path) -> int:
    """The schema_version of a database that is whole. Raises: OpenError if it isn't."""
    try:
        size = connection.execute("CALL pragma_database_size()").fetchall()[0]
        if path.stat().st_size < _HEADER_BYTES + int(size[2]) * int(size[3]):
            raise OpenError(f"{path} is torn: its end is missing. Build the index again")
        version = get_meta(connection, "schema_version")
    except duckdb.CatalogException:
        version = None
    except duckdb.Error as error:
        raise OpenError(
            f"{path} is damaged: build the index again ({one_line(str(error))})"
        ) from None
    if version is None or not version.isdecimal():
        raise OpenError(
            f"{path} is a DuckDB file but no feature database: expected one that `saebase index` "
            "made"
        )
    return int(version)
