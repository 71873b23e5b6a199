"""Text encoders within a limit of memory: the whole model's bits, each weight read once, nothing beyond."""

from __future__ import annotations

import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dbtrain.config import Model
from dbtrain.models import layer_by_layer, sampler, text_encoders
from dbtrain.models.base import Base
from dbtrain.models.layer_by_layer import LayerByLayer
from dbtrain.models.text_encoders import GIB
from dbtrain.runtime.errors import ConfigError
from tests import bases

PROMPTS = ["a dog", "a photo of a small dog on the grass"]


def found(name: str) -> Base:
    return Base.find(Model(path=str(bases.OF_FAMILY[name]())))


def least(base: Base, dtype: torch.dtype) -> int:
    """The smallest limit, bytes: what is outside the layers, and the largest layer."""
    plans = text_encoders.plans_of(base, dtype)
    first = text_encoders.size(*(plan.parts[0] for plan in plans))
    layers = [text_encoders.size(part) for plan in plans for part in plan.parts]
    return text_encoders.size(*(plan.rest for plan in plans)) + max(first, *layers)


def table(base: Base, dtype: torch.dtype, limit: float) -> dict[str, Tensor]:
    words = {encoder: base.load(name) for encoder, name in base.family.text_encoders.items()}
    ids = base.family.tokenize(words, PROMPTS)
    with torch.no_grad():
        return text_encoders.encoded(
            base, dtype, limit / GIB, lambda encoders: partial(base.family.embed, encoders, ids)
        )


EACH = [(name, dtype) for name in bases.OF_FAMILY for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(("name", "dtype"), [*EACH, ("deepfloyd", torch.float16)], ids=str)
def test_layer_by_layer_is_whole_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    """With room for a layer (bf16), and for two, so that one is read ahead (fp32). T5 keeps some weights in fp32 beside fp16."""
    base = found(name)
    whole = table(base, dtype, GIB)
    parts = table(base, dtype, (1.0 if dtype == torch.bfloat16 else 2.0) * least(base, dtype))
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[key], whole[key]) for key in whole)


@pytest.mark.parametrize(("name", "dtype"), [*EACH, ("deepfloyd", torch.float16)], ids=str)
def test_parameters_and_buffers_are_those_that_transformers_loads(name: str, dtype: torch.dtype) -> None:
    base = found(name)
    for plan in text_encoders.plans_of(base, dtype):
        loaded = base.load(plan.name, dtype)
        theirs = {key: (value.shape, value.dtype) for key, value in loaded.named_parameters()}
        assert {weight.names[0]: (weight.shape, weight.dtype) for weight in plan.weights} == theirs
        buffers = dict(loaded.named_buffers())
        ours = dict(plan.module.named_buffers())
        assert ours.keys() == buffers.keys()
        assert all(torch.equal(ours[key], buffers[key]) for key in buffers)
        assert all(ours[key].dtype == buffers[key].dtype for key in buffers)


class Counted:
    """What is read of the weights, and how many of their bytes are held at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.bytes = self.live = self.peak = 0
        real = LayerByLayer._tensor

        def tensor(engine: LayerByLayer, encoder: str, weight: Any) -> Tensor:
            made = real(engine, encoder, weight)
            self.names.append(f"{encoder} {weight.names[0]}")
            self.bytes += made.nbytes
            self.live += made.nbytes
            self.peak = max(self.peak, self.live)
            return made

        put = text_encoders.Weight.put

        def replaced(weight: Any, new: Tensor) -> None:
            owner, name = weight.owners[0]
            self.live -= owner._parameters[name].nbytes if not owner._parameters[name].is_meta else 0
            put(weight, new)

        monkeypatch.setattr(LayerByLayer, "_tensor", tensor)
        monkeypatch.setattr(text_encoders.Weight, "put", replaced)


@pytest.mark.parametrize("share", [1.0, 1.7])
@pytest.mark.parametrize("name", ["flux2-dev", "flux1", "qwen-image"])
def test_each_weight_is_read_once_and_the_limit_holds(
    monkeypatch: pytest.MonkeyPatch, name: str, share: float
) -> None:
    base, dtype = found(name), torch.bfloat16
    limit = share * least(base, dtype)
    counted = Counted(monkeypatch)
    table(base, dtype, limit)
    plans = text_encoders.plans_of(base, dtype)
    assert len(set(counted.names)) == len(counted.names)
    assert not any(word in one for one in counted.names for word in ("visual", "vision", "lm_head"))
    assert counted.bytes == text_encoders.to_read(plans)
    assert counted.peak == text_encoders.peak(plans, limit) <= limit
    assert counted.live == text_encoders.size(*(plan.rest for plan in plans))


def test_layers_that_nothing_reads_stay_on_disk() -> None:
    [plan] = text_encoders.plans_of(found("krea2"), torch.bfloat16)
    assert (len(plan.layers), len(plan.parts)) == (36, 35), "the last hidden state that is read is the 35th"
    assert len(plan.kept) == 12


def test_a_limit_below_the_largest_part_is_refused_with_the_smallest_that_works() -> None:
    base, dtype = found("qwen-image"), torch.bfloat16
    needed = least(base, dtype)
    with pytest.raises(ConfigError) as caught:
        table(base, dtype, needed - 1)
    assert "\n" not in str(caught.value)
    named = re.search(r"set prepare.memory_gib to ([\d.]+) or more", str(caught.value))
    assert named and 0 <= float(named[1]) * GIB - needed <= 0.01 * GIB


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    folder = shutil.copytree(bases.flux2_dev(), tmp_path / "base")
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    gone = next(name for name in tensors if ".layers.3." in name)
    del tensors[gone]
    save_file(tensors, path, {"format": "pt"})
    base = Base.find(Model(path=str(folder)))
    message = "'text_encoder' of base model .* is incomplete: 1 weights are missing .* e.g. .*layers.3"
    with pytest.raises(ConfigError, match=message):
        table(base, torch.bfloat16, least(base, torch.bfloat16))


@pytest.mark.parametrize("name", ["flux1", "flux2-dev", "qwen-image", "z-image"])
def test_pipelines_encode_alike_layer_by_layer(name: str) -> None:
    """As for validation images and class images, with a negative prompt where the family has one."""
    base, dtype = found(name), torch.float32
    whole, parts = (
        sampler.encode_alone(base, PROMPTS, 3.0, dtype, limit / GIB) for limit in (GIB, least(base, dtype))
    )
    assert [row.keys() for row in parts] == [row.keys() for row in whole]
    assert all(
        torch.equal(one[key], other[key]) for one, other in zip(parts, whole, strict=True) for key in one
    )


def test_prompts_of_one_length_hold_t5_s_position_bias_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    real = layer_by_layer._Run.hold
    monkeypatch.setattr(
        layer_by_layer._Run, "hold", lambda run, call, out: kept.append(real(run, call, out)) or kept[-1]
    )
    base = found("chroma")
    table(base, torch.bfloat16, least(base, torch.bfloat16))
    assert [type(one) for one in kept] == [tuple] * 4 and kept[0][1].shape == (1, 4, 512, 512)
    assert kept[0][1] is kept[1][1] and kept[0][0] is not kept[1][0]
