"""FeatureSet: the features that SQL found, to go on with: pages, an export, steering.

    db.sql("SELECT sae_id, feature_id FROM features WHERE label LIKE '%war%'").features()

In: rows with feature_id, and sae_id where the database holds several SAEs. What other packages do
with features is registered by them as an entry point of the group `saebase.features`, because this
package imports none of them: `interp` registers `steer`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
from rich.console import Console, ConsoleOptions, RenderResult

from .errors import FeatureDBError, NotFoundError
from .exchange import Format, export
from .feature import Feature
from .feature_rows import Pair
from .result import Result

if TYPE_CHECKING:
    from activation_cache import LanguageModel
    from sae import SAE

    from .database import FeatureDB

ENTRY_POINTS = "saebase.features"


class Frame(Protocol):
    """A pandas or polars frame, an Arrow table, a Result: whatever has columns."""

    @property
    def columns(self) -> Any: ...


class FeatureSet:
    """Features of one database, each once, in the order in which they were found.

    Iterating gives their pages. ids: (sae_id, feature_id).
    """

    def __init__(self, db: "FeatureDB", ids: Sequence[Pair]) -> None:
        self.db, self.ids = db, tuple(dict.fromkeys(ids))

    @classmethod
    def of(cls, db: "FeatureDB", found: "Frame | Sequence[int]") -> "FeatureSet":
        """The features of a frame, or of a list of feature_ids.

        Raises: NotFoundError without a column feature_id, or for features that there aren't.
        """
        table = _arrow(found)
        names = [str(name) for name in table.column_names]
        if "feature_id" not in names:
            raise NotFoundError(
                f"the columns are {', '.join(names) or 'none'}: expected feature_id, and sae_id "
                "where the database holds several SAEs"
            )
        feature_ids = _integers(table, "feature_id")
        if "sae_id" in names:
            sae_ids = _integers(table, "sae_id")
        else:
            sae_ids = [db.require_sae(None)] * len(feature_ids)
        ids = list(zip(sae_ids, feature_ids, strict=True))
        _require_known(db, ids)
        return cls(db, ids)

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Feature]:
        return self.db.pages(self.ids)

    def __repr__(self) -> str:
        shown = ", ".join(f"{sae_id}:{feature_id}" for sae_id, feature_id in self.ids[:8])
        return f"FeatureSet({len(self)} features: {shown}{', …' if len(self) > 8 else ''})"

    def table(self) -> Result:
        """sae_id, feature_id, label, density, n_active, max_act of each, in order."""
        columns = [[pair[i] for pair in self.ids] for i in range(2)]
        return self.db.sql(_TABLE, columns)

    def steer(
        self, lm: "LanguageModel", sae: "SAE", strength: float = 2.0
    ) -> AbstractContextManager[None]:
        """While open, `lm` runs with each feature raised by `strength` maxima at every position.

        sae: the one that these features are of. It is `interp.steer`, which has other operations.
        Raises: SteeringError; NotFoundError for features of another SAE.
        """
        steered: AbstractContextManager[None] = _registered("steer")(self, lm, sae, strength)
        return steered

    def export(self, out: str | Path, format: Format, **options: Any) -> Path | str:  # noqa: A002
        """These features as parquet, jsonl, csv, labels, neuronpedia or html; options are those of
        `feature_db.exchange.export`. Raises: ExportError; NotFoundError for an empty set."""
        return export(self.db, out, format, self.ids, **options)

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table()


def _registered(name: str) -> Callable[..., Any]:
    for found in entry_points(group=ENTRY_POINTS, name=name):
        use: Callable[..., Any] = found.load()
        return use
    raise FeatureDBError(
        f"nothing installed can {name} by features: install saebase again (`pip install -e .` in a "
        "checkout), which registers it"
    )


def _arrow(found: "Frame | Sequence[int]") -> pa.Table:
    if isinstance(found, pa.Table):
        return found
    if isinstance(found, Result):
        return found.arrow()
    if hasattr(found, "to_arrow"):  # polars
        return found.to_arrow()
    if hasattr(found, "columns"):
        return pa.Table.from_pandas(found, preserve_index=False)
    try:
        return pa.table({"feature_id": pa.array(found, pa.int64())})
    except (pa.ArrowException, TypeError):
        raise NotFoundError(f"{found!r:.80}: expected a frame, or a list of feature ids") from None


def _integers(table: pa.Table, name: str) -> list[int]:
    column = table.column(name)
    if not pa.types.is_integer(column.type) or column.null_count:
        value = next((v for v in column.to_pylist() if not isinstance(v, int)), None)
        if value is not None or column.null_count:
            raise NotFoundError(f"{name}={value!r}: expected whole numbers")
    return [int(value) for value in column.to_pylist()]


def _require_known(db: "FeatureDB", ids: Sequence[Pair]) -> None:
    sizes = dict(db.sql("SELECT sae_id, d_sae FROM saes").fetchall())
    for sae_id, feature_id in ids:
        if not 0 <= feature_id < sizes.get(sae_id, 0):
            db.require_sae(sae_id)
            raise NotFoundError(
                f"no feature {feature_id} in SAE {sae_id} of {db.path}: expected 0 to "
                f"{sizes[sae_id] - 1}"
            )


_TABLE = """
SELECT sae_id, feature_id, label, density, n_active, max_act
FROM (
    SELECT unnest($1::INTEGER[]) AS sae_id, unnest($2::INTEGER[]) AS feature_id,
        unnest(range(len($1::INTEGER[]))) AS place
) JOIN features USING (sae_id, feature_id) ORDER BY place
"""
