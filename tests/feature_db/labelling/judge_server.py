"""A real HTTP server on loopback that speaks OpenAI's chat completions and knows the truth.

Each planted feature is one word. Asked to explain, the server names the word that is marked most;
asked to judge, it looks for the word of the explanation. What goes wrong is told it by a function
of the request's number: statuses, bodies, delays, broken connections.
"""

import json
import re
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .completions_server import CompletionsHandler, CompletionsServer, completion

MODEL = "judge-1"


class Fault(NamedTuple):
    """What is done in place of a right answer. content: another answer's text.

    delay_s: before anything is sent. cut: only so much of the body is sent, then the end.
    """

    status: int = 200
    headers: dict[str, str] | None = None
    body: str | None = None
    content: str | None = None
    delay_s: float = 0.0
    cut: float = 1.0
    drop: bool = False


@dataclass
class Seen:
    """What has come: start of each request, prompts, keys, the most in flight at once."""

    starts: list[float] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0

    def explained(self) -> Counter[str]:
        """How often an explanation of each word was asked for."""
        return Counter(marked_word(p) for p in self.prompts if is_explaining(p))


class JudgeServer(CompletionsServer):
    """The server. judge: (explanation, passage) -> answer; the truth unless told otherwise.

    fault: of each request by its number, from 0; key: what is wanted in the header, None for any.
    """

    request_queue_size = 64

    def __init__(self) -> None:
        self.seen, self.lock = Seen(), threading.Lock()
        self.fault: Callable[[int], Fault | None] = lambda _: None
        self.judge: Callable[[str, str], int] = truth
        self.explain: Callable[[str], str] = lambda prompt: f'the word "{marked_word(prompt)}"'
        self.key: str | None = None
        self.delay_s = 0.0
        super().__init__(_Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is killed or gives up is no error here."""


class _Handler(CompletionsHandler):
    server: JudgeServer

    def answer(self, body: dict[str, Any]) -> None:
        number = self._note(body)
        fault = self.server.fault(number) or Fault()
        try:
            time.sleep(fault.delay_s + self.server.delay_s)
            self._answer(body, fault)
        finally:
            with self.server.lock:
                self.server.seen.in_flight -= 1

    def _note(self, body: dict[str, Any]) -> int:
        seen = self.server.seen
        with self.server.lock:
            seen.starts.append(time.monotonic())
            seen.prompts.append(body["messages"][0]["content"])
            seen.bodies.append(body)
            seen.keys.append(self.headers["Authorization"])
            seen.in_flight += 1
            seen.most_in_flight = max(seen.most_in_flight, seen.in_flight)
            return len(seen.starts) - 1

    def _answer(self, body: dict[str, Any], fault: Fault) -> None:
        if fault.drop:
            self.close_connection = True
            return
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            said = f"Incorrect API key provided: {self.headers['Authorization']}"
            fault = Fault(401, body=json.dumps({"error": {"message": said}}))
        elif body["model"] != MODEL:
            said = f"The model `{body['model']}` does not exist."
            fault = Fault(404, body=json.dumps({"error": {"message": said}}))
        self._send(fault, fault.body or self._completion(body, fault.content))

    def _send(self, fault: Fault, text: str) -> None:
        data = text.encode()
        self.head(fault.status, len(data), fault.headers)
        self.wfile.write(data[: int(len(data) * fault.cut)])
        if fault.cut < 1:
            self.close_connection = True

    def _completion(self, body: dict[str, Any], content: str | None) -> str:
        prompt = body["messages"][0]["content"]
        content = self._said(prompt) if content is None else content
        return completion(MODEL, content, len(prompt) // 4, len(content) // 4)

    def _said(self, prompt: str) -> str:
        if is_explaining(prompt):
            return json.dumps({"explanation": self.server.explain(prompt)})
        explanation = prompt.partition("active on: ")[2].partition("\n")[0]
        answers = [self.server.judge(explanation, each) for each in passages(prompt)]
        return json.dumps({"answers": answers})


def passages(prompt: str) -> list[str]:
    return re.findall(r"^\d+\. (.*)$", prompt, flags=re.MULTILINE)


def marks(passage: str) -> list[str]:
    return [each.strip() for each in re.findall(r"<<(.*?)>>", passage)]


def is_explaining(prompt: str) -> bool:
    return '{"explanation"' in prompt


def marked_word(prompt: str) -> str:
    """The word that is marked most in a prompt's passages."""
    return Counter(m for p in passages(prompt) for m in marks(p)).most_common(1)[0][0]


def truth(explanation: str, passage: str) -> int:
    """1 if the explanation's word is marked in the passage, or stands in one without marks."""
    word = explanation.partition('"')[2].rstrip('"')
    found = marks(passage)
    return int(word in found if found else re.search(rf"\b{word}\b", passage) is not None)


def coin(explanation: str, passage: str) -> int:
    """A judge that guesses, always the same."""
    return zlib.crc32(f"{explanation}{passage}".encode()) >> 7 & 1
