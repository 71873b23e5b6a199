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
from dbtrain.models import encoder_plan, sampler, text_encoders
from dbtrain.models.base import Base
from dbtrain.models.text_encoders import LayerByLayer
from dbtrain.runtime import dist, memory, preemption
from dbtrain.runtime.errors import ConfigError, Preempted
from dbtrain.runtime.memory import GIB
from tests import bases
from tests.conftest import thinned

PROMPTS = ["a dog", "a photo of a small dog on the grass"]


def found(name: str) -> Base:
    return Base.find(Model(path=str(bases.OF_FAMILY[name]())))


def limit(base: Base, dtype: torch.dtype, fraction: float = 0.0) -> float:
    """Bytes from the smallest limit (0), all outside the layers and the largest one, to all weights (1)."""
    plans = encoder_plan.plans_of(base, dtype)
    layers = [encoder_plan.size(part) for plan in plans for part in plan.parts]
    first = encoder_plan.size(*(plan.parts[0] for plan in plans))
    least = encoder_plan.size(*(plan.rest for plan in plans)) + max(first, *layers)
    return least + fraction * (encoder_plan.to_read(plans) - least)


def table(base: Base, dtype: torch.dtype, most: float) -> dict[str, Tensor]:
    words = {encoder: base.load(name) for encoder, name in base.family.text_encoders.items()}
    ids = {name: ids.to(dist.device()) for name, ids in base.family.tokenize(words, PROMPTS).items()}
    with torch.no_grad():
        return text_encoders.encoded(
            base, dtype, most / GIB, lambda encoders: partial(base.family.embed, encoders, ids)
        )


EACH = [
    *((name, torch.float32) for name in bases.OF_FAMILY),
    *((name, torch.bfloat16) for name in ("flux2-dev", "qwen-image", "flux1", "sd3")),
    ("deepfloyd", torch.float16),
]


@pytest.mark.parametrize(("name", "dtype"), thinned(EACH, 4), ids=str)
def test_layer_by_layer_is_whole_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    """With and without room to read ahead. T5 keeps some weights in fp32 beside fp16."""
    base = found(name)
    whole = table(base, dtype, GIB)
    most = limit(base, dtype, 0.15 if dtype == torch.bfloat16 else 0.4)
    assert most < sum(encoder_plan.sizes(base, dtype).values())
    parts = table(base, dtype, most)
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[key], whole[key]) for key in whole)


@pytest.mark.parametrize(("name", "dtype"), EACH, ids=str)
def test_parameters_and_buffers_are_those_that_transformers_loads(name: str, dtype: torch.dtype) -> None:
    base = found(name)
    for plan in encoder_plan.plans_of(base, dtype):
        loaded = base.load(plan.name, dtype)
        theirs = {key: (value.shape, value.dtype) for key, value in loaded.named_parameters()}
        assert {weight.name: (weight.shape, weight.dtype) for weight in plan.weights} == theirs
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
            self.names.append(f"{encoder} {weight.name}")
            self.bytes += made.nbytes
            self.live += made.nbytes
            self.peak = max(self.peak, self.live)
            return made

        put = encoder_plan.Weight.put

        def replaced(weight: Any, new: Tensor) -> None:
            owner, name = weight.owners[0]
            self.live -= owner._parameters[name].nbytes if not owner._parameters[name].is_meta else 0
            put(weight, new)

        monkeypatch.setattr(LayerByLayer, "_tensor", tensor)
        monkeypatch.setattr(encoder_plan.Weight, "put", replaced)


@pytest.mark.parametrize("fraction", [0.0, 0.4])
@pytest.mark.parametrize("name", ["flux2-dev", "flux1", "qwen-image"])
def test_each_weight_is_read_once_and_the_limit_holds(
    monkeypatch: pytest.MonkeyPatch, name: str, fraction: float
) -> None:
    base, dtype = found(name), torch.bfloat16
    most = limit(base, dtype, fraction)
    counted = Counted(monkeypatch)
    table(base, dtype, most)
    plans = encoder_plan.plans_of(base, dtype)
    assert len(set(counted.names)) == len(counted.names)
    assert not any(word in one for one in counted.names for word in ("visual", "vision", "lm_head"))
    assert counted.bytes == encoder_plan.to_read(plans)
    assert counted.peak == encoder_plan.peak(plans, most) <= most
    assert counted.live == 0, "nothing stays behind"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts the memory of a GPU")
def test_a_gpu_holds_no_more_than_the_limit() -> None:
    base, dtype = found("flux2-dev"), torch.bfloat16
    peaks = []
    for most in (limit(base, dtype), GIB):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        table(base, dtype, most)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] - peaks[0] > 0.5 * sum(encoder_plan.sizes(base, dtype).values())


def test_a_stop_between_two_groups_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(9))

    def check() -> None:
        if next(calls) == 1:
            raise Preempted

    monkeypatch.setattr(preemption, "check", check)
    base = found("z-image")
    with pytest.raises(Preempted):
        table(base, torch.bfloat16, limit(base, torch.bfloat16))


def test_what_layers_returned_is_let_go_of() -> None:
    base, dtype = found("chroma"), torch.bfloat16
    plans = encoder_plan.plans_of(base, dtype)
    engine = LayerByLayer(base, plans, limit(base, dtype))
    ours = [vars(layer)["forward"] for plan in plans for layer in plan.layers]
    assert len(ours) == 2
    engine.run(lambda encoders: lambda: None)
    assert not any("forward" in vars(layer) for plan in plans for layer in plan.layers)


def test_layers_that_nothing_reads_stay_on_disk() -> None:
    [plan] = encoder_plan.plans_of(found("krea2"), torch.bfloat16)
    assert (len(plan.layers), len(plan.parts)) == (36, 35), "the last hidden state that is read is the 35th"
    assert len(plan.kept) == 12


def test_a_limit_below_the_largest_part_is_refused_with_the_smallest_that_works() -> None:
    base, dtype = found("qwen-image"), torch.bfloat16
    needed = limit(base, dtype)
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
        table(base, torch.bfloat16, limit(base, torch.bfloat16))


@pytest.mark.parametrize("name", ["flux1", "flux2-dev", "qwen-image", "z-image"])
def test_pipelines_encode_alike_layer_by_layer(name: str) -> None:
    """As for validation images and class images, with a negative prompt where the family has one."""
    base, dtype = found(name), torch.float32
    whole, parts = (
        sampler.encode_alone(base, PROMPTS, 3.0, dtype, most / GIB) for most in (GIB, limit(base, dtype, 0.3))
    )
    assert [row.keys() for row in parts] == [row.keys() for row in whole]
    assert all(
        torch.equal(one[key], other[key]) for one, other in zip(parts, whole, strict=True) for key in one
    )


def test_prompts_of_one_length_hold_t5_s_position_bias_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    real = text_encoders._Run.hold
    monkeypatch.setattr(
        text_encoders._Run, "hold", lambda run, call, out: kept.append(real(run, call, out)) or kept[-1]
    )
    base = found("chroma")
    table(base, torch.bfloat16, limit(base, torch.bfloat16))
    assert [type(one) for one in kept] == [tuple] * 4 and kept[0][1].shape == (1, 4, 512, 512)
    assert kept[0][1] is kept[1][1] and kept[0][0] is not kept[1][0]


@pytest.mark.parametrize(
    ("gib", "card", "whole", "layers"),
    [
        (4.0, None, 4 * GIB, 4 * GIB),
        (4.0, 24 * GIB, 4 * GIB, 4 * GIB),
        (None, None, 8 * GIB, 8 * GIB),
        (None, 24 * GIB, 8 * GIB, 19.2 * GIB),  # whole encoders pass through RAM, layers do not
        (None, 5 * GIB, 4 * GIB, 4 * GIB),
    ],
)
def test_the_room_for_weights(
    monkeypatch: pytest.MonkeyPatch, gib: float | None, card: float | None, whole: float, layers: float
) -> None:
    monkeypatch.setattr(memory, "free", lambda: 20 * GIB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    room = encoder_plan.Room.here(gib, card)
    assert (room.whole, room.layers) == (pytest.approx(whole), pytest.approx(layers))


def test_weights_that_the_files_have_apart_are_not_shared(tmp_path: Path) -> None:
    """T5's embedding, which files may have under both of its names."""
    folder = shutil.copytree(bases.chroma(), tmp_path / "base")
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].flip(0)
    save_file(tensors, path, {"format": "pt"})
    base, dtype = Base.find(Model(path=str(folder))), torch.bfloat16
    whole, parts = (table(base, dtype, most) for most in (GIB, limit(base, dtype)))
    assert torch.equal(whole["prompt_embeds"], parts["prompt_embeds"])
