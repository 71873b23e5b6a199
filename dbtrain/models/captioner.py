"""Models that describe a photo: captioners, and chat models that are asked to, of transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dbtrain.config.subject_words import with_article
from dbtrain.models import others
from dbtrain.models.locate import hush
from dbtrain.runtime import dist, files
from dbtrain.runtime.errors import ConfigError, reason
from dbtrain.runtime.imports import importing

MODEL = "Salesforce/blip-image-captioning-large"
SETTING = "prepare.captioner"
# Model type -> what its captions begin with, or what asks it for one; {} is the class with its article.
PROMPTS = {"blip": "a photo of {}", "florence2": "<CAPTION>"}
QUESTION = (
    "Describe this photo of {} in one sentence of at most 40 words. Say what is around it, its pose, the "
    "light and the view, but not what it looks like itself. Begin with: A photo of {}"
)
MOST_TOKENS = 64  # new ones; CLIP reads 77
SIDE = 1024  # px, most that a model sees of a photo's longest side
VIDEOS = "video_processor"
Describe = Callable[[Image.Image, str], str]


def find(name: str, download: bool = True) -> Path:
    """The folder of a model that describes photos. Raises ConfigError if it is none."""
    folder = others.find(name, SETTING, download)
    kind = str(files.read_json(folder / "config.json").get("model_type"))
    with importing():
        from transformers.models.auto import modeling_auto, processing_auto

    names = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if kind not in names or kind not in processing_auto.PROCESSOR_MAPPING_NAMES:
        raise ConfigError(
            f"{SETTING}: '{name}' is a {kind}, not an image-to-text model of transformers; use one, e.g. "
            f"{MODEL}"
        )
    return folder


@lru_cache(maxsize=1)
def describer(name: str) -> Describe:
    """A function from a photo and a class word to a caption. Raises ConfigError if it is no such model.

    It decodes greedily: the same photo has the same caption on the same kind of device.
    """
    folder, about = find(name), f"{SETTING} ({name})"
    processor = _processor(folder, about)
    dtype = torch.bfloat16 if dist.device().type == "cuda" else torch.float32
    model = others.load(folder, "AutoModelForImageTextToText", about, dtype=dtype)
    prompt = PROMPTS.get(model.config.model_type)
    template = None if prompt else processor.chat_template or processor.tokenizer.chat_template

    @torch.no_grad()
    def generated(photo: Image.Image, kind: str) -> str:
        if not template:
            text = {"text": prompt.format(with_article(kind))} if prompt else {}
            inputs = processor(images=photo, return_tensors="pt", **text)
        else:
            question = {"type": "text", "text": QUESTION.format(*[with_article(kind)] * 2)}
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image", "image": photo}, question]}],
                chat_template=template, enable_thinking=False, add_generation_prompt=True, tokenize=True,
                return_dict=True, return_tensors="pt",
            )  # fmt: skip
        inputs = inputs.to(model.device, model.dtype)
        ids = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=MOST_TOKENS)[0]
        asked = inputs["input_ids"][0] if template else ids[:0]
        if torch.equal(ids[: len(asked)], asked):  # a chat, whose answer follows
            ids = ids[len(asked) :]
        return processor.tokenizer.decode(ids, skip_special_tokens=True)

    def describe(photo: Image.Image, kind: str) -> str:
        small = photo.copy()
        small.thumbnail((SIDE, SIDE))
        try:
            return generated(small, kind)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the library can raise anything for settings that do not fit together
            raise ConfigError(
                f"{about} cannot describe a photo: {reason(error)}; use another model"
            ) from error

    return describe


def _processor(folder: Path, about: str) -> Any:
    """What makes the model's input of photos and text, without its part for videos, which needs torchvision.

    Raises ConfigError if it cannot be read.
    """
    with importing():
        from transformers import CONFIG_MAPPING, PROCESSOR_MAPPING
    hush()
    try:
        whole: Any = PROCESSOR_MAPPING[CONFIG_MAPPING[files.read_json(folder / "config.json")["model_type"]]]
        parts = [part for part in whole.get_attributes() if part != VIDEOS]
        kind: Any = type(whole.__name__, (whole,), {"get_attributes": classmethod(lambda cls: parts)})
        found = kind.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the library can raise anything for a broken folder
        raise ConfigError(f"cannot read the processor of {about}: {reason(error)}") from error
    if len(found.tokenizer) <= len(found.tokenizer.all_special_tokens):  # made up, as it has no file
        raise ConfigError(f"cannot read the vocabulary of {about}: it has no words")
    return found
