"""One feature: asked for an explanation, then judged by it, all its judgements side by side."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import NamedTuple

from .answers import MalformedAnswerError
from .client import Client, RequestFailedError
from .config import LabelConfig
from .passages import Examples
from .requests import JudgingRequest, detection_requests, explain_request, fuzzing_requests
from .scoring import Judged, Score, score
from .spending import Tokens


class Explained(NamedTuple):
    """A feature's explanation with its scores, and what it took."""

    sae_id: int
    feature_id: int
    text: str
    detection: Score
    fuzzing: Score
    tokens: Tokens


async def explain_feature(
    client: Client, feature: tuple[int, int], examples: Examples, config: LabelConfig
) -> Explained:
    """Explain one feature and score the explanation.

    feature: (sae_id, feature_id). Contexts whose judgements can't be read are left out of scores.
    Raises: RequestFailedError if the explanation can't be had, or a request for judgements came to
        nothing; EndpointError; CapReachedError.
    """
    tokens = Tokens()
    try:
        text = await client.ask(explain_request(examples), tokens)
    except MalformedAnswerError as error:
        raise RequestFailedError(f"no explanation could be read: {error}") from None
    detection = detection_requests(text, examples, config)
    fuzzing = fuzzing_requests(text, examples, config)
    answers = await _together([_judged(client, each, tokens) for each in (*detection, *fuzzing)])
    n = len(detection)
    found = _score(detection, answers[:n]), _score(fuzzing, answers[n:])
    return Explained(*feature, text, found[0], found[1], tokens)


async def _judged(client: Client, asked: JudgingRequest, tokens: Tokens) -> list[Judged] | None:
    """One request's judgements; None if no answer could be read."""
    try:
        answers = await client.ask(asked.request, tokens)
    except MalformedAnswerError:
        return None
    return [Judged(*each) for each in zip(asked.questions, answers, strict=True)]


def _score(asked: Sequence[JudgingRequest], answers: Sequence[list[Judged] | None]) -> Score:
    unread = [each for each, answer in zip(asked, answers, strict=True) if answer is None]
    judged = [each for answer in answers if answer is not None for each in answer]
    return score(judged, sum(len(each.questions) for each in unread))


async def _together(
    work: Sequence[Coroutine[None, None, list[Judged] | None]],
) -> list[list[Judged] | None]:
    """The results of all, in order; the first error ends the others and is raised as it is."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
