"""Many features labelled side by side: features in, explanations in the database as they come.

A run can be killed at any moment and called again: features that have an explanation of the same
model and recipe are passed over, so that only those in flight are asked about twice.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from ..database import FeatureDB
from ..errors import EndpointError, LabelError
from ..feature_rows import Pair
from .client import Client, RequestFailedError, require_openai
from .config import (
    Endpoint,
    LabelConfig,
    LabelEstimate,
    LabelProgress,
    LabelSummary,
    OnLabelProgress,
    recipe_of,
)
from .evidence import Features, Wanted, read_evidence, read_others, wanted_features
from .one_feature import Explained, explain_feature
from .passages import Examples, choose_examples
from .requests import feature_estimate
from .spending import CapReachedError, Spending, Tokens, cost_of
from .store import DatabaseFile, explanation_rows

T = TypeVar("T")

_READ_AT_ONCE = 32
_SAMPLED = 100
# Beyond this it isn't the features: a server that is gone, a model that can't follow.
_MOST_FAILURES_IN_A_ROW = 8


def estimate_labels(
    path: str | Path,
    endpoint: Endpoint,
    config: LabelConfig | None = None,
    *,
    features: Features = "all",
    sae_id: int | None = None,
    limit: int | None = None,
) -> LabelEstimate:
    """What `label_features` with the same arguments would take; nothing is sent or written.

    Tokens are estimated from the bytes of the prompts of up to 100 of the features, spread evenly.
    """
    config = config or LabelConfig()
    file = DatabaseFile(path)
    wanted = file.read(lambda db: _wanted(db, endpoint, config, features, sae_id, limit))
    return file.read(lambda db: _estimate(db, wanted, endpoint, config))


def label_features(
    path: str | Path,
    endpoint: Endpoint,
    config: LabelConfig | None = None,
    *,
    api_key: str | None = None,
    features: Features = "all",
    sae_id: int | None = None,
    limit: int | None = None,
    on_progress: OnLabelProgress | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> LabelSummary:
    """Explain features with a language model and score the explanations; all are kept.

    path: the database, which is opened only for moments: others can read it in between.
    api_key: None for servers that want none. It is kept nowhere.
    features: "all", feature ids, or SQL that gives feature_id (and sae_id, if it likes); they are
        taken in that order, those without contexts or already labelled so passed over.
    limit: features at most, counted after those passed over.
    should_stop: asked before each feature; those begun are finished.
    Raises: LabelError for what can't be labelled; EndpointError when the endpoint refuses the key
        or the model, or eight features in a row come to nothing; OpenError. What was finished by
        then is in the database.
    """
    require_openai()
    config = config or LabelConfig()
    if config.max_cost is not None and endpoint.price_in is None and endpoint.price_out is None:
        raise LabelError("max_cost needs prices: give price_in and price_out, of a million tokens")
    file = DatabaseFile(path)
    file.write(lambda _: None)  # brings an older schema up to date; says early who is in the way
    wanted = file.read(lambda db: _wanted(db, endpoint, config, features, sae_id, limit))
    run = _Run(file, endpoint, config, wanted.features, on_progress, should_stop)
    return _in_a_loop(run.run(api_key))


def _wanted(
    db: FeatureDB,
    endpoint: Endpoint,
    config: LabelConfig,
    features: Features,
    sae_id: int | None,
    limit: int | None,
) -> Wanted:
    if limit is not None and limit < 1:
        raise LabelError(f"limit={limit}: expected 1 or more features")
    recipe = recipe_of(endpoint, config)
    wanted = wanted_features(db, features, sae_id, endpoint.model, recipe)
    return wanted._replace(features=wanted.features[:limit])


def _estimate(
    db: FeatureDB, wanted: Wanted, endpoint: Endpoint, config: LabelConfig
) -> LabelEstimate:
    n = len(wanted.features)
    sampled = wanted.features[:: max(1, -(-n // _SAMPLED))]
    others, tokens = read_others(db, config.seed), Tokens()
    for evidence in read_evidence(db, sampled, others):
        tokens.add(feature_estimate(choose_examples(evidence, config), config))
    scale = n / max(len(sampled), 1)
    whole = Tokens(
        round(tokens.prompt * scale),
        round(tokens.answer * scale),
        round(tokens.n_requests * scale),
    )
    return LabelEstimate(
        n,
        wanted.n_done,
        wanted.n_empty,
        len(sampled),
        whole.n_requests,
        whole.prompt,
        whole.answer,
        cost_of(whole, endpoint),
    )


class _Case(NamedTuple):
    """A feature with its examples, ready to be asked about."""

    feature: Pair
    examples: Examples
    estimate: Tokens


class _Run:
    """The state of one run. Workers take features, ask, and wait until their result is written."""

    def __init__(
        self,
        file: DatabaseFile,
        endpoint: Endpoint,
        config: LabelConfig,
        features: list[Pair],
        on_progress: OnLabelProgress | None,
        should_stop: Callable[[], bool] | None,
    ) -> None:
        self._file, self._endpoint, self._config = file, endpoint, config
        self._recipe = recipe_of(endpoint, config)
        self._features, self._n_total = deque(features), len(features)
        self._on_progress, self._should_stop = on_progress, should_stop
        self._spending = Spending(endpoint, config)
        self._ended: Literal["done", "stopped", "cap"] = "done"
        self._ready: deque[_Case] = deque()
        self._finished: list[Explained] = []
        self._others: dict[int, Any] | None = None
        self._n_labelled = self._n_failed = self._n_failed_in_a_row = 0
        self._last_failure: str | None = None
        # One thread does all that touches the file: a process can't open it in two ways at once.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="label-file")
        self._reading, self._writing = asyncio.Lock(), asyncio.Lock()

    async def run(self, api_key: str | None) -> LabelSummary:
        """Label all features, or end as `LabelSummary.ended` says."""
        try:
            async with Client(
                self._endpoint, api_key, self._spending, self._config.malformed_retries
            ) as client:
                n_workers = min(self._endpoint.concurrency, max(self._n_total, 1))
                await _all_or_first_error([self._work(client) for _ in range(n_workers)])
        finally:
            self._file.hurry()
            try:
                await self._in_thread(lambda: None)  # a write that was cut short has ended then
                await self._write_finished()
            finally:
                self._thread.shutdown()
        return self._summary()

    async def _work(self, client: Client) -> None:
        while self._ended == "done" and (case := await self._next_case()) is not None:
            if not self._spending.set_aside(case.estimate):
                self._ended = "cap"
                return
            try:
                explained = await explain_feature(client, case.feature, case.examples, self._config)
            except RequestFailedError as error:
                self._note_failure(case, error)
            except CapReachedError:
                self._ended = "cap"
                return
            else:
                self._n_failed_in_a_row = 0
                self._finished.append(explained)
                await self._write_finished()
            finally:
                self._spending.release(case.estimate)
            self._tell()

    async def _next_case(self) -> _Case | None:
        """The next feature; None when there is none left, or the run is asked to stop."""
        async with self._reading:
            if self._should_stop is not None and self._should_stop():
                self._ended = "stopped"
                return None
            if not self._ready and self._features:
                some = [self._features.popleft() for _ in range(_READ_AT_ONCE) if self._features]
                self._ready.extend(await self._in_thread(lambda: self._read(some)))
            return self._ready.popleft() if self._ready else None

    def _read(self, features: list[Pair]) -> list[_Case]:
        def work(db: FeatureDB) -> list[_Case]:
            if self._others is None:
                self._others = read_others(db, self._config.seed)
            cases = []
            for evidence in read_evidence(db, features, self._others):
                examples = choose_examples(evidence, self._config)
                estimate = feature_estimate(examples, self._config)
                cases.append(_Case((evidence.sae_id, evidence.feature_id), examples, estimate))
            return cases

        return self._file.read(work)

    async def _write_finished(self) -> None:
        """Write all that is finished, what came while an earlier write was going on too."""
        async with self._writing:
            if self._finished:
                some, self._finished = self._finished, []
                await self._in_thread(lambda: self._write(some))

    def _write(self, some: list[Explained]) -> None:
        rows = explanation_rows(some, self._endpoint, self._recipe)
        try:
            self._file.write(lambda db: db.add_explanations(rows))
        except BaseException:
            self._finished = some + self._finished
            raise
        self._n_labelled += len(some)

    def _note_failure(self, case: _Case, error: RequestFailedError) -> None:
        self._n_failed += 1
        self._n_failed_in_a_row += 1
        self._last_failure = f"feature {case.feature[1]}: {error}"
        if self._n_failed_in_a_row >= _MOST_FAILURES_IN_A_ROW:
            raise EndpointError(
                f"{self._n_failed_in_a_row} features in a row came to nothing, the last: {error}. "
                "What was finished is kept: call again to go on"
            )

    def _tell(self) -> None:
        if self._on_progress is not None:
            n_done, used = self._n_labelled + self._n_failed, self._spending.used
            self._on_progress(
                LabelProgress(
                    n_done, self._n_total, self._n_failed, used.total, self._spending.cost
                )
            )

    def _summary(self) -> LabelSummary:
        used = self._spending.used
        return LabelSummary(
            self._ended,
            self._n_labelled,
            self._n_failed,
            self._last_failure,
            used.n_requests,
            used.n_malformed,
            used.prompt,
            used.answer,
            self._spending.cost,
        )

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """The result of `work`; cancelled, it still ends before anything else is done there."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


async def _all_or_first_error(work: list[Coroutine[Any, Any, None]]) -> None:
    """Run all; the first error ends the others, and is raised as it is."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)


def _in_a_loop(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end; where a loop is running already (a notebook), in a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1, thread_name_prefix="label-loop") as thread:
        return thread.submit(asyncio.run, work).result()
