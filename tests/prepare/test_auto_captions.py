"""Captions that a model writes: what is left of them, and that each is written once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.architectures import qwen_words
from dbtrain.data.captions import captions
from dbtrain.data.shards import Manifest
from dbtrain.doctor import captions as checks
from dbtrain.doctor.case import Case
from dbtrain.models import captioner, others
from dbtrain.models.base import Base
from dbtrain.prepare import encode
from dbtrain.prepare import prepare as verb
from dbtrain.prepare.prepare import prepare
from dbtrain.prepare.subject_captions import about_subject
from dbtrain.runtime.errors import ConfigError
from dbtrain.tiny import world
from dbtrain.train.inputs import Inputs
from tests import bases
from tests.conftest import Make, at, draw_photo
from tests.session import once

WORDS = {
    "a small brown dog on a bed": "a sks dog on a bed",
    "A black and white dog is sitting.": "a sks dog is sitting",
    "a man and his old, fluffy dog": "a man and his sks dog",
    "a man and dog": "a man and sks dog",
    "photo of a sleeping dog": "photo of a sleeping sks dog",
    "photo of brown dog": "photo of sks dog",
    "two dogs playing": "a sks dog playing",
    "Dogs on grass": "sks dog on grass",
    "“The dog's\n\0 bed.”": "the sks dog's bed",
    "the dog and another dog": "the sks dog and another dog",
    "TV behind a DOG": "TV behind a sks dog",
    "A cat on a sofa.": "a photo of sks dog, a cat on a sofa",
    "a dogma": "a photo of sks dog, a dogma",
    " . ": "a photo of sks dog",
}


@pytest.mark.parametrize("text", WORDS)
def test_the_token_takes_the_place_of_what_the_caption_says_of_the_subject(text: str) -> None:
    assert about_subject(text, "sks", "dog") == WORDS[text]


def test_a_class_may_have_two_words_or_a_plural_of_its_own() -> None:
    assert (
        about_subject("An orange teddy  bear in a car", "ohwx", "teddy bear") == "an ohwx teddy bear in a car"
    )
    assert about_subject("three tiny puppies", "Sks", "puppy") == "a Sks puppy"


VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def blip(folder: Path) -> None:
    """A captioner with random weights, which continues what it is given with random words."""
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipProcessor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    found = {
        word.strip(".,")
        for text in world.captions([world.scene(n) for n in range(60)])
        for word in text.split()
    }
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(found | {"a", "photo", "of", "dog"})]
    words = BertTokenizer(vocab={name: number for number, name in enumerate(names)})
    text = {
        **VISION, "vocab_size": len(words), "encoder_hidden_size": 32, "projection_dim": 16,
        "bos_token_id": 2, "max_position_embeddings": 128, "sep_token_id": 3, "eos_token_id": 3,
        "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(BlipConfig(
        text_config=text, vision_config={**VISION, "image_size": 32, "patch_size": 16}, projection_dim=16,
        image_text_hidden_size=16,
    ))  # fmt: skip
    for name, weight in model.named_parameters():  # else it would hardly see the photo
        if "crossattention" in name or "vision" in name:
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), words).save_pretrained(folder)


IN_TURN = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- for part in message.content %}{%- if part.type == 'image' %}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- else %}{{- part.text }}{%- endif %}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)  # Qwen2.5-VL's template, for one photo


def chat(folder: Path) -> None:
    """A chat model with random weights, whose processor has a part for videos."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    words = qwen_words()
    names = ("vision_start", "vision_end", "image_pad", "video_pad")
    words.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in names]})
    words.chat_template = IN_TURN
    keys = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    ids = {key: words.convert_tokens_to_ids(f"<|{name}|>") for key, name in zip(keys, names, strict=True)}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
              "fullatt_block_indexes": [0]}  # fmt: skip
    text = {**bases.QWEN_TEXT, "vocab_size": len(words), "num_hidden_layers": 1}
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56).save_pretrained(folder)
    words.save_pretrained(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three photos, of which the user captioned one."""
    (folder := tmp_path / "photographed").mkdir()
    for number in range(3):
        draw_photo(folder / f"{number}.png", number)
    (folder / "1.txt").write_text("mine")
    return folder


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that are loaded beside the base."""
    names: list[str] = []
    load = others.load
    monkeypatch.setattr(
        others,
        "load",
        lambda folder, kind, about, **how: names.append(about) or load(folder, kind, about, **how),
    )
    return names


def texts(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.txt"))}


def test_a_captioner_writes_the_captions_that_are_missing_once(
    make: Make, folder: Path, loaded: list[str]
) -> None:
    how = {"prepare__photos": str(folder), "prepare__captioner": str(once("blip", blip))}
    cfg = make(prepare__captions="auto", **how)
    out = prepare(cfg)
    first = texts(folder)
    assert first["1"] == "mine" and first.keys() == {"0", "1", "2"}
    assert first["0"].startswith("a photo of a sks dog ") and first["0"].endswith("\n")
    assert first["0"] != first["2"], "each is of its own photo"
    read = [captions(folder / f"{number}.png", False)[0] for number in range(3)]
    assert set(Manifest.read(at(out)).prompts.texts) == {*read, "a photo of a dog"}
    assert len(loaded) == 1
    # Again: nothing is loaded, and nothing changes, also where the files count as the user's own.
    (folder / "2.txt").write_text("edited")
    prepare(cfg)
    prepare(own := make(prepare__captions=True, **how))
    assert texts(folder) == first | {"2": "edited"} and len(loaded) == 1
    for one in (cfg, own):
        Inputs.find(one)  # as `train` checks them
    # A photo that is added is captioned alone, and the same photo gets the same caption.
    draw_photo(folder / "3.png", 3)
    (folder / "0.txt").unlink()
    with pytest.raises(
        ConfigError, match=r"the caption of 0\.png was edited, 3\.png was added; rerun: dbtrain prepare"
    ):
        Inputs.find(cfg)
    prepare(cfg)
    assert texts(folder) == first | {"2": "edited", "3": texts(folder)["3"]} and len(loaded) == 2


def test_a_chat_model_is_asked_about_all_but_the_subject(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    asked: list[str] = []
    generate = Qwen2_5_VLForConditionalGeneration.generate
    words = AutoTokenizer.from_pretrained(model := once("chat", chat))

    def recorded(self: Any, **inputs: Any) -> Any:
        asked.append(words.decode(inputs["input_ids"][0]))
        return generate(self, **inputs)

    monkeypatch.setattr(Qwen2_5_VLForConditionalGeneration, "generate", recorded)
    describe, photo = captioner.describer(str(model)), Image.open(folder / "0.png")
    said = [describe(photo, "ape") for _ in range(2)]
    captioner.describer.cache_clear()
    assert "<|image_pad|><|vision_end|>Describe this photo of an ape in one" in asked[0]
    assert said[0] and said[0] == said[1], "greedy"
    assert "Describe" not in said[0] and "assistant" not in said[0], "the answer alone"


def without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def of_another_kind(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"model_type": "clipseg"}))


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "words": (without_tokenizer, r"cannot read the vocabulary of prepare\.captioner \("),
    "kind": (of_another_kind, r"prepare\.captioner: '.*' is a clipseg, not an image-to-text model"),
    "pickle": (without_weights, r"prepare\.captioner: '.*' has no safetensors, and pickles can run code"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_what_describes_no_photos_is_said(how: str, make: Make, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(once("blip", blip), tmp_path / "broken")
    spoil, words = BROKEN[how]
    spoil(tmp_path / "broken")
    cfg = make(
        prepare__photos=str(folder), prepare__captions="auto", prepare__captioner=str(tmp_path / "broken")
    )
    with pytest.raises(ConfigError, match=words):
        prepare(cfg)
    assert texts(folder) == {"1": "mine"}


def test_captions_need_words_and_no_caption_of_another_program(make: Make, folder: Path) -> None:
    how: dict[str, Any] = {"prepare__photos": str(folder), "prepare__captions": "auto"}
    with pytest.raises(ConfigError, match=r"set subject\.token and subject\.class_word"):
        prepare(make(**how, subject={"token": "sks"}))
    shutil.copy(folder / "2.png", folder / "2.jpg")
    with pytest.raises(ConfigError, match=r"photos .*2\.jpg and 2\.png would both have .*2\.txt; rename one"):
        prepare(make(**how))
    (folder / "2.jpg").unlink()
    (folder / "2.caption").write_text("a dog")
    with pytest.raises(ConfigError, match=r"2\.png has no caption 2\.txt, only 2\.caption; make it"):
        prepare(make(**how))


def test_doctor_names_the_photos_to_caption_and_loads_nothing(
    make: Make, folder: Path, loaded: list[str]
) -> None:
    how: dict[str, Any] = {"prepare__photos": str(folder), "prepare__captions": "auto"}
    found = list(checks.captions(Case(make(**how, prepare__captioner=str(once("blip", blip))))))
    (line,) = [one.what for one in found if one.what.startswith("prepare will write")]
    assert line.endswith("blip: 0.png, 2.png") and line.startswith("prepare will write captions for 2 photos")
    assert all(one.level != "error" for one in found) and not loaded
    found = list(checks.captions(Case(make(**how, prepare__captioner=str(bases.sd() / "unet")))))
    assert [one for one in found if one.level == "error" and "prepare.captioner" in one.what]
    found = list(checks.captions(Case(make(**how, subject={"token": "sks"}))))
    assert found[0].cure.startswith("set subject.token")


def test_a_large_prompt_table_is_said_before_it_is_made(
    make: Make, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "0.txt").write_text("sks dog, red, big")
    (folder / "2.txt").write_text("sks dog")
    cfg = make(prepare__photos=str(folder), prepare__captions=True,
               prepare__caption={"shuffle": True, "variants": 6})  # fmt: skip
    base = Base.find(cfg.model)
    ids = encode.tokenizer(base)(["a dog"] * 4)
    (table,) = encode.prompt_tables(base, [ids], None)
    count = sum(one.nbytes for one in encode.blank_conditions(base, 4, encode.longest(ids)).values())
    assert count + sum(one.nbytes for one in ids.values()) == pytest.approx(len(table), rel=0.05)
    case = Case(cfg)
    case.base = base
    assert list(checks.table(case)) == []
    told: list[str] = []
    monkeypatch.setattr(encode, "LARGE", 1)
    monkeypatch.setattr(verb.console, "warn", told.append)
    (found,) = checks.table(case)
    assert found.level == "warning" and found.cure.startswith("lower prepare.caption.variants")
    prepare(cfg)
    (line,) = told
    assert (
        f"the embeddings of {len(Manifest.read(at(Path(cfg.data.shards))).prompts.texts)} prompts take"
        in line
    )
