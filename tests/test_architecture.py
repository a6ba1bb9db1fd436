"""The design's one-way imports, held by reading every import statement of every package."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("activation_cache", "sae", "feature_db", "interp", "pipelines")
ALLOWED = {
    "sae": set(),
    "activation_cache": set(),
    "feature_db": {"sae", "activation_cache"},
    "interp": {"sae", "activation_cache", "feature_db"},
    "pipelines": {"sae", "activation_cache", "feature_db", "interp"},
}
BANNED = {
    "sae": {"transformers", "datasets", "duckdb", "wandb", "rich"},
    "activation_cache": {"duckdb", "wandb", "rich"},
    "feature_db": {"wandb"},
    "interp": {"wandb", "rich"},
    "pipelines": set(),
}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(file: Path) -> set[str]:
    """Top-level names that a file imports from outside its own package."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", OURS)
def test_imports_point_one_way(package: str) -> None:
    assert modules(package)
    for file in modules(package):
        foreign = (imported(file) & set(OURS)) - {package} - ALLOWED[package]
        assert not foreign, f"{file.relative_to(ROOT)} imports {foreign}"


@pytest.mark.parametrize("package", OURS)
def test_heavy_libraries_stay_where_they_belong(package: str) -> None:
    for file in modules(package):
        found = imported(file) & BANNED[package]
        assert not found, f"{file.relative_to(ROOT)} imports {found}"


@pytest.mark.parametrize("package", [p for p in OURS if p != "pipelines"])
def test_only_pipelines_prints_or_reads_the_environment(package: str) -> None:
    for file in modules(package):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{file.relative_to(ROOT)}:{node.lineno}"
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("environ", "getenv"), f"{file}:{node.lineno}"


def test_every_package_is_shipped() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    shipped = set(settings["tool"]["setuptools"]["packages"])
    folders = {
        ".".join(init.parent.relative_to(ROOT).parts)
        for package in OURS
        for init in (ROOT / package).rglob("__init__.py")
    }
    assert folders <= shipped
    assert not any(name.startswith("tests") for name in shipped)


def test_every_module_says_what_it_is() -> None:
    for package in OURS:
        for file in modules(package):
            assert ast.get_docstring(ast.parse(file.read_text())), f"{file} has no docstring"
