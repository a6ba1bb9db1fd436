"""The page about architectures: its snippets run, and it names all there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from sae.architectures import ARCHITECTURES

PAGE = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")


def test_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE, flags=re.S):
        exec(compile(code, "docs/architectures.md", "exec"), space)
    assert list(space["mlp_out_hat"].shape) == [20_000, 48]
    assert list(space["both_hat"].shape) == [20_000, 112]
    assert [sae.config.k for sae in space["saes"]] == [8, 16, 32]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_and_setting_is_on_the_page(name: str) -> None:
    assert f"`{name}`" in PAGE
    for field in ARCHITECTURES[name].config_class.model_fields:
        assert f"`{field}`" in PAGE or field == "d_sae", field
