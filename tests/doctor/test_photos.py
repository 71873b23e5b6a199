"""What doctor takes for the subject's word, how long texts may be, and how it bounds its memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dbtrain.config import Model, Prepare, Subject
from dbtrain.doctor.captions import too_long, without_token
from dbtrain.doctor.photos import _workers
from dbtrain.doctor.settings import token_of
from dbtrain.models.base import Base
from tests import bases


@pytest.mark.parametrize(
    ("prompt", "of_class", "want"),
    [
        ("a photo of sks dog", "a photo of a dog", {"sks"}),
        ("a photo of olis mug, on a table", "a mug", {"olis", "table"}),
        ("a photo of sks dog", None, {"sks"}),
        ("SKS, a dog", None, {"sks"}),
        ("a dog", "a dog", set()),
    ],
)
def test_the_subject_s_word_is_what_the_class_prompt_lacks(
    prompt: str, of_class: str | None, want: set[str]
) -> None:
    cfg = Prepare(photos="p", instance_prompt=prompt, class_prompt=of_class)
    assert token_of(Subject(), cfg) == want
    assert token_of(Subject(token="zwx"), cfg) == {"zwx"}, "what the config says counts"
    texts = {"a.png": [f"{prompt} outside"], "b.png": ["a big dog with a mug"]}
    assert without_token(texts, want) == (["b.png"] if want else [])


def test_the_largest_photos_are_opened_one_at_a_time(tmp_path: Path) -> None:
    Image.new("1", (16384, 16384)).save(tmp_path / "huge.png")
    Image.new("1", (64, 64)).save(tmp_path / "small.png")
    (tmp_path / "broken.png").write_bytes(b"")
    small, broken, huge = (tmp_path / f"{name}.png" for name in ("small", "broken", "huge"))
    assert _workers([small, broken, huge]) == 1
    assert _workers([broken]) == _workers([small, broken]) >= 1


@pytest.mark.parametrize("base", [bases.sd, bases.sdxl, bases.if_1])
def test_every_family_s_text_encoders_say_what_they_read(base: Callable[[], Path]) -> None:
    model = Base.find(Model(path=str(base())))
    texts = {"short": "a photo of sks dog on a table", "long": "a photo of sks dog " + "and a cat " * 40}
    (found,) = too_long(texts, model)
    assert "long (" in found.what and "short" not in found.what


@pytest.mark.parametrize("name", ["flux2-klein", "z-image", "qwen-image", "krea2"])
def test_prompts_that_prepare_refuses_are_errors(name: str) -> None:
    model = Base.find(Model(path=str(bases.FLOW[name]())))
    texts = {
        "usual": "a photo of sks dog on a table, with a cat beside it, and two dogs",
        "long": "dog " * 600,
    }
    (found,) = too_long(texts, model)
    assert found.level == "error" and "has 6" in found.what and "dog dog" in found.what
