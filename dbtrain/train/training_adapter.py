"""An adapter that belongs to the base in training only, such as one that undoes a base's distillation.

A model that was distilled to a few steps unlearns that when it is trained. With such an adapter in its
weights it behaves as if it had not been distilled, and what is then trained suits the distilled model too.
Class images, validation images, samples and exports are without it.
"""

from __future__ import annotations

import re
from pathlib import Path

from dbtrain.adapters.state import AdapterState
from dbtrain.config import Model
from dbtrain.models.base import Base
from dbtrain.runtime import dist, files, hashing
from dbtrain.runtime.errors import ConfigError, reason

SETTING = "model.training_adapter"
# owner/name, a file in it, and a revision.
ON_THE_HUB = re.compile(r"([\w.-]+/[\w.-]+(?<!\.safetensors))(?:/([\w./-]+\.safetensors))?(?:@(\S+))?")


def fetch(cfg: Model) -> Path | None:
    """The training adapter's file or folder; None without the setting. Call this on every rank.

    A Hub id is downloaded first. Raises ConfigError if there is none at that place.
    """
    with dist.agreed():
        if cfg.training_adapter and dist.local_rank() == 0:
            _located(cfg.training_adapter, offline=False)
    return here(cfg)


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
    if path.is_file():
        return hashing.sha256_of(path)
    from dbtrain.adapters.formats import registry as formats

    return formats.content_of(path)


def read(base: Base, cfg: Model) -> AdapterState | None:
    """The training adapter of the base's denoiser; None without the setting.

    Raises ConfigError for anything but an adapter of the denoiser's weights that fits the base.
    """
    from dbtrain.adapters.formats import registry as formats  # loads PEFT, which most calls need not

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
    from dbtrain.adapters.formats import registry as formats  # loads PEFT, which most calls need not

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
