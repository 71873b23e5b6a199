"""The tree's own rules: folders import downward, torch.distributed in two places, no giant files."""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path

from tests.conftest import ROOT

PACKAGE = ROOT / "dbtrain"
FILES = sorted(PACKAGE.rglob("*.py"))
DISTRIBUTED = {"runtime/dist.py", "train/parallel.py"}

# A folder imports only from folders on lower floors.
FLOORS = [
    {"runtime"},
    {"config"},
    {"data"},
    {"models"},
    {"adapters", "prepare"},
    {"sample", "tiny"},
    {"evaluate"},
    {"train"},
    {"export", "report"},
    {"doctor"},
    {"fleet"},
    {"__init__", "__main__"},
]
FLOOR = {folder: number for number, floor in enumerate(FLOORS) for folder in floor}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def folder_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imports(path: Path) -> set[str]:
    """Every module a file imports, anywhere in it, as `package.module` or `package.module.name`."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(path: Path) -> set[str]:
    """The modules of the package that a file imports, but for itself, as paths below the package."""
    found = set()
    for name in imports(path):
        parts = name.split(".")
        while parts[0] == "dbtrain" and len(parts) > 1:
            file = PACKAGE.joinpath(*parts[1:])
            if file.with_suffix(".py").is_file() or (file / "__init__.py").is_file():
                found.add("/".join(parts[1:]))
                break
            parts.pop()
    return found - {name_of(path).removesuffix(".py").removesuffix("/__init__")}


def test_the_tree_is_the_floors() -> None:
    there = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert there - {"py.typed"} == FLOOR.keys()


def test_folders_import_downward() -> None:
    for path in FILES:
        folder = folder_of(path)
        used = {name.split("/")[0] for name in own(path)} - {folder}
        assert not {other for other in used if FLOOR[other] >= FLOOR[folder]}, path


def test_modules_have_no_cycle() -> None:
    graph = {name_of(path).removesuffix(".py").removesuffix("/__init__"): own(path) for path in FILES}
    while leaves := [name for name, needs in graph.items() if not needs & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph


def test_accelerate_is_not_imported_and_torch_distributed_in_two_files_only() -> None:
    for path in FILES:
        assert not any(name.split(".")[0] == "accelerate" for name in imports(path)), path
        if name_of(path) not in DISTRIBUTED:
            assert not any(name.startswith("torch.distributed") for name in imports(path)), path
            used = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute)]
            ours = [node for node in used if node.attr == "distributed"]
            assert "torch.distributed" not in map(ast.unparse, ours), path


def test_the_config_needs_no_torch() -> None:
    plain = {*sys.stdlib_module_names, "yaml", "pydantic", "pydantic_core", "dbtrain"}
    checked, ahead = set(), {"config"}
    while ahead:
        name = ahead.pop()
        path = PACKAGE / name / "__init__.py" if (PACKAGE / name).is_dir() else PACKAGE / f"{name}.py"
        assert not {other.split(".")[0] for other in imports(path)} - plain, name
        checked.add(name)
        ahead |= own(path) - checked
    assert "config/config" in checked


def test_no_file_is_much_longer_than_300_lines() -> None:
    assert {name_of(path) for path in FILES if len(path.read_text().splitlines()) > 310} == set()


def test_no_pickle_is_loaded() -> None:
    for path in FILES:
        names = imports(path)
        assert not names & {"pickle", "torch.load"}
        text = path.read_text()
        assert " torch.load(" not in text
        assert "autodecode" not in text, "webdataset's decoder unpickles"
