"""The tree's own rules: imports point downward, torch.distributed in one place, no giant files."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "dbtrain"
FILES = sorted(PACKAGE.rglob("*.py"))

# A module imports only from rows above its own, and from its own row where that is no cycle.
LAYERS = [
    ["dbtrain", "errors", "keys", "files", "reading", "section", "config", "data", "data.order", "tiny",
     "settings", "settings.adapter", "settings.inputs", "settings.results", "settings.training",
     "preempt", "importing", "hashes", "endings", "subject"],
    ["rng", "dist", "pulse", "lock", "log", "run_log", "trackers"],
    ["pretrained", "families", "families.base", "families.deepfloyd", "families.sd", "families.sdxl",
     "objectives", "adapters", "optim", "quantize", "recompute", "tally",
     "generate", "kernels", "pictures", "chart", "precision", "vision",
     "data.images", "data.latents", "data.looks", "data.storage", "data.shards", "data.stream"],
    ["data.encode", "data.class_images", "data.plan", "network", "held_out", "identity", "checkpoint",
     "export", "card", "hub", "pipeline", "fidelity",
     "formats", "formats.common", "formats.diffusers_file", "formats.kohya_file", "formats.peft_folder"],
    ["prepare", "train", "validate", "sample", "made_for", "closing",
     "evaluate", "protocol", "dreambench",
     "report", "report.crops", "report.curves", "report.figures", "report.links", "report.run",
     "report.thumbs",
     "doctor", "exact", "memory", "rehearsal", "checks", "checks.base", "checks.devices", "checks.machine",
     "checks.pictures", "checks.room", "checks.settings", "checks.work",
     "tiny.build", "tiny.fit", "tiny.judge", "tiny.measure", "tiny.paint", "tiny.parts",
     "tiny.score", "tiny.world"],
    ["__main__"],
]  # fmt: skip
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
PLAIN = {"yaml", "pydantic", "pydantic_core"}


def module(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "dbtrain"


def imports(path: Path) -> set[str]:
    """Every module a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(path: Path) -> set[str]:
    names = {name.removeprefix("dbtrain.") for name in imports(path) if name.startswith("dbtrain.")}
    return names & RANK.keys() - {module(path)}


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports_point_downward(path: Path) -> None:
    assert module(path) in RANK, "put the new module into LAYERS"
    higher = {name for name in own(path) if RANK[name] > RANK[module(path)]}
    assert not higher


def test_imports_have_no_cycle() -> None:
    graph = {module(path): own(path) - {module(path)} for path in FILES}
    while leaves := [name for name, needs in graph.items() if not needs & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph


@pytest.mark.parametrize("path", FILES, ids=module)
def test_accelerate_is_not_imported_and_torch_distributed_in_dist_only(path: Path) -> None:
    assert not any(name.split(".")[0] == "accelerate" for name in imports(path))
    if module(path) != "dist":
        assert not any(name.startswith("torch.distributed") for name in imports(path))
        used = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
        assert "torch.distributed" not in map(ast.unparse, used)


def test_the_plain_layer_needs_no_torch() -> None:
    import sys

    stdlib = set(sys.stdlib_module_names)
    for path in FILES:
        if RANK[module(path)] == 0:
            foreign = (
                {name.split(".")[0] for name in imports(path)} - stdlib - PLAIN - {"dbtrain", "__future__"}
            )
            assert not foreign, module(path)


@pytest.mark.parametrize("path", FILES, ids=module)
def test_no_file_is_much_longer_than_300_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 310


def test_no_pickle_is_loaded() -> None:
    for path in FILES:
        names = imports(path)
        assert not names & {"pickle", "torch.load"}
        text = path.read_text()
        assert " torch.load(" not in text
        assert "autodecode" not in text, "webdataset's decoder unpickles"
