"""What both servers here share: HTTP on loopback, on threads, and the shape of an answer."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class CompletionsServer(ThreadingHTTPServer):
    """Serves from the moment it is made until its `with` ends."""

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()


class CompletionsHandler(BaseHTTPRequestHandler):
    """One connection, kept open."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body: dict[str, Any]) -> None:
        """Of each server: answer one request."""
        raise NotImplementedError

    def head(self, status: int, n_bytes: int, headers: dict[str, str] | None = None) -> None:
        """Send everything up to the answer's n_bytes."""
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(n_bytes))
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


def completion(model: str, text: str, n_prompt: int, n_answer: int) -> str:
    """An answer with a text, and how many tokens were read and written for it."""
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": n_prompt, "completion_tokens": n_answer}
    answer = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {**usage, "total_tokens": n_prompt + n_answer},
    }
    return json.dumps(answer)
