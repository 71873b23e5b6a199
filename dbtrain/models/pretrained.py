"""A base model on this machine: finding its folder, loading its components, hashing their content."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dbtrain.config import Model
from dbtrain.models import loading, locate, safety
from dbtrain.models.nf4_files import Nf4Files, is_nf4
from dbtrain.models.quantization import NF4_FP32
from dbtrain.models.weight_files import WeightFiles, lack, variant_of
from dbtrain.runtime import files, hashing
from dbtrain.runtime.errors import ConfigError, reason
from dbtrain.runtime.imports import importing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STEMS = ("model", "diffusion_pytorch_model")  # names of weight files: of transformers, and of Diffusers
SENTENCEPIECE = "spiece.model"  # T5's vocabulary if the folder has no tokenizer.json
# A processor of text and images, which needs torchvision -> its tokenizer, which is all that prompts need.
TOKENIZERS = {"PixtralProcessor": "TokenizersBackend"}


@dataclass(frozen=True)
class Pretrained:
    """A Diffusers model folder."""

    name: str  # as in the config: a folder, a Hub id, or "tiny"
    folder: Path
    variant: str | None  # of the weights of components that have it

    @classmethod
    def find(cls, cfg: Model) -> Pretrained:
        """The model at `cfg.path`. Downloads a Hub id first.

        Raises ConfigError if the model does not exist.
        """
        folder = locate.folder_here(cfg)
        if folder is None and files.expand(cfg.path).is_file():
            folder = locate.from_single_file(cfg, files.expand(cfg.path))
        return cls._in(folder or locate.download(cfg), cfg)

    @classmethod
    def here(cls, cfg: Model) -> Pretrained | None:
        """Like `find`, but returns None if the model has to be downloaded or converted. Uses no network.

        Raises ConfigError if the model cannot exist.
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

    def check(self, component: str, names: Collection[str] = ()) -> None:
        """Raise ConfigError if a component is missing, unsafe to load, or of none of the classes `names`.

        Without `names`, any class that some family has for the component will do.
        """
        safety.check_class(self.name, component, self.index.get(component), names)
        safety.check_folder(self.folder / component, f"base model {self.name}")
        self.config(component)

    def load(self, component: str, dtype: torch.dtype = torch.float32) -> Any:
        """A component (model, tokenizer or scheduler) on the CPU, with frozen weights in `dtype`.

        Raises ConfigError if it is missing, broken or incomplete; the libraries would initialize missing
        weights at random. Reads weights from safetensors only, never from pickles.
        """
        # Check the folder first, as the libraries' errors would not name what is missing.
        self.check(component)
        kind = self._class(component)
        locate.hush()
        weights = issubclass(kind, torch.nn.Module)
        if weights and kind.__module__.startswith("diffusers"):
            module = self.skeleton(component, dtype)
            self.fill(component, module, dtype)
            return module
        options: dict[str, Any] = {}
        if kind.__module__.startswith("transformers"):
            options = {"trust_remote_code": False}
        if component.startswith("tokenizer"):
            self.check_vocabulary(component)
        if weights:
            self.check_weights(component)
            options |= {"variant": self.own_variant(component), "use_safetensors": True, "dtype": dtype}
            options["output_loading_info"] = True
        folder: Path | None = self.folder
        with self.reading(component):
            if weights and self.packed(component):  # transformers would ask for bitsandbytes
                config = {k: v for k, v in self.config(component).items() if k != "quantization_config"}
                packed, folder = self.weights(component), None
                options["state_dict"] = {name: packed.read(name).to(dtype) for name in packed.names}
                options["config"] = kind.config_class.from_dict(config)
            loaded = kind.from_pretrained(folder, subfolder=component, **options)
        # Refuse what the libraries would complete with defaults.
        if not weights:
            if kind.__name__.startswith("CLIP") and loaded.model_max_length > 10**9:  # unknown
                raise ConfigError(f"'{component}' of base model {self.name} has no model_max_length")
            return loaded
        module, info = loaded
        self.check_complete(component, [*info["missing_keys"], *map(str, info["mismatched_keys"])])
        return module.requires_grad_(False).eval()

    def fill(
        self,
        component: str,
        module: torch.nn.Module,
        dtype: torch.dtype,
        local: loading.Local = loading.whole,
        changes: loading.Changes | None = None,
    ) -> loading.Plain:
        """Read the weights of a Diffusers model's `skeleton` in `dtype`. See `loading.fill`.

        Raises ConfigError if they are broken or incomplete.
        """
        self.check_weights(component)
        with self.reading(component):
            files = self.weights(component)
            unfit = loading.unfit(module, files)
        self.check_complete(component, unfit)
        with self.reading(component):
            return loading.fill(module, files, dtype, local, changes)

    @contextmanager
    def reading(self, component: str) -> Iterator[None]:
        """In the block, whatever the libraries raise for a broken folder is a ConfigError."""
        try:
            yield
        except (ConfigError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ConfigError(
                f"cannot load '{component}' of base model {self.name}: {reason(error)}"
            ) from error

    def check_complete(self, component: str, lacking: Collection[str]) -> None:
        """Raise ConfigError if weights are `lacking`."""
        if lacking:
            raise ConfigError(
                f"'{component}' of base model {self.name} is incomplete: {len(lacking)} weights are missing "
                f"or have another shape, e.g. {min(lacking)}"
            )

    def _class(self, component: str) -> Any:
        """The class of a component in model_index.json. Raises ConfigError if it must not be loaded."""
        safety.check_class(self.name, component, self.index.get(component))
        library, name = self.index[component]
        name = TOKENIZERS.get(name, name)
        with importing():  # the libraries import a class's module on first use
            kind = getattr(importlib.import_module(library), name, None)
        if not hasattr(kind, "from_pretrained"):
            raise ConfigError(f"{self.name}: component '{component}' is a {name}, unknown to {library}")
        return kind

    def check_vocabulary(self, component: str) -> None:
        """Raise ConfigError if the tokenizer's vocabulary, or a package that reads it, is missing.

        Without a vocabulary transformers would silently make up a tokenizer.
        """
        folder = self.folder / component
        if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            return
        if not (folder / SENTENCEPIECE).is_file():
            raise ConfigError(f"base model {self.name}: {folder} has no vocabulary")
        if not (_installed("sentencepiece") and _installed("google.protobuf")):
            raise ConfigError(
                f"'{folder.name}' of base model {self.name} is a SentencePiece model, which needs two more "
                "packages; run: pip install sentencepiece protobuf"
            )

    def skeleton(self, component: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """A component's modules from its config alone: frozen, with weights in `dtype` on the meta device."""
        kind, config = self._class(component), self.config(component)
        with self.reading(component):
            if kind.__module__.startswith("diffusers"):
                module = loading.skeleton(kind, config, dtype)
            else:
                with loading.parameters_on_meta(dtype):
                    module = kind(kind.config_class.from_dict(config))
        return module.requires_grad_(False).eval()

    def module_names(self, component: str) -> dict[str, int]:
        """A component's modules by name, and how many outputs each has; 0 without a matrix of weights."""
        found = {}
        for name, module in self.skeleton(component).named_modules():
            weight = getattr(module, "weight", None)
            found[name] = len(weight) if weight is not None and weight.dim() > 1 else 0
        return found

    def settings(self, component: str) -> dict[str, Any]:
        """A component's config; for a model of text and images with the settings of its language model."""
        config = self.config(component)
        text = config.get("text_config")
        return config | text if isinstance(text, dict) else config

    def setting(self, component: str, name: str, kind: type | tuple[type, ...]) -> Any:
        """A value in a component's config. Raises ConfigError if it is missing or not of type `kind`."""
        value = self.settings(component).get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ConfigError(f"base model {self.name}: {component}/config.json has {name} = {value!r}")
        return value

    def tensor(self, component: str, name: str) -> torch.Tensor:
        """One tensor of a component's weights. Raises ConfigError if no file has it."""
        try:
            return self.weights(component).read(name)
        except KeyError as error:
            raise ConfigError(
                f"base model {self.name}: the weights of its {component} lack {name}"
            ) from error

    def weights(self, component: str) -> WeightFiles:
        """The files of a component's weights: those that an index names, or the only one."""
        own = self.own_variant(component)
        folder, variant = self.folder / component, f".{own}" if own else ""
        kind = Nf4Files if self.packed(component) else WeightFiles
        for index in folder.glob(f"*.safetensors.index{variant}.json"):
            return kind(sorted({folder / name for name in self._json(index)["weight_map"].values()}))
        named = [folder / f"{stem}{variant}.safetensors" for stem in STEMS]
        return kind([path for path in named if path.is_file()])

    def weight_files(self, component: str) -> list[Path]:
        """The safetensors files of a component, in its variant."""
        variant, found = self.own_variant(component), sorted((self.folder / component).glob("*.safetensors"))
        return [path for path in found if variant_of(path) == variant]

    def own_variant(self, component: str) -> str | None:
        """The variant of a component's weights: as in Diffusers, none if it has none of the one wanted."""
        found = (self.folder / component).glob("*.safetensors")
        return self.variant if self.variant in map(variant_of, found) else None

    @property
    def cure(self) -> str:
        """How to get the model's files again."""
        local = files.expand(self.name).exists()
        return "copy the whole folder again" if local else "get the whole model: dbtrain fetch CONFIG"

    def lack(self, component: str) -> tuple[str, str] | None:
        """What a component has in place of weights, and what to do about it; None if it has some."""
        if self.weight_files(component):
            return None
        return lack(self.folder / component, self.variant, self.cure)

    def check_weights(self, component: str) -> None:
        """Raise ConfigError if a component has no weights."""
        if found := self.lack(component):
            raise ConfigError(f"base model {self.name}: {'; '.join(found)}")

    def packed(self, component: str) -> bool:
        """Whether the files of a component hold 4-bit weights."""
        return is_nf4(self.config(component))

    def storage(self, component: str, linears: str) -> str:
        """How the component's linear layers are stored with `train.base_linears`: nf4 keeps 4-bit weights."""
        return NF4_FP32 if linears == "nf4" and self.packed(component) else linears

    def key(self, component: str) -> str:
        """sha256 over a component's config and all weights of its variant."""
        folder = self.folder / component
        own = self.own_variant(component)
        weights = (path for path in folder.glob("*.safetensors") if (f".{own}" in path.name) == bool(own))
        found = sorted([*weights, *folder.glob("*.json"), *folder.glob("*.txt"), *folder.glob("*.model")])
        if not found:
            raise ConfigError(f"base model {self.name} has no component '{component}' in {folder}")
        return hashing.content_key([[path.name, hashing.cached_sha256_of(path)] for path in found])

    def _json(self, path: Path) -> dict[str, Any]:
        try:
            return files.read_json(path)
        except ConfigError as problem:
            raise ConfigError(f"base model {self.name}: {problem}") from problem


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False
