"""A base model on this machine: finding its folder, loading its components, naming its content."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dbtrain.config import Model
from dbtrain.models import locate
from dbtrain.runtime import files, hashing
from dbtrain.runtime.errors import ConfigError, reason
from dbtrain.runtime.hashing import content_key
from dbtrain.runtime.imports import importing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SENTENCEPIECE = "spiece.model"  # T5's vocabulary, where nobody made a tokenizer.json of it


@dataclass(frozen=True)
class Pretrained:
    """A Diffusers model folder."""

    name: str  # as in the config: a folder, a Hub id, or "tiny"
    folder: Path
    variant: str | None

    @classmethod
    def find(cls, cfg: Model) -> Pretrained:
        """The folder of `cfg.path`, downloaded first if it is a Hub id.

        Raises ConfigError if there is no such model.
        """
        folder = locate.folder_here(cfg)
        if folder is None and files.expand(cfg.path).is_file():
            folder = locate.from_single_file(cfg, files.expand(cfg.path))
        return cls._in(folder or locate.download(cfg), cfg)

    @classmethod
    def here(cls, cfg: Model) -> Pretrained | None:
        """As `find`, but None if it would have to download or to convert the base; reads no network.

        Raises ConfigError if there can be no such model.
        """
        folder = locate.folder_here(cfg) or locate.cached(cfg)
        return cls._in(folder, cfg) if folder else None

    @classmethod
    def _in(cls, folder: Path, cfg: Model) -> Pretrained:
        if not (folder / "model_index.json").is_file():
            raise ConfigError(
                f"model.path is '{cfg.path}', but {folder} has no model_index.json; "
                "give the folder of a Diffusers pipeline"
            )
        return cls(cfg.path, folder, cfg.variant)

    @cached_property
    def index(self) -> dict[str, Any]:
        """model_index.json: the pipeline's class, and (library, class) of each component."""
        return self._json(self.folder / "model_index.json")

    def config(self, component: str) -> dict[str, Any]:
        """A component's own config file."""
        folder = self.folder / component
        names = ("config.json", "scheduler_config.json", "tokenizer.json", "vocab.json",
                 "tokenizer_config.json")  # fmt: skip
        found = [folder / name for name in names if (folder / name).is_file()]
        if not found:
            raise ConfigError(f"base model {self.name} has no component '{component}' in {folder}")
        return self._json(found[0])

    def load(self, component: str, dtype: torch.dtype = torch.float32) -> Any:
        """One component (model, tokenizer or scheduler), weights in `dtype`, on the CPU, frozen.

        Raises ConfigError if it is missing, broken or incomplete: the libraries would fill missing
        weights with random numbers. Weights come from safetensors only: no pickle is ever loaded.
        """
        self.config(component)  # names the missing folder
        kind = self._class(component)
        locate.hush()
        options: dict[str, Any] = {}
        if kind.__name__.removesuffix("Fast").endswith("Tokenizer"):
            self.check_vocabulary(component)
        if issubclass(kind, torch.nn.Module):
            options = {"variant": self.variant, "use_safetensors": True, "dtype": dtype}
            options["output_loading_info"] = True
        try:
            loaded = kind.from_pretrained(self.folder, subfolder=component, **options)
        except Exception as error:  # a broken folder makes the libraries raise anything
            raise ConfigError(
                f"cannot load '{component}' of base model {self.name}: {reason(error)}"
            ) from error
        if not options:
            if getattr(loaded, "model_max_length", 0) > 10_000:  # what transformers takes for "not given"
                raise ConfigError(f"'{component}' of base model {self.name} gives no model_max_length")
            return loaded
        module, info = loaded
        if lacking := sorted([*info["missing_keys"], *map(str, info["mismatched_keys"])]):
            raise ConfigError(
                f"'{component}' of base model {self.name} is incomplete: {len(lacking)} weights are missing "
                f"or of another shape, e.g. {lacking[0]}"
            )
        return module.requires_grad_(False).eval()

    def _class(self, component: str) -> Any:
        """The class that model_index.json names for a component, of a library that may be loaded."""
        entry = self.index.get(component)
        if not (isinstance(entry, list) and len(entry) == 2 and entry[0] in locate.LIBRARIES):
            raise ConfigError(
                f"{self.name}: component '{component}' is {'.'.join(map(str, entry or ['missing']))}; "
                f"only classes of {' and '.join(locate.LIBRARIES)} are loaded"
            )
        with importing():  # the libraries import a class's module when it is first asked for
            kind = getattr(importlib.import_module(entry[0]), str(entry[1]), None)
        if not hasattr(kind, "from_pretrained"):
            raise ConfigError(f"{self.name}: component '{component}' is a {entry[1]}, unknown to {entry[0]}")
        return kind

    def check_vocabulary(self, component: str) -> None:
        """Raise ConfigError where transformers would make up a tokenizer, or not say what it lacks."""
        folder = self.folder / component
        if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            return
        if not (folder / SENTENCEPIECE).is_file():
            raise ConfigError(f"base model {self.name}: {folder} holds no vocabulary")
        lacking = [name for name in ("sentencepiece", "google.protobuf") if not _installed(name)]
        if lacking:
            raise ConfigError(
                f"'{folder.name}' of base model {self.name} is a SentencePiece model, which takes "
                "two more packages to read; run: pip install sentencepiece protobuf"
            )

    def skeleton(self, component: str) -> torch.nn.Module:
        """A component's modules without any weights, from its config alone."""
        kind, config = self._class(component), self.config(component)
        try:
            with torch.device("meta"):
                if kind.__module__.startswith("diffusers"):
                    return kind.from_config(config)
                return kind(kind.config_class.from_dict(config))
        except Exception as error:  # a broken config makes the libraries raise anything
            raise ConfigError(
                f"cannot read '{component}' of base model {self.name}: {reason(error)}"
            ) from error

    def module_names(self, component: str) -> list[str]:
        """Names of a component's modules."""
        return [name for name, _ in self.skeleton(component).named_modules()]

    def setting(self, component: str, name: str, kind: type | tuple[type, ...]) -> Any:
        """One value of a component's config. Raises ConfigError unless it is there, of type `kind`."""
        value = self.config(component).get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ConfigError(f"base model {self.name}: {component}/config.json has {name} = {value!r}")
        return value

    def key(self, component: str) -> str:
        """sha256 over a component's config and weights."""
        folder = self.folder / component
        weights = [
            path for path in folder.glob("*.safetensors")
            if (f".{self.variant}" in path.name) == bool(self.variant)
        ]  # fmt: skip
        found = sorted([*weights, *folder.glob("*.json"), *folder.glob("*.txt"), *folder.glob("*.model")])
        if not found:
            raise ConfigError(f"base model {self.name} has no component '{component}' in {folder}")
        return content_key([[path.name, hashing.cached_sha256_of(path)] for path in found])

    def _json(self, path: Path) -> dict[str, Any]:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise ConfigError(f"base model {self.name}: cannot read {path}: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"base model {self.name}: {path} holds no settings")
        return values


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of its parent
        return False
