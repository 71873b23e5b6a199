"""Reads YAML and overrides, and turns pydantic's errors into messages a user can act on."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dbtrain.runtime.errors import ConfigError

# Names of the same settings in other trainers.
SYNONYMS = {
    "learning_rate": "optim.lr", "lr_scheduler": "optim.schedule", "lr_warmup_steps": "optim.warmup_steps",
    "max_grad_norm": "optim.clip", "max_train_steps": "train.steps", "train_batch_size": "train.micro_batch",
    "batch_size": "train.global_batch", "mixed_precision": "train.precision",
    "checkpointing_steps": "train.checkpoint_every", "checkpoints_total_limit": "train.keep",
    "prior_loss_weight": "loss.prior_weight", "snr_gamma": "loss.min_snr_gamma",
    "instance_data_dir": "prepare.photos", "class_data_dir": "prepare.class_dir",
    "num_class_images": "prepare.class_images", "lora_alpha": "adapter.alpha",
    "target_modules": "adapter.targets", "output_dir": "run_dir",
    "pretrained_model_name_or_path": "model.path",
}  # fmt: skip


MOST_BYTES, MOST_VALUES = 2**20, 20_000  # of a config; the longest of ours has 3,000 bytes and 100 values


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: `1e-4` is a number, and duplicate keys are an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"the key on line {key.start_mark.line + 1} is not text")
            if key.value in seen:
                raise ConfigError(f"duplicate key '{key.value}' on line {key.start_mark.line + 1}")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",  # PyYAML follows YAML 1.1, where 1e-4 needs a dot: 1.e-4
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError if there is none."""
    try:
        values = yaml.load(_text(path), _Loader)
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # PyYAML raises these
        raise ConfigError(f"{path} is not a valid config: {' '.join(str(error).split())[:500]}") from error
    _check_size(values, path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a valid config: it has no `key: value` pairs")
    return values


def _text(path: Path) -> str:
    """The text of a config. Raises ConfigError if it is endless: a FIFO, a device, or a huge file."""
    if path.exists() and not (path.is_file() or path.is_dir() or path.parent == Path("/dev/fd")):
        raise ConfigError(f"config {path} is not a regular file")
    with open(path, encoding="utf-8-sig") as file:
        text = file.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise ConfigError(f"config {path} has more than {MOST_BYTES} characters; remove some")
    return text


def _check_size(values: Any, path: Path) -> None:
    """Raise ConfigError for more than MOST_VALUES values: anchors can repeat a value a billion times."""
    inside, count = [values], 0
    while inside and count <= MOST_VALUES:
        value = inside.pop()
        count += 1
        if isinstance(value, (dict, list)):
            inside.extend(value.values() if isinstance(value, dict) else value)
    if inside:
        raise ConfigError(f"config {path} has more than {MOST_VALUES} values, or repeats itself; remove some")


def plain(values: Any) -> Any:
    """A copy of nested values in which mappings are dicts, tuples are lists and paths are text."""
    if isinstance(values, Mapping):
        return {name: plain(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [plain(value) for value in values]
    return str(values) if isinstance(values, os.PathLike) else values


def override(values: dict[str, Any], item: str) -> str | None:
    """Apply one `a.b=value` to `values`. Returns the problem with it, or None."""
    name, equals, text = item.partition("=")
    keys = name.split(".")
    if not equals or not all(keys):
        return f"override '{item}' is not of the form section.key=value"
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return f"override '{item}': the value is not valid YAML"
    for key in keys[:-1]:
        inner = values.get(key)
        if inner is None:
            inner = values[key] = {}
        if not isinstance(inner, dict):
            return f"override '{item}': '{key}' is not a section"
        values = inner
    values[keys[-1]] = value
    return None


def problems(error: ValidationError, known: Sequence[str]) -> list[str]:
    """One message per invalid setting. `known`: the dotted names of all settings."""
    told: dict[str, str] = {}
    for detail in error.errors():  # a union reports every branch: keep the first
        told.setdefault(_place(detail["loc"]), _explain(dict(detail), known))
    return list(told.values())


def _explain(error: dict[str, Any], known: Sequence[str]) -> str:
    """One message for a pydantic error: what is wrong, which value, what to do."""
    place = _place(error["loc"])
    value, context = error.get("input"), error.get("ctx", {})
    if error["type"] == "extra_forbidden":
        return f"unknown key '{place}'{_did_you_mean(place, known)}"
    if error["type"] == "missing":
        return f"'{place}' is missing; add it to the config"
    if error["type"] == "literal_error":
        return f"{place} is {value!r}; choose from {context['expected']}"
    if error["type"] == "value_error":
        return f"{place}.{context['error']}" if place else str(context["error"])
    if error["type"] == "model_type":
        return f"'{place}' is a section with keys of its own, not a single value; got {value!r}"
    return f"{place} is {value!r}: {error['msg'].removeprefix('Input ')}"


def _place(loc: Sequence[str | int]) -> str:
    """The dotted key of an error, without pydantic's names for the branches of a union."""
    return ".".join(str(part) for part in loc if re.fullmatch(r"[\w-]+", str(part)))


def _did_you_mean(place: str, known: Sequence[str]) -> str:
    """A suggestion: the name in another trainer, the same key in another section, or a close spelling."""
    key = place.split(".")[-1]
    if key in SYNONYMS:
        return f"; did you mean '{SYNONYMS[key]}'?"
    sections = sorted({name.rpartition(".")[0] for name in known} - {""})
    same = [name for name in known if name.split(".")[-1] == key]
    near = same or difflib.get_close_matches(place, [*known, *sections], n=1, cutoff=0.7)
    return f"; did you mean '{near[0]}'?" if near else ""
