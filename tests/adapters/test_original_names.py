"""Files in the names of a transformer's original code: what Diffusers' converters read in them, we do too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import lora_conversion_utils as converters
from diffusers.loaders import single_file_utils as converters_of_models
from safetensors.torch import save_file
from torch import Tensor, nn

from dbtrain.adapters.formats import registry as formats
from dbtrain.adapters.formats.common import States, by_module, strength
from dbtrain.config import Model
from dbtrain.models.base import Base
from dbtrain.models.families import registry as families
from dbtrain.runtime.errors import ConfigError
from tests import bases

RANK, ALPHA, WIDTH = 8, 3.0, 3072  # the width that Diffusers' converter takes FLUX.1 to have


def skeleton(component: str) -> nn.Module:
    """FLUX.1 dev with one block of each kind."""
    if component != "transformer":
        return Base.find(Model(path=str(bases.flux1()))).skeleton(component)
    with torch.device("meta"):
        return diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)


# Layers of the original FLUX.1: outputs, inputs, and how many layers of ours each is.
STREAM = {
    "attn.qkv": (3 * WIDTH, WIDTH, 3), "attn.proj": (WIDTH, WIDTH, 1), "mlp.0": (4 * WIDTH, WIDTH, 1),
    "mlp.2": (WIDTH, 4 * WIDTH, 1), "mod.lin": (6 * WIDTH, WIDTH, 1),
}  # fmt: skip
LAYERS = {
    **{f"double_blocks.0.{side}_{name}": size for side in ("img", "txt") for name, size in STREAM.items()},
    "single_blocks.0.linear1": (7 * WIDTH, WIDTH, 4), "single_blocks.0.linear2": (WIDTH, 5 * WIDTH, 1),
    "single_blocks.0.modulation.lin": (3 * WIDTH, WIDTH, 1), "img_in": (WIDTH, 64, 1),
    "txt_in": (WIDTH, 4096, 1), "final_layer.linear": (64, WIDTH, 1),
    **{f"{name}_in.in_layer": (WIDTH, width, 1)
       for name, width in (("time", 256), ("guidance", 256), ("vector", 768))},
    **{f"{name}_in.out_layer": (WIDTH, WIDTH, 1) for name in ("time", "guidance", "vector")},
}  # fmt: skip


def lora(outputs: int, inputs: int, parts: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Random factors; with `parts`, block-diagonal in these outputs."""
    down, up = torch.randn(RANK, inputs), torch.randn(outputs, RANK)
    if parts:
        rank = RANK // len(parts)
        masks = [torch.ones(size, rank) for size in parts]
        up = up[:, : rank * len(parts)] * torch.block_diag(*masks)
        down = down[: rank * len(parts)]
    return down, up


def kohya(joined: bool) -> dict[str, Tensor]:
    """Every layer as sd-scripts writes it. `joined`: queries, keys and values were trained apart."""
    tensors = {}
    for name, (outputs, inputs, parts) in LAYERS.items():
        sizes = (WIDTH,) * min(parts, 3) + (4 * WIDTH,) * (parts == 4)
        down, up = lora(outputs, inputs, sizes if joined and parts > 1 else ())
        layer = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
        if name != "final_layer.linear":  # whose alpha Diffusers drops
            tensors[f"{layer}.alpha"] = torch.tensor(ALPHA)
    return tensors


def read(tensors: Mapping[str, Tensor], folder: Path, family: str = "flux1", base: Any = skeleton) -> States:
    save_file(dict(tensors), folder / "it.safetensors")
    return formats.read(folder / "it.safetensors", families.get(family), base)


def images(layers: Mapping[str, Mapping[str, Tensor]], scale: Callable[[str], float]) -> dict[str, Tensor]:
    """Where each layer's update takes one vector."""
    found = {}
    for module, layer in layers.items():
        x = torch.randn(layer["lora_A.weight"].shape[1], generator=torch.Generator().manual_seed(0))
        found[module] = layer["lora_B.weight"] @ (layer["lora_A.weight"] @ x) * scale(module)
    return found


def ours(states: States) -> dict[str, Tensor]:
    (state,) = states.values()
    return images(by_module(state), lambda module: strength(state.config, module)[1])


def theirs(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What Diffusers' converter makes of a file."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in converters._convert_kohya_flux_lora_to_diffusers(dict(tensors)).items():
        module, _, part = key.removeprefix("transformer.").partition(".lora_")
        layers.setdefault(module, {})[f"lora_{part}"] = tensor
    return images(layers, lambda module: 1.0)


@pytest.mark.parametrize("joined", [False, True])
def test_kohya_s_file_for_flux_1_is_read_as_diffusers_does(tmp_path: Path, joined: bool) -> None:
    torch.manual_seed(0)
    tensors = kohya(joined)
    mine, other = ours(read(tensors, tmp_path)), theirs(tensors)
    assert mine.keys() == other.keys() and len(mine) == 14 + 6 + 9
    for module, value in other.items():
        assert (mine[module] - value).abs().max() <= 1e-4 * value.abs().max(), module


@pytest.mark.parametrize(
    "spelled",
    [
        lambda module: f"transformer.{module}",
        lambda module: f"lora_transformer_{module.replace('.', '_')}",
        lambda module: f"lycoris_{module.replace('.', '_')}",
    ],
    ids=["ai-toolkit", "OneTrainer", "SimpleTuner"],
)
def test_other_trainers_keys_for_flux_1_are_read(tmp_path: Path, spelled: Callable[[str], str]) -> None:
    modules = {
        "transformer_blocks.0.attn.to_out.0": (1, 1), "transformer_blocks.0.ff_context.net.2": (1, 4),
        "single_transformer_blocks.0.attn.to_q": (1, 1), "single_transformer_blocks.0.proj_out": (1, 5),
    }  # fmt: skip
    tensors: dict[str, Any] = {}
    for module, (outputs, inputs) in modules.items():
        down, up = lora(outputs * WIDTH, inputs * WIDTH)
        tensors |= {f"{spelled(module)}.lora_A.weight": down, f"{spelled(module)}.lora_B.weight": up}
    (state,) = read(tensors, tmp_path).values()
    assert by_module(state).keys() == modules.keys()


@pytest.mark.parametrize(("family", "make", "clips"), [("flux1", bases.flux1, 1), ("sd3", bases.sd3, 2)])
def test_clips_in_kohya_s_file_are_read(
    tmp_path: Path, family: str, make: Callable[[], Path], clips: int
) -> None:
    tensors: dict[str, Tensor] = {}
    for number in range(1, clips + 1):
        down, up = lora(128, 64)
        layer = f"lora_te{number}_text_model_encoder_layers_0_mlp_fc1"
        tensors |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
    states = read(tensors, tmp_path, family, Base.find(Model(path=str(make()))).skeleton)
    assert list(states) == ["text_encoder", "text_encoder_2"][:clips]
    for state in states.values():
        assert [name.endswith("layers.0.mlp.fc1") for name in by_module(state)] == [True]


def test_a_layer_is_read_alone_though_others_end_with_its_name(tmp_path: Path) -> None:
    """FLUX.1's last layer is called `proj_out`, as one of each single block."""
    down, up = lora(64, WIDTH)
    layer = "lora_unet_final_layer_linear"
    (state,) = read({f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}, tmp_path).values()
    assert by_module(state).keys() == {"proj_out"}


def test_a_layer_that_flux_1_lacks_is_named(tmp_path: Path) -> None:
    down, up = lora(WIDTH, WIDTH)
    layer = "lora_unet_double_blocks_1_img_attn_proj"
    with pytest.raises(ConfigError, match=f"the base has no module for its layer {layer}"):
        read({f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}, tmp_path)


# The original SD 3.5 of `bases.sd3`: outputs and inputs in its width, and the blocks that have the layer.
SD_3_WIDTH = 32
SD_3 = {
    "x_block.attn.qkv": (3, 1, (0, 1)), "x_block.attn.proj": (1, 1, (0, 1)),
    "x_block.attn2.qkv": (3, 1, (0,)), "x_block.attn2.proj": (1, 1, (0,)),
    "x_block.mlp.fc1": (4, 1, (0, 1)), "x_block.mlp.fc2": (1, 4, (0, 1)),
    "x_block.adaLN_modulation.1": (9, 1, (0,)), "context_block.attn.qkv": (3, 1, (0, 1)),
    "context_block.attn.proj": (1, 1, (0,)), "context_block.mlp.fc1": (4, 1, (0,)),
    "context_block.mlp.fc2": (1, 4, (0,)),
}  # fmt: skip
SD_3_LAYERS = {
    **{f"joint_blocks.{number}.{name}": (outputs, inputs)
       for name, (outputs, inputs, numbers) in SD_3.items() for number in numbers},
    # Modulations of norms: in the last block, and after it, of a shift and a scale.
    "joint_blocks.0.context_block.adaLN_modulation.1": (6, 1),
    "joint_blocks.1.context_block.adaLN_modulation.1": (2, 1), "final_layer.adaLN_modulation.1": (2, 1),
    "final_layer.linear": (2, 1), "t_embedder.mlp.0": (1, 8), "t_embedder.mlp.2": (1, 1),
    "y_embedder.mlp.0": (1, 4), "y_embedder.mlp.2": (1, 1),
}  # fmt: skip


class Checkpoint(dict[str, Tensor]):
    """Weights in which every other name is there too, as zeros."""

    def pop(self, key: str, *default: Any) -> Any:
        return super().pop(key, torch.zeros(6, 1))


def test_kohya_s_file_for_sd_3_is_read_as_diffusers_splits_a_checkpoint(tmp_path: Path) -> None:
    """Diffusers' loader of adapters does not know these names, but its converter of whole models does."""
    torch.manual_seed(0)
    base = Base.find(Model(path=str(bases.sd3())))
    weights, tensors = Checkpoint({"context_embedder.weight": torch.zeros(SD_3_WIDTH, 1)}), {}
    for layer, (outputs, inputs) in SD_3_LAYERS.items():
        down, up = lora(outputs * SD_3_WIDTH, inputs * SD_3_WIDTH)
        weights[f"{layer}.weight"] = up @ down
        flat = f"lora_unet_{layer.replace('.', '_')}"
        tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
    split = converters_of_models.convert_sd3_transformer_checkpoint_to_diffusers(weights)
    (state,) = read(tensors, tmp_path, "sd3", base.skeleton).values()
    found = by_module(state)
    assert len(found) == 2 * 4 + 4 + 2 * 2 + 1 + 2 * 3 + 1 + 2 + 8
    for module, layer in found.items():
        torch.testing.assert_close(layer["lora_B.weight"] @ layer["lora_A.weight"], split[f"{module}.weight"])
