"""Reads YAML and overrides, and turns pydantic's errors into messages a user can act on."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError

from dbtrain.runtime.errors import ConfigError

# Names of the same settings in other trainers.
SYNONYMS = {
    "learning_rate": "optim.lr", "lr_scheduler": "optim.schedule", "lr_warmup_steps": "optim.warmup_steps",
    "max_grad_norm": "optim.clip", "max_train_steps": "train.steps", "train_batch_size": "train.micro_batch",
    "batch_size": "train.global_batch", "mixed_precision": "train.precision",
    "checkpointing_steps": "train.checkpoint_every", "checkpoints_total_limit": "train.keep",
    "prior_loss_weight": "loss.prior_weight", "snr_gamma": "loss.min_snr_gamma", "huber_c": "loss.huber",
    "min_timestep": "loss.timesteps.low", "max_timestep": "loss.timesteps.high",
    "instance_data_dir": "prepare.photos", "class_data_dir": "prepare.class_dir",
    "num_class_images": "prepare.class_images", "lora_alpha": "adapter.alpha",
    "target_modules": "adapter.targets", "output_dir": "run_dir",
    "caption_dropout_rate": "data.prompt_dropout", "caption_dropout_probability": "data.prompt_dropout",
    "proportion_empty_prompts": "data.prompt_dropout", "optimizer": "optim.name", "ema_decay": "train.ema",
    "pretrained_model_name_or_path": "model.path", "num_repeats": "prepare.repeats",
    "loss_weight": "prepare.weights", "include_subdirectories": "prepare.subfolders",
}  # fmt: skip

MISSING = {  # what to do about a missing setting, if there is more than one way
    "model": "name the base model, e.g. model.path=stable-diffusion-v1-5/stable-diffusion-v1-5",
    "run_dir": "add it to the config, or subject.name, from which it is derived",
    "data": "add it to the config, or subject.name, from which data.shards is derived",
}
NULL, TEXT = "tag:yaml.org,2002:null", "tag:yaml.org,2002:str"
LIST = '; quote the items of a list that have special characters, e.g. ["mug #1", "a: b"]'
_REPLACED = ("int", "float", "timestamp")  # PyYAML reads 0500 as 320, 8:20 as 500, and 1e-4 as text
_NUMBERS = {
    "int": r"[-+]?[0-9][0-9_]*",
    "float": r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?|\.[0-9]+([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))"
    r"|\.(nan|NaN|NAN)",
}
# Most characters and values; the longest of our configs has 3,000 and 100.
MOST = {"config": (2**20, 20_000), "list": (2**24, 500_000)}


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: numbers are decimal, dates are text, and duplicate keys are an error."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (LookupError, AttributeError) as error:  # as PyYAML fails at `!!bool maybe`
            raise ConfigError(
                f"line {node.start_mark.line + 1} has a value that its tag does not fit"
            ) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"the key on line {key.start_mark.line + 1} is not text")
            if key.value in seen:
                raise ConfigError(f"duplicate key '{key.value}' on line {key.start_mark.line + 1}")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node).replace("_", ""))


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag.rpartition(":")[2] not in _REPLACED]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}", re.compile(f"^({_pattern})$"), list("-+.0123456789")
    )
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)


def read_yaml(path: Path, kinds: Mapping[str, Kinds] | None = None) -> dict[str, Any]:
    """The mapping in a YAML file; `kinds` are those of the settings. Raises ConfigError if there is none."""
    values = _read(path, "config", kinds or {})
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a valid config: it has no `key: value` pairs")
    return values


def read_entries(path: Path, kinds: Mapping[str, Kinds]) -> list[Any] | dict[str, Any]:
    """The list of entries in a YAML file, or the mapping from their names to them.

    `kinds` are those of the settings in an entry. Raises ConfigError if there is neither.
    """
    values = _read(path, "list", kinds)
    if not isinstance(values, (list, dict, type(None))):
        raise ConfigError(f"{path} is not a valid list: it has neither `- ` items nor `name:` entries")
    return values or []


def _read(path: Path, what: str, kinds: Mapping[str, Kinds]) -> Any:
    """The value in a YAML file. `what`: a "config", or a "list" of settings or of names with settings."""
    try:
        values = _parse(text_of(path, what), kinds, named=what == "list")
    except OSError as error:
        raise ConfigError(f"cannot read {what} {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # PyYAML raises these
        raise ConfigError(f"{path} is not a valid {what}: {' '.join(str(error).split())[:500]}") from error
    _check_size(values, path, what)
    return values


Kinds = frozenset[type]  # the types that a setting can have; `tuple` for a list of text


def kinds_of(annotation: Any) -> Kinds:
    """The types of the values that a type annotation allows."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return frozenset(map(type, parts))
    if origin is tuple:
        return frozenset([tuple])
    if origin is Annotated:
        return kinds_of(parts[0])
    return frozenset().union(*map(kinds_of, parts)) if parts else frozenset([annotation])


def _is_text(allowed: Kinds) -> bool:
    """Whether a value is text as it is written, or nothing: not a number, a switch or a section."""
    return bool(allowed) and allowed <= {str, tuple, type(None)}


def _parse(text: str, kinds: Mapping[str, Kinds], key: str = "", named: bool = False) -> Any:
    """The value of YAML text for a dotted key, or for the whole config.

    `named`: the keys of a mapping are names, and their values have the settings.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        inner = node.value if named and isinstance(node, yaml.MappingNode) else []
        for name, _ in inner:
            name.tag = TEXT
        _retag([value for _, value in inner] or [node], kinds, key)
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _retag(roots: Sequence[Any], kinds: Mapping[str, Kinds], key: str) -> None:
    """Make plain scalars such as 007 and `on` text where the setting is text; `null` stays if it can be."""
    todo, seen = [(root, key) for root in roots], set()
    while todo:
        node, key = todo.pop()
        if id(node) in seen:
            continue  # an alias: nodes may be shared, and even be in themselves
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            todo += [(value, f"{key}.{name.value}" if key else str(name.value)) for name, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            todo += [(value, key) for value in node.value]
        elif isinstance(node, yaml.ScalarNode):
            allowed = kinds.get(key, frozenset())
            if _is_text(allowed) and (node.tag != NULL or type(None) not in allowed):
                node.tag = TEXT


def text_of(path: Path, what: str) -> str:
    """The text of a config or list. Raises ConfigError if it is endless: a FIFO, a device, or a huge file."""
    if path.exists() and not (path.is_file() or path.is_dir() or path.parent == Path("/dev/fd")):
        raise ConfigError(f"{what} {path} is not a regular file")
    most, _ = MOST[what]
    with open(path, encoding="utf-8-sig", newline="") as file:
        text = file.read(most + 1)
    if len(text) > most:
        raise ConfigError(f"{what} {path} has more than {most} characters; remove some")
    return text


def _check_size(values: Any, path: Path, what: str) -> None:
    """Raise ConfigError for too many values: anchors can repeat a value a billion times."""
    _, most = MOST[what]
    inside, count = [values], 0
    while inside and count <= most:
        value = inside.pop()
        count += 1
        if isinstance(value, (dict, list)):
            inside.extend(value.values() if isinstance(value, dict) else value)
    if inside:
        raise ConfigError(f"{what} {path} has more than {most} values, or repeats itself; remove some")


def plain(values: Any) -> Any:
    """A copy of nested values in which mappings are dicts, tuples are lists and paths are text."""
    if isinstance(values, Mapping):
        return {name: plain(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [plain(value) for value in values]
    return str(values) if isinstance(values, os.PathLike) else values


def override(values: dict[str, Any], item: str, kinds: Mapping[str, Kinds]) -> str | None:
    """Apply one `a.b=value` to `values`. Returns the problem with it, or None.

    `kinds`: the types of every setting, which decide how the value is read. Text is taken as it is, unless it
    is quoted. A mapping for a section changes the keys that it has; for a setting it replaces the old one.
    """
    name, equals, text = item.partition("=")
    if not equals or not all(name.split(".")):
        return f"override '{item}' is not of the form section.key=value"
    try:
        value = value_of(name, text.strip(), kinds)
    except (yaml.YAMLError, ValueError, RecursionError):
        return f"override '{item}': the value is not valid YAML{LIST if text.lstrip()[:1] == '[' else ''}"
    problem = put(values, name, value, kinds)
    return problem and f"override '{item}': {problem}"


def put(values: dict[str, Any], name: str, value: Any, settings: Container[str]) -> str | None:
    """Set the value of a dotted key in nested values, see `merge`. Returns the problem with it, or None."""
    *sections, last = name.split(".")
    for key in sections:
        if values.get(key) is None:
            values[key] = {}
        if not isinstance(values[key], dict):
            return f"'{key}' is not a section"
        values = values[key]
    merge(values, {last: value}, settings, ".".join(sections))
    return None


def value_of(name: str, text: str, kinds: Mapping[str, Kinds]) -> Any:
    """The value that text means for a setting. Raises an error of PyYAML or ValueError if it has none."""
    allowed = kinds.get(name, frozenset())
    if not _is_text(allowed):
        return _parse(text, kinds, name)
    if type(None) in allowed and text in ("", "null"):
        return None
    if tuple in allowed and text[:1] == "[" and text[-1:] == "]":
        return _parse(text, kinds, name)
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        with suppress(yaml.YAMLError):  # it only begins and ends with a quoted word
            return _parse(text, kinds, name)
    return text


def merge(
    values: dict[str, Any], changes: Mapping[str, Any], settings: Container[str], section: str = ""
) -> None:
    """Put `changes` over the nested values of a section; `settings` that are mappings are replaced."""
    for key, value in changes.items():
        name, old = f"{section}.{key}" if section else key, values.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and name not in settings:
            merge(old, value, settings, name)
        else:
            values[key] = value


def problems(error: ValidationError, known: Sequence[str]) -> list[str]:
    """One message per invalid setting. `known`: the dotted names of all settings."""
    told: dict[str, str] = {}
    for detail in error.errors():  # a union reports every branch: keep the first, and the words of the others
        place = _place(detail["loc"], known)
        if place in told and detail["type"] == "literal_error":
            told[place] += f", or {detail['ctx']['expected']}"
        else:
            told.setdefault(place, _explain(dict(detail), place, known))
    return list(told.values())


def _explain(error: dict[str, Any], place: str, known: Sequence[str]) -> str:
    """One message for a pydantic error at a dotted key: what is wrong, which value, what to do."""
    value, context = error.get("input"), error.get("ctx", {})
    if error["type"] == "extra_forbidden":
        return f"unknown key '{place}'{did_you_mean(place, known)}"
    if error["type"] == "missing":
        return f"'{place}' is missing; {MISSING.get(place.partition('.')[0], 'add it to the config')}"
    if error["type"] == "literal_error":
        return f"{place} is {value!r}; choose from {context['expected']}"
    if error["type"] == "value_error":
        return f"{place}.{context['error']}" if place else str(context["error"])
    if error["type"] == "string_unicode":
        return f"{place} is {value!r}, whose bytes are not UTF-8; rename it, or use a link with another name"
    if error["type"] == "model_type":
        return f"'{place}' is a section with keys of its own, not a single value; got {value!r}"
    return f"{place} is {value!r}: {error['msg'].removeprefix('Input ')}"


def _place(loc: Sequence[str | int], known: Sequence[str]) -> str:
    """The dotted key of an error, without pydantic's names for the branches of a union."""
    parts = [str(part) for part in loc if re.fullmatch(r"[\w-]+", str(part))]
    named = [name for name in accumulate(parts, "{}.{}".format) if name in known]
    return ".".join([named[0], *filter(str.isdigit, parts)]) if named else ".".join(parts)


def did_you_mean(place: str, known: Sequence[str]) -> str:
    """A suggestion: the name in another trainer, the same key in another section, or a close spelling."""
    if (key := place.split(".")[-1]) in SYNONYMS:
        return f"; did you mean '{SYNONYMS[key]}'?"
    sections = sorted({name.rpartition(".")[0] for name in known} - {""})
    same = [name for name in known if name.split(".")[-1] == key]
    near = same or difflib.get_close_matches(place, [*known, *sections], n=1, cutoff=0.7)
    return f"; did you mean '{near[0]}'?" if near else ""
