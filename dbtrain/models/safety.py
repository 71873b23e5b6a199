"""What a model folder may contain. It may be anybody's: nothing in it runs, or leads out of it.

Checked before a library reads the folder, because the libraries follow what they find there: they import
classes, ask on standard input whether to run code, fetch kernels and other models, and unpickle weights.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from dbtrain.models.nf4_files import is_nf4
from dbtrain.models.objectives import UNFITTING
from dbtrain.runtime import files
from dbtrain.runtime.errors import ConfigError

CLASSES: dict[str, set[str]] = {}  # component -> the classes that are loaded, of any family
# Settings of a component that make a library run code or read other files, and their harmless values.
LEADING_OUT: dict[str, tuple[Any, ...]] = {
    "auto_map": (None, {}),
    "attn_implementation": (None, "eager", "sdpa"),  # else a kernel from the Hub
    "_attn_implementation": (None, "eager", "sdpa"),
    "quantization_config": (None, {}),
    "use_kernels": (None, False),
    "kernel_config": (None, {}),
    "transformers_weights": (None,),
}
WEIGHT_FILE = re.compile(r"[\w-][\w.-]*\.safetensors")  # a file's name without a folder
ADAPTER = "adapter_config.json"  # transformers loads the base model that it names
WEIGHT_BYTES = 64 * 2**30  # most of one file of weights, all of which is hashed
DEPTH = re.compile(r"layers_per_block|num_(hidden_|decoder_)?layers")  # numbers of layers
MOST_LAYERS, MOST = 200, 2**20  # of the largest public models: 70 layers, 250,000 words


def allow(classes: Mapping[str, Collection[str]]) -> None:
    """Allow classes, by component, to be loaded."""
    for component, names in classes.items():
        CLASSES.setdefault(component, set()).update(names)


def library(component: str) -> str:
    """The library that a component's class comes from."""
    return "transformers" if component.startswith(("text_encoder", "tokenizer")) else "diffusers"


def check_class(model: str, component: str, entry: Any, names: Collection[str] = ()) -> None:
    """Raise ConfigError unless `entry`, (library, class) in model_index.json, may be loaded.

    `names`: the classes to allow; without any, those that some family has for the component.
    """
    allowed, origin = names or CLASSES.get(component, ()), library(component)
    if not (isinstance(entry, list) and len(entry) == 2 and entry[0] == origin and entry[1] in allowed):
        found = ".".join(map(str, entry)) if isinstance(entry, list) else str(entry or "missing")
        cure = f"; use a base where it is {origin}'s {' or '.join(sorted(allowed))}"
        if component.endswith("scheduler"):
            cure = f", {UNFITTING}"
        raise ConfigError(f"base model {model}: component '{component}' is {found}{cure}")


def check_folder(folder: Path, what: str) -> None:
    """Raise ConfigError if the files of `what` could run code, lead out of the folder, or never end.

    Reads its JSON files, but no weights. A missing folder passes.
    """
    where = f"{what}: {folder}"
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not path.exists():
            continue  # a link into the Hub's cache, whose target has been deleted
        if not path.is_file() and not path.is_dir():
            raise ConfigError(f"{where} contains '{path.name}', which is not a regular file; remove it")
        check_size(path)
        if path.name == ADAPTER:
            raise ConfigError(f"{where} contains an adapter ({ADAPTER}); use a model without one")
        if path.suffix == ".json" and path.is_file():
            _check_json(path, where)


def check_size(path: Path) -> None:
    """Raise ConfigError for a file that is larger than any of a base model."""
    if (size := path.stat().st_size) > WEIGHT_BYTES:
        most = files.size_text(WEIGHT_BYTES)
        raise ConfigError(f"{path} has {files.size_text(size)}; a file of a base model has at most {most}")


def _check_json(path: Path, where: str) -> None:
    values = files.read_json(path)
    if ".index." in path.name:
        _check_index(values.get("weight_map"), f"{where}/{path.name}")
    for name, harmless in LEADING_OUT.items():
        if values.get(name) not in harmless and not (name == "quantization_config" and is_nf4(values)):
            raise ConfigError(
                f"{where}/{path.name} sets {name} = {str(values[name])[:60]}, which could run code or read "
                "other files; use a model without it"
            )
    for name in ("vocab_file", "merges_file", "tokenizer_file"):
        if isinstance(value := values.get(name), str) and Path(value).name != value:
            raise ConfigError(f"{where}/{path.name}: {name} is '{value[:60]}'; use a file in the same folder")
    if path.name == "config.json":
        for name, value in _sizes(values, ""):
            most = MOST_LAYERS if DEPTH.search(name) else MOST
            if abs(value) > most:
                told = value if abs(value) < 10**12 else f"a number of {len(str(value))} digits"
                raise ConfigError(f"{where}/{path.name}: {name} is {told}; dbtrain loads at most {most}")


def _check_index(weights: Any, where: str) -> None:
    if not isinstance(weights, dict) or not weights:
        raise ConfigError(f"{where} is not an index of sharded weights; copy the model's folder again")
    for name in weights.values():
        if not (isinstance(name, str) and WEIGHT_FILE.fullmatch(name)):
            raise ConfigError(
                f"{where} names '{str(name)[:60]}'; weights are read from .safetensors files in the same "
                "folder only"
            )


def _sizes(value: Any, name: str) -> Iterator[tuple[str, int]]:
    """(key, integer) of every integer in nested settings; of a list of blocks, its length too."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _sizes(inner, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list):
        if "block" in name:
            yield f"num_layers, by {name},", len(value)
        for inner in value:
            yield from _sizes(inner, name)
    elif isinstance(value, int) and not name.endswith("theta"):  # of rotary embeddings, not a size
        yield name, value
