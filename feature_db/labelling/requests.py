"""What is asked about one feature: requests, each with the way to read its answer."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from .answers import explanation_schema, judgements_schema, read_explanation, read_judgements
from .config import LabelConfig
from .passages import Examples, detection_questions, fuzzing_questions, shown_passages
from .prompts import Message, detect_messages, explain_messages, fuzz_messages
from .scoring import Question
from .spending import Tokens, answer_tokens, estimated_tokens

T = TypeVar("T")

# Stands for an explanation before there is one, when tokens are estimated.
_TYPICAL = "the first noun of a sentence about rulings of a court, and words for judges after it"


class Request(NamedTuple, Generic[T]):
    """One question to the model. schema: of its answer. read: an answer's text -> its meaning.

    n_answer_tokens: about how many there will be.
    """

    messages: list[Message]
    schema: dict[str, Any]
    read: Callable[[str], T]
    n_answer_tokens: int

    @property
    def estimate(self) -> Tokens:
        """About what it takes."""
        return Tokens(estimated_tokens(self.messages), self.n_answer_tokens, 1)


class JudgingRequest(NamedTuple):
    """A request whose answer judges `questions`, in their order."""

    questions: Sequence[Question]
    request: Request[list[bool]]


def explain_request(examples: Examples) -> Request[str]:
    """Asks for an explanation."""
    messages = explain_messages(shown_passages(examples))
    return Request(messages, explanation_schema(), read_explanation, answer_tokens(None))


def detection_requests(
    explanation: str, examples: Examples, config: LabelConfig
) -> list[JudgingRequest]:
    """Ask in which contexts the feature is active; none where the config wants no score."""
    batches = detection_questions(examples, config) if config.detection else []
    return [_judging(detect_messages, explanation, batch) for batch in batches]


def fuzzing_requests(
    explanation: str, examples: Examples, config: LabelConfig
) -> list[JudgingRequest]:
    """Ask whether the right tokens are marked; none where the config wants no score."""
    batches = fuzzing_questions(examples, config) if config.fuzzing else []
    return [_judging(fuzz_messages, explanation, batch) for batch in batches]


def feature_estimate(examples: Examples, config: LabelConfig) -> Tokens:
    """About what a feature takes in all, retries left out."""
    estimate = explain_request(examples).estimate
    for make in (detection_requests, fuzzing_requests):
        for each in make(_TYPICAL, examples, config):
            estimate.add(each.request.estimate)
    return estimate


def _judging(
    ask: Callable[[str, Sequence[str]], list[Message]],
    explanation: str,
    questions: Sequence[Question],
) -> JudgingRequest:
    n = len(questions)
    request = Request(
        ask(explanation, [each.passage for each in questions]),
        judgements_schema(n),
        lambda answer: read_judgements(answer, n),
        answer_tokens(n),
    )
    return JudgingRequest(questions, request)
