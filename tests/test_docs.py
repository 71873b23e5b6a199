"""The documentation: its reference is the config's, its links resolve, and its Python example runs."""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dbtrain.config import Config
from dbtrain.config.adapter import AdapterSettings
from dbtrain.config.base import Section
from tests.conftest import ROOT, finished

DOCS = ROOT / "docs"
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(DOCS.glob("*.md")),
    ROOT / "benchmarks" / "README.md",
    ROOT / "dbtrain" / "tiny" / "model" / "README.md",
]
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"```.*?```", re.DOTALL)
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
SMALL = {
    '"steps": 100,': '"steps": 4,', '"checkpoint_every": 50': '"checkpoint_every": 2',
    "step-000050": "step-000002", '"class_images": 32': '"class_images": 2', '"steps": 25': '"steps": 2',
}  # fmt: skip
START = "<!-- The tables are generated from dbtrain/config: python -m tests.test_docs -->\n"


def reference() -> str:
    """A heading and a table for every section of the config."""
    plain = {name: field for name, field in Config.model_fields.items() if not _section(field)}
    parts = ["## Top level", "", *_table(plain)]
    for name, field in Config.model_fields.items():
        if section := _section(field):
            parts += ["", f"## {name}", "", f"{_sentence(field.description)}", ""]
            parts += _table(section.model_fields, f"{name}.")
    return "\n".join(parts) + "\n"


def _table(fields: dict[str, Any], prefix: str = "") -> list[str]:
    return ["| key | default | values | meaning |", "|---|---|---|---|", *_rows(fields, prefix)]


def _rows(fields: dict[str, Any], prefix: str) -> list[str]:
    """A row for every key, but only one for `adapter.text_encoder`, which has the keys of `adapter`."""
    rows = []
    for name, field in fields.items():
        inner = _section(field)
        again = inner is AdapterSettings
        default = "**required**" if field.is_required() else f"`{_yaml(field.get_default())}`"
        if not inner or field.get_default() is None:
            values = (
                "the keys of `adapter`" if again else "the keys below" if inner else _values(prefix, name)
            )
            rows.append(f"| `{prefix}{name}` | {default} | {values} | {field.description} |")
        if inner and not again:
            rows += _rows(inner.model_fields, f"{prefix}{name}.")
    return rows


def _section(field: Any) -> type[Section] | None:
    kinds = (field.annotation, *getattr(field.annotation, "__args__", ()))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def _values(prefix: str, name: str) -> str:
    """What a key takes, from the config's JSON schema."""
    node = schema = _schema()
    for part in [*prefix.split(".")[:-1], name]:
        node = node["properties"][part]
        for option in (node, *node.get("anyOf", ()), node.get("items", {})):
            if "$ref" in option:
                node = schema["$defs"][option["$ref"].split("/")[-1]]
    return _of_type(node)


@cache
def _schema() -> dict[str, Any]:
    return Config.model_json_schema()


def _of_type(node: dict[str, Any]) -> str:
    if "anyOf" in node:
        return " or ".join(_of_type(option) for option in node["anyOf"] if option["type"] != "null")
    if "const" in node:
        return f"`{node['const']}`"
    if "enum" in node:
        return ", ".join(f"`{_yaml(value)}`" for value in node["enum"])
    if node["type"] == "array":
        return f"list of {_of_type(node['items'])}"
    if node["type"] == "object":
        return f"mapping to {_of_type(node['additionalProperties'])}"
    limits = [f"{sign} {node[key]}" for key, sign in LIMITS.items() if key in node and node[key] < 1e6]
    names = {"integer": "int", "number": "float", "string": "text", "boolean": "`true`, `false`"}
    return ", ".join([names[node["type"]], *limits])


def _yaml(value: object) -> str:
    if isinstance(value, tuple):
        return "[]"
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_settings_page_is_the_config_s() -> None:
    assert (DOCS / "settings.md").read_text().partition(START)[2] == reference(), (
        "run: python -m tests.test_docs"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(FENCED.sub("", page.read_text())):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if path.startswith(("http://", "https://")):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_the_readme_is_short_and_links_every_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    assert not {f"docs/{page.name}" for page in DOCS.glob("*.md")} - set(LINK.findall(text))


@pytest.mark.slow
def test_the_python_page_runs_as_one_script(tmp_path: Path) -> None:
    """Its blocks in order, with fewer steps and class images."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), re.DOTALL))
    for large, small in SMALL.items():
        assert large in code
        code = code.replace(large, small)
    (tmp_path / "example.py").write_text(code)
    done = finished([sys.executable, str(tmp_path / "example.py")], cwd=tmp_path)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    settings = DOCS / "settings.md"
    settings.write_text(settings.read_text().partition(START)[0] + START + reference())
