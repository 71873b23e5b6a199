"""Blocks, by what a model's class says: the same for UNets and transformers; and what `regional` compiles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import nn
from torch._inductor.runtime import cache_dir_utils

from dbtrain.adapters import inject
from dbtrain.config import AdapterSettings, Model
from dbtrain.models import kernels
from dbtrain.models.base import Base
from dbtrain.models.blocks import blocks
from dbtrain.runtime.errors import ConfigError
from tests import bases


def flux() -> nn.Module:
    return FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def sd3() -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64,
    )  # fmt: skip


def unet(base: Callable[[], object]) -> Callable[[], nn.Module]:
    return lambda: Base.find(Model(path=str(base()))).load("unet")


UNET = {"BasicTransformerBlock": 4, "ResnetBlock2D": 8}
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "sd": (unet(partial(bases.sd, size="whole")), UNET),
    "sdxl": (unet(bases.sdxl), UNET),
    "deepfloyd": (unet(bases.if_1), {"ResnetBlock2D": 10}),  # no transformer blocks
    "deepfloyd-2": (unet(bases.if_2), {"ResnetBlock2D": 10}),
    "flux": (flux, {"FluxTransformerBlock": 1, "FluxSingleTransformerBlock": 2}),
    "sd3": (sd3, {"JointTransformerBlock": 2}),  # lists no `_repeated_blocks`
}


@pytest.mark.parametrize(("model", "expected"), MODELS.values(), ids=MODELS)
def test_blocks_are_the_innermost_that_the_class_names(
    model: Callable[[], nn.Module], expected: dict[str, int]
) -> None:
    found = blocks(model())
    assert Counter(type(block).__name__ for block in found) == expected
    assert not any(inner in found for block in found for inner in list(block.modules())[1:])


@pytest.mark.parametrize("model", [model for model, _ in MODELS.values()], ids=MODELS)
def test_regional_compiles_them_in_place_and_nothing_else(model: Callable[[], nn.Module]) -> None:
    module = model()
    names, found = list(module.state_dict()), blocks(module)
    kernels.compile_module(module, "regional", backend="eager")
    assert [one for one in module.modules() if one._compiled_call_impl is not None] == found
    assert list(module.state_dict()) == names


def test_compiled_code_is_cached_where_it_lasts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Torch has chosen its temporary folder by then, as PEFT has imported its compiler."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for given, cache in (("", tmp_path / "dbtrain" / "inductor"), (str(tmp_path / "own"), tmp_path / "own")):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", given or cache_dir_utils.default_cache_dir())
        kernels.compile_module(nn.Linear(2, 2), True, backend="eager")
        assert cache_dir_utils.cache_dir() == str(cache)


def test_an_adapter_leaves_the_blocks_as_they_are() -> None:
    module = unet(bases.sd)()
    before = blocks(module)
    inject.attach(module, AdapterSettings(rank=2), "denoiser", 0)
    assert blocks(module) == before


def test_a_model_without_blocks_cannot_be_compiled_by_them() -> None:
    assert blocks(nn.Linear(2, 2)) == []
    with pytest.raises(ConfigError, match=r"train\.compile is 'regional', but Linear has no blocks"):
        kernels.compile_module(nn.Linear(2, 2), "regional")
