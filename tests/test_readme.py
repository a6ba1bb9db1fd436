"""Every snippet of the README runs, in order, in a folder where `gpt2` is a tiny random model."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pipelines.cli import run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def commands() -> list[list[str]]:
    lines = "\n".join(snippets("sh")).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.fixture(scope="module")
def folder(
    tiny_tokenizer: Any, tiny_corpus: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """`gpt2/` and `corpus.jsonl`, small enough to be done in seconds."""
    home = tmp_path_factory.mktemp("readme")
    config = transformers.GPT2Config(
        vocab_size=len(tiny_tokenizer),
        n_embd=32,
        n_layer=8,
        n_head=4,
        n_positions=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.GPT2LMHeadModel(config).save_pretrained(home / "gpt2")
    tiny_tokenizer.save_pretrained(home / "gpt2")
    lines = [f'{{"text": "{i}: {text}"}}\n' for i in range(12) for text in tiny_corpus]
    (home / "corpus.jsonl").write_text("".join(lines))
    return home


@pytest.fixture(autouse=True)
def _inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in commands():
        if command[0] == "make":
            assert re.search(rf"^{command[1]}:", makefile, flags=re.M)
    assert {c[0] for c in commands()} <= {"make", "pip", "saebase"}


def test_every_command_runs(capsys: pytest.CaptureFixture[str]) -> None:
    ours = [command[1:] for command in commands() if command[0] == "saebase"]
    assert len(ours) >= 8
    for command in ours:
        assert run(command) == 0, (command, capsys.readouterr().err)


def test_every_python_snippet_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    space: dict[str, Any] = {}
    assert len(snippets("python")) >= 3
    for code in snippets("python"):
        exec(compile(code, "README.md", "exec"), space)
    printed = capsys.readouterr().out
    assert "untrained" in printed
    assert printed.count("I went to") == 2


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).is_file(), target
