"""The database file between reads and writes: opened for a moment, closed again, waited for.

DuckDB lets one process write or several read, never both. A run of hours therefore opens the file
only while it reads or writes, so that others can read in between, and waits while they do.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from ..database import FeatureDB
from ..errors import DatabaseBusyError
from ..explanations import LLM
from .config import Endpoint
from .one_feature import Explained
from .scoring import Score
from .spending import cost_of

T = TypeVar("T")

_LOOK_AGAIN_S = 0.1
_SAY_AFTER_S, _SAY_AGAIN_S = 2.0, 60.0
_HURRIED_WAIT_S = 5.0

logger = logging.getLogger(__name__)


class DatabaseFile:
    """A feature database that is open only while something is done with it.

    wait_s: how long to wait for others who hold it.
    """

    def __init__(self, path: str | Path, wait_s: float = 600.0) -> None:
        self.path = path
        self._wait_s = wait_s

    def read(self, work: Callable[[FeatureDB], T]) -> T:
        """Do something with the database open for reading."""
        return self._do(work, read_only=True)

    def write(self, work: Callable[[FeatureDB], T]) -> T:
        """Do something with the database open for writing."""
        return self._do(work, read_only=False)

    def hurry(self) -> None:
        """Wait for others for five seconds more at most: the run is about to end."""
        self._wait_s = min(self._wait_s, _HURRIED_WAIT_S)

    def _do(self, work: Callable[[FeatureDB], T], *, read_only: bool) -> T:
        started = time.monotonic()
        say_at = started + _SAY_AFTER_S  # a moment's wait is no news
        while True:
            try:
                db = FeatureDB.open(self.path, read_only=read_only)
                break
            except DatabaseBusyError as error:
                now = time.monotonic()
                if now - started > self._wait_s:
                    raise
                if now > say_at:
                    logger.warning("waiting: %s", error)
                    say_at = now + _SAY_AGAIN_S
                time.sleep(_LOOK_AGAIN_S)
        with db:
            return work(db)


def explanation_rows(explained: Sequence[Explained], endpoint: Endpoint, recipe: str) -> pa.Table:
    """Rows of `explanations`, without explanation_id and created_at."""
    return pa.Table.from_pylist(
        [
            {
                "sae_id": each.sae_id,
                "feature_id": each.feature_id,
                "method": LLM,
                "model": endpoint.model,
                "recipe": recipe,
                "text": each.text,
                "detection_score": each.detection.value,
                "fuzzing_score": each.fuzzing.value,
                "n_detection": each.detection.n,
                "n_fuzzing": each.fuzzing.n,
                "n_malformed": each.tokens.n_malformed,
                "parts": json.dumps(
                    {"detection": _parts(each.detection), "fuzzing": _parts(each.fuzzing)}
                ),
                "prompt_tokens": each.tokens.prompt,
                "answer_tokens": each.tokens.answer,
                "cost": cost_of(each.tokens, endpoint),
            }
            for each in explained
        ],
        schema=_SCHEMA,
    )


def _parts(score: Score) -> dict[str, dict[str, int]]:
    return {name: part._asdict() for name, part in sorted(score.parts.items())}


_SCHEMA = pa.schema(
    {
        "sae_id": pa.int32(),
        "feature_id": pa.int32(),
        "method": pa.string(),
        "model": pa.string(),
        "recipe": pa.string(),
        "text": pa.string(),
        "detection_score": pa.float64(),
        "fuzzing_score": pa.float64(),
        "n_detection": pa.int32(),
        "n_fuzzing": pa.int32(),
        "n_malformed": pa.int32(),
        "parts": pa.string(),
        "prompt_tokens": pa.int64(),
        "answer_tokens": pa.int64(),
        "cost": pa.float64(),
    }
)
