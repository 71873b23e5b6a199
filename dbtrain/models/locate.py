"""Locations of a base model: the embedded base, a folder, a single file, the Hub and its cache."""

from __future__ import annotations

import importlib
from importlib import resources
from pathlib import Path
from typing import Any

from dbtrain.config import Model
from dbtrain.models import safety
from dbtrain.runtime import dist, files, hashing
from dbtrain.runtime.errors import ConfigError, reason

EMBEDDED = "tiny"  # `model.path` of the base that comes with the package
LIBRARIES = ("diffusers", "transformers")
IN_A_FILE = {False: "StableDiffusionPipeline", True: "StableDiffusionXLPipeline"}  # is it an XL -> pipeline
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # of a pipeline, and not loaded


def embedded() -> Path:
    """The folder of the embedded base."""
    return Path(str(resources.files("dbtrain") / "tiny" / "model"))


def hush() -> None:
    """Disable the libraries' progress bars and warnings; our own progress bars show what takes time.

    Transformers, which asks on standard input whether to run a model's code, never asks: it waits 0 s.
    """
    for library in LIBRARIES:
        logging = importlib.import_module(f"{library}.utils.logging")
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    importlib.import_module("transformers.dynamic_module_utils").TIME_OUT_REMOTE_CODE = 0  # type: ignore[attr-defined]


def folder_here(cfg: Model) -> Path | None:
    """The local folder of `model.path`, or None if there is none. Raises ConfigError for a pickle."""
    path = files.expand(cfg.path)
    if cfg.path == EMBEDDED:
        return embedded()
    if path.is_file():
        folder = _converted(cfg, path)
        return folder if folder.exists() else None
    return path if path.exists() else None


def _converted(cfg: Model, path: Path) -> Path:
    """The cache folder for a single file that is converted to a Diffusers folder."""
    if path.suffix != ".safetensors":
        raise ConfigError(
            f"model.path: '{cfg.path}' is not a .safetensors file; other formats are pickles, which may run "
            "code"
        )
    safety.check_size(path)
    key = hashing.content_key([hashing.cached_sha256_of(path), cfg.config])
    return files.cache() / "single-files" / key[:16]


def from_single_file(cfg: Model, path: Path) -> Path:
    """Convert a model in one file, as for A1111 and ComfyUI, to a Diffusers folder in the user's cache."""
    folder = _converted(cfg, path)
    with dist.agreed():
        if dist.local_rank() == 0 and not folder.exists():
            try:
                pipe = _single_file_pipeline(cfg, path)
            except ConfigError:
                raise
            except Exception as error:  # the libraries raise many kinds for a broken file
                raise ConfigError(
                    f"model.path: Diffusers cannot read a model from '{cfg.path}': {reason(error)}; try "
                    "setting model.config to a Diffusers folder or Hub id of the same architecture"
                ) from error
            files.write_folder_atomically(folder, pipe.save_pretrained)
    return folder


def _single_file_pipeline(cfg: Model, path: Path) -> Any:
    import diffusers
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type
    from safetensors.torch import load_file

    hush()
    tensors = load_file(path)
    if cfg.config:
        name = _checked(cfg.config)
    else:
        name = IN_A_FILE[infer_diffusers_model_type(tensors).startswith("xl")]
    dtype = next(tensor.dtype for key, tensor in tensors.items() if "diffusion_model" in key)
    kind = getattr(diffusers, name)
    without = dict.fromkeys(part for part in UNUSED if part in kind._optional_components)
    return kind.from_single_file(str(path), config=cfg.config, torch_dtype=dtype, **without)


def _checked(config: str) -> str:
    """The pipeline class of `model.config`. Raises ConfigError if it must not be loaded."""
    import diffusers

    folder = files.expand(config)
    found = files.read_json(folder / "model_index.json") if folder.is_dir() else {}
    index = found or diffusers.DiffusionPipeline.load_config(config)
    name = str(index.get("_class_name"))
    if name not in IN_A_FILE.values():
        raise ConfigError(f"model.config: '{config}' is a {name}; use one of {', '.join(IN_A_FILE.values())}")
    for part, entry in index.items():
        if isinstance(entry, list) and entry != [None, None] and part not in UNUSED:
            if part not in safety.CLASSES:
                raise ConfigError(f"model.config: '{config}' has a component '{part}'; use another folder")
            safety.check_class(config, part, entry)
            safety.check_folder(folder / part, "model.config")
    return name


def cached(cfg: Model) -> Path | None:
    """The folder of a Hub id in the Hub's cache, or None. Its download may be incomplete."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if files.expand(cfg.path).is_file():
        return None
    try:
        index = try_to_load_from_cache(cfg.path, "model_index.json", revision=cfg.revision)
    except HFValidationError as error:
        raise ConfigError(
            f"model.path: '{cfg.path}' is neither a local folder nor the name of a model on the Hub; "
            "use one of these, or tiny"
        ) from error
    return Path(index).parent if isinstance(index, str) else None


def download(cfg: Model) -> Path:
    """The cached folder of a Hub id, which one rank per node downloads."""
    from diffusers import DiffusionPipeline

    def fetch() -> Path:
        return Path(
            DiffusionPipeline.download(
                cfg.path, revision=cfg.revision, variant=cfg.variant, use_safetensors=True,
                safety_checker=None, trust_remote_code=False,
            )
        )  # fmt: skip

    with dist.agreed():
        if dist.local_rank() == 0:
            try:
                fetch()
            except Exception as error:  # the Hub's client raises many kinds, including httpx's
                raise ConfigError(
                    f"model.path: '{cfg.path}' is neither a local folder nor a model that could be "
                    f"downloaded from the Hub: {reason(error)}"
                ) from error
    return fetch()
