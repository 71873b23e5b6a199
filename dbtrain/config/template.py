"""A config file with some of its values replaced, its comments and layout kept."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml

PLAIN = re.compile(r"[A-Za-z./~][\w./~' -]*")  # needs no quotes, be it within [] or not


def filled(text: str, values: Mapping[str, Any]) -> str:
    """The text of a config with new values for dotted keys such as `train.steps`, all of which it has."""
    root: Any = yaml.compose(text, yaml.SafeLoader)
    spans = []
    for key, value in values.items():
        node = root
        for part in key.split("."):
            node = next(inner for name, inner in node.value if name.value == part)
        spans.append((node.start_mark.index, node.end_mark.index, written(value)))
    for start, end, new in sorted(spans, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def written(value: Any) -> str:
    """A string, a number or a list of them as YAML, in one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(written, value))}]"
    if not isinstance(value, str) or (PLAIN.fullmatch(value) and yaml.safe_load(value) == value):
        return str(value)
    return json.dumps(value, ensure_ascii=False)
