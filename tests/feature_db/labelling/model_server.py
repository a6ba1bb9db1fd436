"""A small OpenAI-compatible server over a real local model, as llama.cpp's is.

Where a JSON schema is asked for, the answer is held to it: the model chooses each judgement
between the tokens 0 and 1, and writes the text of an explanation freely up to its first line end.
"""

import json
import threading
from typing import Any

import torch

from activation_cache import LanguageModel

from .completions_server import CompletionsHandler, CompletionsServer, completion


class ModelServer(CompletionsServer):
    """Answers with the model, one request at a time."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm, self.turn = lm, threading.Lock()
        super().__init__(_Handler)

    def answer(self, body: dict[str, Any]) -> tuple[str, int, int]:
        """(text, prompt tokens, answer tokens) of a request."""
        tokenizer = self.lm.tokenizer
        prompt = tokenizer.apply_chat_template(
            body["messages"], tokenize=False, add_generation_prompt=True
        )
        n_prompt = len(tokenizer(prompt).input_ids)
        schema = body["response_format"]["json_schema"]["schema"]["properties"]
        with self.turn:
            text = self._explained(prompt) if "explanation" in schema else ""
            if "answers" in schema:
                text = self._judged(prompt, schema["answers"]["minItems"])
        return text, n_prompt, len(tokenizer(text).input_ids)

    def _explained(self, prompt: str) -> str:
        begun = prompt + '{"explanation": "'
        written = self.lm.generate(begun, max_new_tokens=12)[len(begun) :]
        for end in ('"', "\n", "<|im_end|>"):
            written = written.partition(end)[0]
        return json.dumps({"explanation": written})

    def _judged(self, prompt: str, n: int) -> str:
        """Fixed text is read, each judgement is chosen; what was read before is read once."""
        no, yes = (self.lm.tokenizer(each).input_ids[-1] for each in "01")
        text, answers, past = prompt + '{"answers": [', list[int](), None
        for _ in range(n):
            ids = torch.tensor([self.lm.tokenizer(text).input_ids])
            with torch.no_grad():
                out = self.lm.model(input_ids=ids, past_key_values=past, use_cache=True)
            past, logits = out.past_key_values, out.logits[0, -1]
            answers.append(int(logits[yes] > logits[no]))
            text = f"{answers[-1]}, "
        return json.dumps({"answers": answers})


class _Handler(CompletionsHandler):
    server: ModelServer

    def answer(self, body: dict[str, Any]) -> None:
        data = completion(body["model"], *self.server.answer(body)).encode()
        self.head(200, len(data))
        self.wfile.write(data)
