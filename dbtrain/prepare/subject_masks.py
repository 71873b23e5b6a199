"""Masks that a model makes: CLIPSeg finds what a word means in a photo.

They are written as files that a user can look at and correct, and existing ones are never replaced.
Lüddecke & Ecker 2022, "Image Segmentation Using Text and Image Prompts", arXiv:2112.10003.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dbtrain.config import Config
from dbtrain.data import masks, photos
from dbtrain.data.photo_files import check_names
from dbtrain.models import others
from dbtrain.runtime import console, files
from dbtrain.runtime.errors import ConfigError

MODEL = "CIDAS/clipseg-rd64-refined"
SETTING = "prepare.mask_model"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FAINT, SURE = 0.2, 0.4  # probabilities that count as background and as subject; a mask rises between them


def ensure(cfg: Config, paths: Sequence[Path]) -> None:
    """Write the masks that these photos of a subject lack, on rank 0, if `prepare.mask` is `auto`.

    Raises ConfigError if the model cannot be used, or finds nothing.
    """
    prepare = cfg.prepare
    if not prepare or prepare.mask != "auto":
        return
    missing = [path for path in paths if not masks.is_there(path)]
    if missing and not cfg.subject.class_word:
        raise ConfigError(
            "prepare.mask is auto, but nothing says what to find in the photos; set subject.class_word"
        )
    check_names(missing, masks.made_file)
    for path in missing:
        mask = finder(prepare.mask_model or MODEL)(photos.load(path), str(cfg.subject.class_word))
        if not np.asarray(mask).any():
            raise ConfigError(
                f"{SETTING} finds no {cfg.subject.class_word} in photo {path}; draw a mask yourself, as "
                f"{path.stem}{masks.MASKS[0]} beside it"
            )
        png = io.BytesIO()
        mask.save(png, "PNG")
        files.write_atomically(masks.made_file(path), png.getvalue())
    if missing:
        folders = dict.fromkeys(str(masks.made_file(path).parent) for path in missing)
        console.say(f"made {len(missing)} masks in {', '.join(folders)}: look at them")


@lru_cache(maxsize=1)
def finder(name: str) -> Callable[[Image.Image, str], Image.Image]:
    """A function from a photo and a word to the photo's mask. Raises ConfigError if it is no such model."""
    folder, about = others.find(name, SETTING), f"{SETTING} ({name})"
    config = files.read_json(folder / "config.json")
    if config.get("model_type") != "clipseg":
        raise ConfigError(f"{SETTING}: '{name}' is a {config.get('model_type')}, not a CLIPSeg")
    model = others.load(folder, "CLIPSegForImageSegmentation", about)
    tokenizer = others.clip_words(folder, about)
    side = model.config.vision_config.image_size

    @torch.no_grad()
    def find(photo: Image.Image, word: str) -> Image.Image:
        small = photo.resize((side, side), Image.Resampling.BICUBIC)
        values = torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255
        pixels = (values - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        ids = tokenizer([word], return_tensors="pt")
        where = model.device
        logits = model(
            pixel_values=pixels[None].to(where), input_ids=ids.input_ids.to(where),
            attention_mask=ids.attention_mask.to(where),
        ).logits  # fmt: skip
        share = ((logits.reshape(side, side).sigmoid().float().cpu() - FAINT) / (SURE - FAINT)).clamp(0, 1)
        mask = Image.fromarray((share * 255).round().to(torch.uint8).numpy())
        return mask.resize(photo.size, Image.Resampling.BILINEAR)

    return find
