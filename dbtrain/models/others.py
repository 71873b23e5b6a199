"""Models beside the base, of a folder or the Hub: loaded from safetensors only, never from a pickle."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from dbtrain.models import safety
from dbtrain.models.locate import hush
from dbtrain.runtime import dist, files
from dbtrain.runtime.errors import ConfigError, reason
from dbtrain.runtime.imports import importing


def find(name: str, setting: str, download: bool = True, fetch: str = "run: dbtrain prepare") -> Path:
    """The model folder: `name` itself, or the Hub id `name` in the cache, optionally with `@REVISION`.

    `setting`: its config key, for messages. `fetch`: what downloads it, if this does not.
    """
    folder = files.expand(name)
    if not folder.is_dir():
        folder = _from_hub(name, setting, download, fetch)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{setting}: '{name}' has no config.json in {folder}")
    if not any(folder.glob("model*.safetensors")):
        raise ConfigError(
            f"{setting}: '{name}' has no safetensors, and pickles can run code when loaded; "
            "use another model, or a revision that has them, as NAME@REVISION"
        )
    safety.check_folder(folder, setting)
    return folder


def _from_hub(name: str, setting: str, download: bool, fetch: str) -> Path:
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    wanted = ["*.json", "*.txt", "*.jinja", "*.model", "model*.safetensors"]  # *.model: of sentencepiece
    try:
        return Path(
            snapshot_download(
                repository, revision=revision or None, allow_patterns=wanted, local_files_only=not download
            )
        )
    except Exception as error:  # the Hub client raises dozens of types
        if not download:
            raise ConfigError(f"{setting}: '{name}' is not here; {fetch}") from error
        raise ConfigError(
            f"{setting}: '{name}' is neither a local folder nor a model that could be downloaded from the "
            f"Hub: {reason(error)}"
        ) from error


def load(
    folder: Path, kind: str, about: str, unused: Collection[str] = (), dtype: torch.dtype = torch.float32
) -> Any:
    """The model of class `kind` of transformers in `dtype`, frozen, on this rank's device.

    `about`: its name and setting, for messages. `unused`: beginnings of names of weights that may be missing.
    Raises ConfigError if others are.
    """
    with importing():
        import transformers

        build = getattr(transformers, kind)
    hush()
    try:
        model, info = build.from_pretrained(
            folder, use_safetensors=True, dtype=dtype, output_loading_info=True,
            trust_remote_code=False,
        )  # fmt: skip
    except Exception as error:  # the library can raise anything for a broken folder
        raise ConfigError(f"cannot load {about}: {reason(error)}") from error
    keys = map(str, [*info["missing_keys"], *info["mismatched_keys"]])
    if missing := sorted(key for key in keys if not key.startswith(tuple(unused))):
        raise ConfigError(
            f"{about} is not a {kind}: {len(missing)} weights are missing or of another shape, e.g. "
            f"{missing[0]}"
        )
    return model.requires_grad_(False).eval().to(dist.device())


def clip_words(folder: Path, about: str) -> Any:
    """The tokenizer of a CLIP. Raises ConfigError if it cannot be read."""
    with importing():
        from transformers import CLIPTokenizer
    try:
        return CLIPTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the library can raise anything for a broken vocabulary
        raise ConfigError(f"cannot read the vocabulary of {about}: {reason(error)}") from error
