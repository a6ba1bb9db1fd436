"""One endpoint: a request in, its meaning out, however often it must be sent.

The openai client sends; retrying is done here, because its own retries pass by rate limits, count
no tokens and ignore a Retry-After of more than a minute. Passing errors are an answer that doesn't
come, comes late, breaks off or is no JSON, and statuses 408, 409, 429 and 5xx. The key is given to
the client alone, and cut out of every message.
"""

import asyncio
import email.utils
import json
import random
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import EndpointError, LabelError
from .answers import MalformedAnswerError
from .config import Endpoint
from .pace import Pace
from .prompts import Message, again_messages
from .requests import Request
from .spending import Spending, Tokens, estimated_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping

    import openai

T = TypeVar("T")

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_LONGEST_ASKED_S = 600.0
_SHOWN_CHARACTERS = 200


class RequestFailedError(LabelError):
    """One request came to nothing: refused for what it is, or sent in vain too often."""


class _PassingError(Exception):
    """Worth another try. asked_s: how long the server asks to wait."""

    def __init__(self, why: str, asked_s: float | None = None) -> None:
        super().__init__(why)
        self.asked_s = asked_s


def require_openai() -> None:
    """Raises: LabelError if the client isn't installed."""
    try:
        import openai  # noqa: F401
    except ImportError:
        raise LabelError(
            "the openai client, which speaks to endpoints, isn't installed: "
            "pip install 'saebase[label]'"
        ) from None


class Client:
    """Asks one endpoint. Use as an async context.

    api_key: None for servers that want none. spending: counts all that is asked.
    malformed_retries: times that an answer that can't be read is asked for again.
    """

    def __init__(
        self, endpoint: Endpoint, api_key: str | None, spending: Spending, malformed_retries: int
    ) -> None:
        from openai import AsyncOpenAI

        self._endpoint, self._api_key, self._spending = endpoint, api_key, spending
        self._malformed_retries = malformed_retries
        self._pace = Pace(endpoint.requests_per_minute, endpoint.tokens_per_minute)
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._openai = AsyncOpenAI(
            base_url=endpoint.base_url, api_key=api_key or "none", max_retries=0
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._openai.close()

    async def ask(self, request: Request[T], tokens: Tokens) -> T:
        """What the model answers. tokens: gets all that it took, attempts in vain included.

        Raises: MalformedAnswerError if no answer could be read; RequestFailedError; EndpointError
            for what no other request would survive; CapReachedError.
        """
        messages = request.messages
        for n_left in range(self._malformed_retries, -1, -1):
            answer = await self._answer(request, messages, tokens)
            try:
                return request.read(answer)
            except MalformedAnswerError as error:
                self._count(Tokens(n_malformed=1), tokens)
                if not n_left:
                    raise
                messages = again_messages(request.messages, answer, str(error))
        raise AssertionError("the last try returns or raises")

    async def _answer(self, request: Request[T], messages: list[Message], tokens: Tokens) -> str:
        n_tries = self._endpoint.max_retries + 1
        for i in range(n_tries):
            try:
                async with self._slots:
                    return await self._once(request, messages, tokens)
            except _PassingError as error:
                why, asked_s = str(error), error.asked_s
            if asked_s is not None:
                self._hold(asked_s, why)
            elif i + 1 < n_tries:
                await asyncio.sleep(_backoff_s(i))
        raise RequestFailedError(f"{self._endpoint.base_url}: {why}, {n_tries} times")

    async def _once(self, request: Request[T], messages: list[Message], tokens: Tokens) -> str:
        import openai

        estimate = Tokens(estimated_tokens(messages), request.n_answer_tokens, 1)
        await self._pace.wait(estimate.total)
        self._spending.require_room()
        try:
            async with asyncio.timeout(self._endpoint.timeout_s):
                completion = await self._openai.chat.completions.create(
                    model=self._endpoint.model,
                    messages=messages,  # type: ignore[arg-type]
                    timeout=self._endpoint.timeout_s,
                    **self._options(request.schema),
                )
        except (openai.OpenAIError, TimeoutError, ValueError) as error:
            self._count(Tokens(n_requests=1), tokens)
            raise self._meaning_of(error) from None
        answer, used = _content(completion)
        self._count(used or estimate, tokens)
        if answer is None:
            raise _PassingError("an answer without a message came")
        return answer

    def _options(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Settings of every request. OpenAI itself has another name for the longest answer."""
        is_openai = self._openai.base_url.host == "api.openai.com"
        longest = "max_completion_tokens" if is_openai else "max_tokens"
        options: dict[str, Any] = {longest: self._endpoint.max_answer_tokens}
        if self._endpoint.temperature is not None:
            options["temperature"] = self._endpoint.temperature
        if self._endpoint.structured_output:
            named = {"name": "answer", "strict": True, "schema": schema}
            options["response_format"] = {"type": "json_schema", "json_schema": named}
        return options

    def _count(self, used: Tokens, tokens: Tokens) -> None:
        tokens.add(used)
        self._spending.used.add(used)

    def _hold(self, asked_s: float, why: str) -> None:
        if asked_s > _LONGEST_ASKED_S:
            raise EndpointError(
                f"{self._endpoint.base_url} asks to wait {asked_s:,.0f} s ({why}): call again then"
            )
        self._pace.hold(asked_s)

    def _meaning_of(self, error: Exception) -> Exception:
        """A client's error as one of ours."""
        import openai

        if isinstance(error, openai.APIStatusError):
            return self._meaning_of_status(error)
        if isinstance(error, TimeoutError | openai.APITimeoutError):
            return _PassingError(f"no answer within {self._endpoint.timeout_s:g} s")
        if isinstance(error, openai.APIConnectionError):
            cause = error.__cause__ or error
            return _PassingError(self._safe(f"no connection ({cause or type(cause).__name__})"))
        return _PassingError("an answer that is no JSON of a chat completion came")

    def _meaning_of_status(self, error: "openai.APIStatusError") -> Exception:
        status, where = error.status_code, self._endpoint.base_url
        said = f"{status}: {self._said(error)}"
        if status in (401, 403):
            return EndpointError(f"{where} refuses the API key ({said}): give it the right one")
        if status == 404:
            return EndpointError(
                f"{where} has no model {self._endpoint.model!r}, or no chat completions ({said})"
            )
        if status == 429 and "insufficient_quota" in said:
            return EndpointError(f"{where}: the account has no credit left ({said})")
        if status in (408, 409, 429) or status >= 500:
            return _PassingError(said, _asked_s(error.response.headers))
        return RequestFailedError(f"{where} refuses a request ({said})")

    def _said(self, error: "openai.APIStatusError") -> str:
        body = error.body
        if isinstance(body, dict):
            message = body.get("message") or body.get("detail") or json.dumps(body)
            body = f"{message} {body.get('code') or ''}".strip()
        return self._safe(str(body or error.message))

    def _safe(self, text: str) -> str:
        """What a server said, on one line, without the key, and not too long."""
        if self._api_key:
            text = text.replace(self._api_key, "[key]")
        return " ".join(text.split())[:_SHOWN_CHARACTERS]


def _content(completion: Any) -> tuple[str | None, Tokens | None]:
    """Text and tokens of a completion; None for what is missing, "" for a message without text."""
    choices = getattr(completion, "choices", None)
    message = (
        getattr(choices[0], "message", None) if isinstance(choices, list) and choices else None
    )
    content = getattr(message, "content", None)
    usage = getattr(completion, "usage", None)
    counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    known = all(isinstance(count, int) and count >= 0 for count in counts)
    used = Tokens(counts[0], counts[1], 1) if known else None  # type: ignore[arg-type]
    return None if message is None else str(content or ""), used


def _asked_s(headers: "Mapping[str, str]") -> float | None:
    """Seconds that Retry-After asks for: a number, or a date; None where it says nothing."""
    value = headers.get("retry-after", "")
    try:
        asked_s = float(value)
    except ValueError:
        date = email.utils.parsedate_tz(value)
        asked_s = -1.0 if date is None else email.utils.mktime_tz(date) - time.time()
    return asked_s if 0 <= asked_s < float("inf") else None


def _backoff_s(n_tries: int) -> float:
    """0.5 s, 1 s, ... 30 s, each up to a quarter shorter so that retries don't come at once."""
    return min(_FIRST_WAIT_S * 2.0**n_tries, _LONGEST_WAIT_S) * (1 - 0.25 * random.random())
