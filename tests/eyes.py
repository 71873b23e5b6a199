"""A DINO and a CLIP with random weights, small, in folders as they are published."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

from dbtrain.runtime import rng
from tests import bases
from tests.session import once

SIDE = 32  # px
DINO_MEAN, DINO_STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
CLIP_MEAN, CLIP_STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


def _settings(folder: Path, **settings: object) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


@cache
def dino() -> Path:
    """A ViT without the pooler, as DINO is."""
    return once("dino", _dino)


@cache
def clip() -> Path:
    return once("clip", _clip)


def _dino(folder: Path) -> None:
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        image_size=SIDE, patch_size=8,
    )  # fmt: skip
    _settings(folder, size=SIDE, image_mean=DINO_MEAN, image_std=DINO_STD)
    with rng.seeded("tests", "dino"):
        model = ViTModel(config, add_pooling_layer=False)
        for parameter in model.parameters():  # embeddings further apart than at their start
            parameter.data += 0.2 * parameter.data.new_empty(parameter.shape).normal_()
    model.save_pretrained(folder)


def _clip(folder: Path) -> None:
    words = bases.clip_words()
    config = CLIPConfig(
        text_config=bases._clip(words).to_dict(), projection_dim=24,
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                       "num_attention_heads": 4, "image_size": SIDE, "patch_size": 8},
    )  # fmt: skip
    _settings(
        folder, size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, resample=3,
        image_mean=CLIP_MEAN, image_std=CLIP_STD, image_processor_type="CLIPImageProcessor",
    )  # fmt: skip
    with rng.seeded("tests", "clip"):
        model = CLIPModel(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * parameter.data.new_empty(parameter.shape).normal_()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
