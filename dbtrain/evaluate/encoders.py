"""DINO and CLIP: images and texts as unit vectors, whose dot products are cosines.

Images are preprocessed here with Pillow, so that scores do not depend on the image library that transformers
finds: antialiased bicubic resize of the short side, center crop, then the model's own mean and deviation.
Weights are loaded from safetensors only, never from a pickle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dbtrain.config import Evaluation
from dbtrain.models import others
from dbtrain.runtime import dist, files, hashing
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.hashing import content_key

# Both were published as pickles; these commits by the Hub's own conversion bot add safetensors.
DINO = "facebook/dino-vits16@a7a4d161f5c0bd70478c05ca5777ec7cd8848021"
CLIP = "openai/clip-vit-base-patch32@c237dc49a33fc61debc9276459120b7eac67e7ef"

VIT = {  # model_type of a DINO -> its class
    "vit": "ViTModel", "deit": "DeiTModel", "dinov2": "Dinov2Model", "dinov3_vit": "DINOv3ViTModel",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
}  # fmt: skip
FETCH = "run dbtrain fetch --scoring"  # downloads them
LARGEST = 4096  # px, of an encoder's input
Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and deviation of each channel
IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI: Statistics = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True)
class View:
    """Preprocessing: resize the short side to `resize` px, center-crop `crop` px, normalize."""

    resize: int
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Image.Image) -> Tensor:
        """The network's input, (3, crop, crop)."""
        short = min(image.size)
        wide, tall = (self.resize * side // short for side in image.size)
        left, top = (wide - self.crop) // 2, (tall - self.crop) // 2
        resized = image.convert("RGB").resize((wide, tall), Image.Resampling.BICUBIC)
        cropped = resized.crop((left, top, left + self.crop, top + self.crop))
        values = torch.from_numpy(np.array(cropped)).permute(2, 0, 1).float() / 255
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return (values - mean[:, None, None]) / std[:, None, None]

    def __str__(self) -> str:
        numbers = ("/".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return "short side {} px bicubic antialiased, centre {} px, mean {}, std {}".format(
            self.resize, self.crop, *numbers
        )


@dataclass(frozen=True)
class Encoder:
    """A model folder, checked but not loaded, and its preprocessing."""

    setting: str  # config key, for messages
    name: str  # a Hub id, or the folder's name
    folder: Path
    view: View
    kind: str  # class of transformers

    def key(self) -> str:
        """A hash of everything that its embeddings depend on."""
        parts = sorted([*self.folder.glob("*.safetensors"), *self.folder.glob("*.json"),
                        *self.folder.glob("*.txt")])  # fmt: skip
        return content_key([str(self.view), [[part.name, hashing.cached_sha256_of(part)] for part in parts]])

    def load(self) -> Any:
        """The model in fp32, frozen, on this rank's device. Raises ConfigError if weights are missing."""
        # The pooler is an untrained layer on top of DINO's embedding, and unused here.
        return others.load(self.folder, self.kind, f"{self.setting} ({self.name})", unused=("pooler.",))


def of(cfg: Evaluation, download: bool = True) -> tuple[Encoder, Encoder]:
    """(DINO, CLIP) of a config. Downloads Hub ids. Raises ConfigError if one cannot be used."""
    return dino(cfg.dino or DINO, download), clip(cfg.clip or CLIP, download)


def dino(name: str, download: bool = True) -> Encoder:
    """A DINO encoder, with its authors' preprocessing: resize to 8/7 of the crop (256 and 224 px)."""
    folder = others.find(name, "evaluation.dino", download, FETCH)
    processor, model = _processor(folder), files.read_json(folder / "config.json")
    kind = VIT.get(str(model.get("model_type")))
    if not kind or not isinstance(model.get("image_size"), int):
        raise ConfigError(
            f"evaluation.dino: '{name}' is a {model.get('model_type')}, not a ViT; "
            f"use one of {', '.join(VIT)}"
        )
    crop = _side(processor.get("crop_size") or processor.get("size")) or model["image_size"]
    view = _view(name, crop * 8 // 7, crop, *_statistics(processor, IMAGENET))
    return Encoder("evaluation.dino", _short(name), folder, view, kind)


def clip(name: str, download: bool = True) -> Encoder:
    """A CLIP encoder, with the preprocessing of its own image processor (both sizes are 224 px)."""
    folder = others.find(name, "evaluation.clip", download, FETCH)
    processor, model = _processor(folder), files.read_json(folder / "config.json")
    if model.get("model_type") != "clip":
        raise ConfigError(f"evaluation.clip: '{name}' is a {model.get('model_type')}, not a CLIP")
    if not any((folder / vocabulary).is_file() for vocabulary in ("tokenizer.json", "vocab.json")):
        raise ConfigError(f"evaluation.clip: '{name}' has no vocabulary (tokenizer.json) in {folder}")
    side = _side((model.get("vision_config") or {}).get("image_size")) or 224
    crop, resize = _side(processor.get("crop_size")) or side, _side(processor.get("size")) or side
    view = _view(name, max(resize, crop), crop, *_statistics(processor, OPENAI))
    return Encoder("evaluation.clip", _short(name), folder, view, "CLIPModel")


def dino_images(encoder: Encoder) -> Callable[[Tensor], Tensor]:
    """A function from pixels, (B, 3, s, s), to DINO's CLS tokens as unit vectors, (B, D)."""
    model = encoder.load()

    def embed(pixels: Tensor) -> Tensor:
        return _unit(model(pixel_values=pixels.to(dist.device())).last_hidden_state[:, 0])

    return embed


def clip_images_and_texts(
    encoder: Encoder,
) -> tuple[Callable[[Tensor], Tensor], Callable[[Sequence[str]], Tensor]]:
    """Functions from pixels, (B, 3, s, s), and from texts to unit vectors in CLIP's joint space, (B, D)."""
    model = encoder.load()
    tokenizer = others.clip_words(encoder.folder, encoder.name)
    longest = model.config.text_config.max_position_embeddings

    # Not get_image_features, whose return type changed within transformers 5.
    def images(pixels: Tensor) -> Tensor:
        pooled = model.vision_model(pixel_values=pixels.to(dist.device())).pooler_output
        return _unit(model.visual_projection(pooled))

    def texts(prompts: Sequence[str]) -> Tensor:
        tokens = tokenizer(
            list(prompts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(dist.device())
        pooled = model.text_model(**tokens).pooler_output
        return _unit(model.text_projection(pooled))

    return images, texts


@torch.no_grad()
def embed(paths: Sequence[Path], load: Callable[[Path], Image.Image], view: View,
          network: Callable[[Tensor], Tensor]) -> Tensor:  # fmt: skip
    """Embeddings of image files, (files, D), on the CPU."""
    return network(torch.stack([view(load(path)) for path in paths])).float().cpu()


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors.float(), dim=-1)


def _short(name: str) -> str:
    """A Hub id as it is; of a folder, only its own name."""
    return files.expand(name).resolve().name if files.expand(name).is_dir() else name


def _processor(folder: Path) -> dict[str, Any]:
    """The image processor's settings, which are in one of two files; {} without either."""
    if (own := folder / "preprocessor_config.json").is_file():
        return files.read_json(own)
    if (shared := folder / "processor_config.json").is_file():
        return files.read_json(shared).get("image_processor") or {}
    return {}


def _side(size: Any) -> int | None:
    """A side in px from any of the formats that image processors use; None if there is none."""
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height")
    return size if isinstance(size, int) else None


def _view(name: str, resize: int, crop: int, mean: tuple[float, ...], std: tuple[float, ...]) -> View:
    """The preprocessing of the encoder `name`. Raises ConfigError if no image could pass through it."""
    numbers = (*mean, *std)
    fine = len(numbers) == 6 and all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers)
    if not (0 < crop <= resize <= LARGEST and fine and min(std) > 0):
        raise ConfigError(
            f"evaluation: the image processor of '{name}' has {resize} and {crop} px, mean {mean} and std "
            f"{std}; use a model with at most {LARGEST} px and three finite numbers each"
        )
    return View(resize, crop, mean, std)


def _statistics(processor: dict[str, Any], usual: Statistics) -> Statistics:
    """The processor's mean and deviation, or else the usual ones."""
    values = [processor.get(name) for name in ("image_mean", "image_std")]
    mean, std = (tuple(value) if isinstance(value, list) else () for value in values)
    return (mean, std) if mean and std else usual
