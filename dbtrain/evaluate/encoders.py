"""DINO and CLIP: pictures and texts as unit vectors, whose products are cosines.

Pictures are prepared here, with Pillow, so that scores do not depend on which image library the
transformers package finds: short side to a size by antialiased bicubic interpolation, the centre cut
out, then the model's own mean and deviation. Weights are safetensors: no pickle is ever loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dbtrain.models.locate import hush
from dbtrain.runtime import dist, files, hashing
from dbtrain.runtime.errors import ConfigError, reason
from dbtrain.runtime.hashing import content_key
from dbtrain.runtime.imports import importing

# Both were published as pickles; these commits, of the Hub's own conversion bot, add safetensors.
DINO = "facebook/dino-vits16@a7a4d161f5c0bd70478c05ca5777ec7cd8848021"
CLIP = "openai/clip-vit-base-patch32@c237dc49a33fc61debc9276459120b7eac67e7ef"

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and deviation of each channel
IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI: Statistics = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True)
class View:
    """How a network sees a picture: short side to `resize` px, the centre of `crop` px, normalised."""

    resize: int
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, picture: Image.Image) -> Tensor:
        """The network's input, (3, crop, crop)."""
        short = min(picture.size)
        wide, tall = (self.resize * side // short for side in picture.size)
        left, top = (wide - self.crop) // 2, (tall - self.crop) // 2
        seen = picture.convert("RGB").resize((wide, tall), Image.Resampling.BICUBIC)
        seen = seen.crop((left, top, left + self.crop, top + self.crop))
        values = torch.from_numpy(np.array(seen)).permute(2, 0, 1).float() / 255
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return (values - mean[:, None, None]) / std[:, None, None]

    def __str__(self) -> str:
        numbers = ("/".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return "short side {} px bicubic antialiased, centre {} px, mean {}, std {}".format(
            self.resize, self.crop, *numbers
        )


@dataclass(frozen=True)
class Encoder:
    """A model folder, checked but not loaded: which it is, and how it sees pictures."""

    setting: str  # of the config, for messages
    name: str  # a Hub id, or a folder's own name
    folder: Path
    view: View

    def key(self) -> str:
        """sha256 over all that its embeddings depend on."""
        parts = sorted([*self.folder.glob("*.safetensors"), *self.folder.glob("*.json"),
                        *self.folder.glob("*.txt")])  # fmt: skip
        return content_key([str(self.view), [[part.name, hashing.cached_sha256_of(part)] for part in parts]])

    def load(self, kind: str) -> Any:
        """The model, in fp32 and frozen, on this rank's device. Raises ConfigError if weights are missing."""
        with importing():
            import transformers

            build = getattr(transformers, kind)
        hush()
        try:
            model, info = build.from_pretrained(
                self.folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True,
                trust_remote_code=False,
            )  # fmt: skip
        except Exception as error:  # a broken folder makes the library raise anything
            raise ConfigError(f"cannot load {self.setting} ({self.name}): {reason(error)}") from error
        # A pooler is a layer on top of DINO's embedding, which nobody trained and nothing here asks.
        lacking = [str(key) for key in sorted([*info["missing_keys"], *map(str, info["mismatched_keys"])])]
        if lacking := [key for key in lacking if not key.startswith("pooler.")]:
            raise ConfigError(
                f"{self.setting} ({self.name}) is no {kind}: {len(lacking)} weights are missing or of "
                f"another shape, e.g. {lacking[0]}"
            )
        return model.requires_grad_(False).eval().to(dist.device())


def dino(name: str) -> Encoder:
    """A DINO: seen as its authors do, resized to 8/7 of what is cut out (256 and 224 px)."""
    folder = _find(name, "evaluation.dino")
    told, model = _processor(folder), _json(folder / "config.json")
    if not isinstance(model.get("image_size"), int):
        raise ConfigError(f"evaluation.dino is '{name}', a {model.get('model_type')} and no ViT")
    crop = _side(told.get("crop_size") or told.get("size")) or model["image_size"]
    return Encoder(
        "evaluation.dino", _short(name), folder, View(crop * 8 // 7, crop, *_statistics(told, IMAGENET))
    )


def clip(name: str) -> Encoder:
    """A CLIP: seen as its own image processor does (both sizes are 224 px)."""
    folder = _find(name, "evaluation.clip")
    told, model = _processor(folder), _json(folder / "config.json")
    if model.get("model_type") != "clip":
        raise ConfigError(f"evaluation.clip is '{name}', a {model.get('model_type')} and no CLIP")
    if not any((folder / vocabulary).is_file() for vocabulary in ("tokenizer.json", "vocab.json")):
        raise ConfigError(f"evaluation.clip is '{name}': {folder} holds no vocabulary (tokenizer.json)")
    side = _side((model.get("vision_config") or {}).get("image_size")) or 224
    crop, resize = _side(told.get("crop_size")) or side, _side(told.get("size")) or side
    return Encoder(
        "evaluation.clip", _short(name), folder, View(max(resize, crop), crop, *_statistics(told, OPENAI))
    )


def dino_pictures(encoder: Encoder) -> Callable[[Tensor], Tensor]:
    """(B, 3, s, s) -> the last layer's CLS token, (B, D), unit."""
    model = encoder.load("AutoModel")

    def embed(pixels: Tensor) -> Tensor:
        return _unit(model(pixel_values=pixels.to(dist.device())).last_hidden_state[:, 0])

    return embed


def clip_pictures_and_texts(
    encoder: Encoder,
) -> tuple[Callable[[Tensor], Tensor], Callable[[Sequence[str]], Tensor]]:
    """(B, 3, s, s) -> (B, D), and texts -> (texts, D): projected into CLIP's common space, unit."""
    model = encoder.load("CLIPModel")
    with importing():
        from transformers import CLIPTokenizer
    try:
        words = CLIPTokenizer.from_pretrained(encoder.folder)
    except Exception as error:  # a broken vocabulary makes the library raise anything
        raise ConfigError(f"cannot read the vocabulary of {encoder.name}: {reason(error)}") from error
    longest = model.config.text_config.max_position_embeddings

    # Not get_image_features: what that returns changed within transformers 5.
    def pictures(pixels: Tensor) -> Tensor:
        seen = model.vision_model(pixel_values=pixels.to(dist.device())).pooler_output
        return _unit(model.visual_projection(seen))

    def texts(prompts: Sequence[str]) -> Tensor:
        ids = words(list(prompts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        read = model.text_model(
            input_ids=ids["input_ids"].to(dist.device()),
            attention_mask=ids["attention_mask"].to(dist.device()),
        ).pooler_output
        return _unit(model.text_projection(read))

    return pictures, texts


@torch.no_grad()
def embed(paths: Sequence[Path], load: Callable[[Path], Image.Image], view: View,
          network: Callable[[Tensor], Tensor]) -> Tensor:  # fmt: skip
    """Embeddings of picture files, (files, D), on the CPU."""
    return network(torch.stack([view(load(path)) for path in paths])).float().cpu()


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors.float(), dim=-1)


def _find(name: str, setting: str) -> Path:
    """The folder of `name`: itself, or a Hub id (with `@REVISION`, if need be), downloaded once a node."""
    folder = files.expand(name)
    if not folder.is_dir():
        folder = _download(name, setting)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{setting} is '{name}', but {folder} has no config.json")
    if not any(folder.glob("model*.safetensors")):
        raise ConfigError(
            f"{setting} is '{name}', which has no safetensors; others are pickles, and may run code; "
            "give another model, or a revision that has them, as NAME@REVISION"
        )
    return folder


def _download(name: str, setting: str) -> Path:
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    wanted = ["*.json", "*.txt", "model*.safetensors"]
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=wanted))
    except Exception as error:  # the Hub client raises dozens of kinds
        raise ConfigError(
            f"{setting} is '{name}', which is neither a folder here nor a model that could be downloaded "
            f"from the Hub: {reason(error)}"
        ) from error


def _short(name: str) -> str:
    return files.expand(name).resolve().name if files.expand(name).is_dir() else name


def _processor(folder: Path) -> dict[str, Any]:
    """The image processor's settings: in a file of their own, or in the whole processor's."""
    if (folder / "preprocessor_config.json").is_file():
        return _json(folder / "preprocessor_config.json")
    if (folder / "processor_config.json").is_file():
        return _json(folder / "processor_config.json").get("image_processor") or {}
    return {}


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no settings")
    return values


def _side(size: Any) -> int | None:
    """A side in px, as processors of all ages write it."""
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height")
    return size if isinstance(size, int) else None


def _statistics(told: dict[str, Any], usual: Statistics) -> Statistics:
    mean, std = (tuple(told.get(name) or ()) for name in ("image_mean", "image_std"))
    return (mean, std) if mean and std else usual
