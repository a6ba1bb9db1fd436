"""Settings, sources, and what the package may import."""

from __future__ import annotations

import ast
import itertools
import sys
from pathlib import Path

import pytest
import torch

import sae
from sae import BatchTopKConfig, ConfigError, SAEError, SourceError, TensorSource, TrainConfig
from sae.architectures import ARCHITECTURES, architecture_of
from sae.config import Config, EvalConfig, SAEConfig

ALLOWED = {
    "triton",
    "torch",
    "einops",
    "safetensors",
    "pydantic",
    "numpy",
    "sae",
} | sys.stdlib_module_names
PACKAGE = Path(sae.__file__).parent


def test_package_imports_only_what_it_may() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            wrong = {name.partition(".")[0] for name in names} - ALLOWED
            assert not wrong, f"{path} imports {wrong}"


def test_errors_are_value_errors_of_one_tree() -> None:
    errors = [
        each
        for each in vars(sae.errors).values()
        if isinstance(each, type) and issubclass(each, Exception)
    ]
    assert len(errors) == 15
    assert all(issubclass(each, SAEError) and issubclass(each, ValueError) for each in errors)
    drawing = sae.errors.__doc__ or ""
    assert all(each.__name__ in drawing for each in errors)


def configs() -> list[type[Config]]:
    return [TrainConfig, EvalConfig, *(each.config_class for each in ARCHITECTURES.values())]


@pytest.mark.parametrize("config", configs())
def test_every_setting_is_described(config: type[Config]) -> None:
    assert all(field.description for field in config.model_fields.values())


def test_unknown_setting_names_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match="TrainConfig has no setting 'bach_size'; did you mean b"):
        TrainConfig(**{"bach_size": 3})
    with pytest.raises(ConfigError, match="has no setting 'zzzz'; known: d_sae, k"):
        BatchTopKConfig(**{"d_sae": 4, "k": 1, "zzzz": 0})


def test_impossible_settings_are_one_line_errors() -> None:
    with pytest.raises(ConfigError, match=r"^TrainConfig\.lr: Input should be greater than 0; got"):
        TrainConfig(lr=-1)
    with pytest.raises(ConfigError, match="n_steps=1 and n_tokens=2 both say how long to train"):
        TrainConfig(n_steps=1, n_tokens=2)
    with pytest.raises(ConfigError, match="k: Field required; nothing was given"):
        BatchTopKConfig(**{"d_sae": 4})


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        TrainConfig().lr = 3.0  # type: ignore[misc]


def test_config_of_no_architecture_is_an_error() -> None:
    with pytest.raises(ConfigError, match="SAEConfig is no architecture's config; pass one of Bat"):
        architecture_of(SAEConfig(d_sae=3))


def test_tensor_source_visits_every_row_once_an_epoch() -> None:
    x = torch.arange(10.0).unsqueeze(1)
    source = TensorSource(x)
    batches = list(source.batches("h", 4, seed=0))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert torch.cat(batches).sort(dim=0).values.equal(x)
    stream = torch.cat(list(itertools.islice(source.batches("h", 4, seed=0, epochs=None), 5)))
    assert stream[:10].sort(dim=0).values.equal(x)
    assert stream[10:].sort(dim=0).values.equal(x)
    assert not stream[:10].equal(stream[10:])


def test_tensor_source_order_depends_on_seed_alone() -> None:
    source = TensorSource(torch.randn(50, 3))
    whole = list(itertools.islice(source.batches("h", 8, seed=1, epochs=None), 20))
    late = list(itertools.islice(source.batches("h", 8, seed=1, epochs=None, start_batch=13), 7))
    assert all(torch.equal(a, b) for a, b in zip(whole[13:], late, strict=True))
    ranks = [source.batches("h", 8, seed=1, rank=rank, world_size=2) for rank in range(2)]
    for batch, parts in zip(source.batches("h", 8, seed=1), zip(*ranks, strict=True), strict=True):
        both = torch.cat(parts)
        assert both.sort(dim=0).values.equal(batch.sort(dim=0).values)
    other = next(source.batches("h", 8, seed=2))
    assert not torch.equal(whole[0], other)


def test_tensor_source_refuses_what_is_no_matrix() -> None:
    with pytest.raises(SourceError, match=r"train tensor has shape \[3, 4, 5\]; expected \[n_rows"):
        TensorSource(torch.zeros(3, 4, 5))
    with pytest.raises(SourceError, match="heldout tensor has shape"):
        TensorSource(torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises(SourceError, match="no split 'test'; a tensor source has train and heldout"):
        TensorSource(torch.zeros(3, 4)).n_rows("h", split="test")
