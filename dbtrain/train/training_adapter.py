"""An adapter that belongs to the base in training only, such as one that undoes a base's distillation.

A model that was distilled to a few steps unlearns that when it is trained. With such an adapter in its
weights it behaves as if it had not been distilled, and what is then trained suits the distilled model too.
It is merged rather than kept beside the trained one: steps cost no more time or memory of the GPU, and
training is the same as on a base that has it. Class images, validation images, samples and exports are
without it; for validation images the layers are exchanged for copies, so that no arithmetic changes a bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from dbtrain.adapters import inject
from dbtrain.adapters.formats import registry as formats
from dbtrain.adapters.state import AdapterState
from dbtrain.config import Model
from dbtrain.models.base import Base
from dbtrain.models.quantization import Linear8bit
from dbtrain.runtime import dist, files, hashing
from dbtrain.runtime.errors import ConfigError, reason

SETTING = "model.training_adapter"
# owner/name, a file in it, and a revision.
ON_THE_HUB = re.compile(r"([\w.-]+/[\w.-]+(?<!\.safetensors))(?:/([\w./-]+\.safetensors))?(?:@(\S+))?")


def fetch(cfg: Model) -> None:
    """Download the training adapter if it is a Hub id. Call this on every rank.

    Raises ConfigError if there is none at that place.
    """
    with dist.agreed():
        if cfg.training_adapter and dist.local_rank() == 0:
            _located(cfg.training_adapter, offline=False)


def is_on_hub(name: str) -> bool:
    """Whether `name` can only be an adapter on the Hub."""
    return not files.expand(name).exists() and ON_THE_HUB.fullmatch(name) is not None


def is_here(cfg: Model) -> bool:
    """Whether the training adapter is on this machine."""
    try:
        return here(cfg) is not None
    except ConfigError:
        return False


def here(cfg: Model) -> Path | None:
    """The training adapter's file or folder, on this machine; None without the setting. Uses no network.

    Raises ConfigError if it is not here.
    """
    return _located(cfg.training_adapter, offline=True) if cfg.training_adapter else None


def content(cfg: Model) -> str | None:
    """A hash of the training adapter's content, whatever its name; None without the setting."""
    path = here(cfg)
    if path is None:
        return None
    return hashing.sha256_of(path) if path.is_file() else formats.content_of(path)


def read(base: Base, cfg: Model) -> AdapterState | None:
    """The training adapter of the base's denoiser; None without the setting.

    Raises ConfigError for anything but an adapter of the denoiser's weights that fits the base.
    """
    path, name = here(cfg), base.family.denoiser
    if path is None:
        return None
    try:
        states = formats.read(path, base.family, base.skeleton)
    except ConfigError as problem:
        raise ConfigError(f"{SETTING}: {problem}") from problem
    biases = [label for state in states.values() for label in state.tensors if label.endswith(".bias")]
    if (others := sorted(states.keys() - {name})) or biases:
        raise ConfigError(
            f"{SETTING}: adapter {path} changes {others[0] if others else biases[0]}; use one that changes "
            f"weights of the {name} alone"
        )
    return states[name]


def _located(name: str, offline: bool) -> Path:
    found = ON_THE_HUB.fullmatch(name)
    try:
        if files.expand(name).exists() or not found:
            return formats.find(name)
        repository, file, revision = found.groups()
        folder = _snapshot(name, repository, revision, file, offline)
        return formats.find(folder / (file or "."))
    except ConfigError as problem:
        raise ConfigError(f"{SETTING}: {problem}") from problem


def _snapshot(name: str, repository: str, revision: str | None, file: str | None, offline: bool) -> Path:
    """The folder of a Hub repository's adapter in the Hub's cache."""
    from huggingface_hub import snapshot_download

    wanted = [file] if file else ["*.safetensors", "adapter_config.json"]
    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=wanted, local_files_only=offline)
        )
    except Exception as error:  # the Hub's client raises dozens of types
        raise ConfigError(
            f"'{name}' is neither a local file or folder nor an adapter that could be downloaded from the "
            f"Hub: {reason(error)}"
        ) from error


def merge(denoiser: nn.Module, state: AdapterState) -> dict[str, nn.Module]:
    """Add an adapter to the weights of `denoiser`, in fp32; return copies of the layers without it, by name.

    Raises ConfigError if a weight is not finite afterwards.
    """
    parameters = inject.put_on(denoiser, state, inject.NAME)
    for parameter in parameters.values():  # which PEFT made in the base's dtype
        parameter.data = parameter.data.float()
    inject.fill(parameters, state)
    plain: dict[str, nn.Module] = {}
    for name, layer in list(denoiser.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            inner = layer.get_base_layer()
            plain[name] = deepcopy(inner)
            dtype = inner.get_parameter("weight").dtype
            layer.float()  # type: ignore[attr-defined]
            try:
                layer.merge(safe_merge=True)
            except ValueError as error:
                raise ConfigError(f"{SETTING}: its layer {name} is not finite: {reason(error)}") from error
            parent, _, last = name.rpartition(".")
            setattr(denoiser.get_submodule(parent), last, inner.to(dtype))
    del denoiser.peft_config
    return plain


@dataclass(frozen=True)
class LeftOut:
    """The layers that a training adapter changed, each with a copy without it, on the CPU."""

    layers: Sequence[tuple[nn.Module, nn.Module]] = ()

    @classmethod
    def of(cls, denoiser: nn.Module, plain: Mapping[str, nn.Module], storage: str) -> LeftOut:
        """`plain`: layers by name, before `denoiser` was quantized to `storage`."""
        pairs = []
        for name, layer in plain.items():
            live = denoiser.get_submodule(name)
            if isinstance(live, Linear8bit):
                layer = Linear8bit(layer, storage)  # type: ignore[arg-type]
            pairs.append((live, layer))
        return cls(pairs)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """In the block, the layers are the base's own. Afterwards every bit is as before."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for live, plain in self.layers:
            stored = _weights(plain)
            for name, tensor in _weights(live).items():
                used = tensor.to("cpu", copy=True)
                tensor.copy_(stored[name])
                stored[name].copy_(used)


def _weights(layer: nn.Module) -> dict[str, Tensor]:
    """What a training adapter changes of a layer: its weight, as it is stored. Biases may be trained."""
    named = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
    return {name: tensor.data for name, tensor in named if name != "bias"}
