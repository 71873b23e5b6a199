"""Layers that are one in a model's original code: joined, split again, and trained as one."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from dbtrain.adapters.formats import comfyui_file, fused
from dbtrain.adapters.state import MAGNITUDE, AdapterState
from dbtrain.models.families import flux2
from dbtrain.runtime.errors import ConfigError

SIZES, WIDTH = (4, 4, 6), 5


def lora(size: int, rank: int) -> dict[str, Tensor]:
    return {"lora_A.weight": torch.randn(rank, WIDTH), "lora_B.weight": torch.randn(size, rank),
            MAGNITUDE: torch.rand(size)}  # fmt: skip


def loha(size: int, rank: int) -> dict[str, Tensor]:
    return {f"hada_w{number}_{side}": torch.randn(*shape) for number in (1, 2)
            for side, shape in (("a", (size, rank)), ("b", (rank, WIDTH)))}  # fmt: skip


def delta(layer: dict[str, Tensor]) -> Tensor:
    """The change of a layer's weight, without its scale."""
    if "lora_A.weight" in layer:
        return layer["lora_B.weight"] @ layer["lora_A.weight"]
    if "hada_w1_a" in layer:
        return (layer["hada_w1_a"] @ layer["hada_w1_b"]) * (layer["hada_w2_a"] @ layer["hada_w2_b"])
    return torch.kron(layer["lokr_w1"], layer["lokr_w2"])


@pytest.mark.parametrize("make", [lora, loha])
@pytest.mark.parametrize("ranks", [(2, 2, 2), (2, 0, 2), (0, 3, 0), (1, 2, 3)], ids=str)
def test_joined_layers_change_what_each_did_and_come_apart_again(make, ranks) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    layers = [make(size, rank) if rank else {} for size, rank in zip(SIZES, ranks, strict=True)]
    joined = fused.join(layers, SIZES)
    whole = [
        delta(layer) if layer else torch.zeros(size, WIDTH) for layer, size in zip(layers, SIZES, strict=True)
    ]
    torch.testing.assert_close(delta(joined), torch.cat(whole))
    parts = fused.split("qkv", joined, SIZES)
    for mine, theirs in zip(layers, parts, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def test_joined_layers_keep_their_dtype() -> None:
    layers = [{name: tensor.bfloat16() for name, tensor in lora(size, 2).items()} for size in SIZES[:2]]
    assert {tensor.dtype for tensor in fused.join([*layers, {}], SIZES).values()} == {torch.bfloat16}


def test_an_untrained_adapter_keeps_its_ranks() -> None:
    """Its up projection is zero."""
    layers = [lora(size, 2) | {"lora_B.weight": torch.zeros(size, 2)} for size in SIZES]
    assert [
        part["lora_A.weight"].shape[0] for part in fused.split("qkv", fused.join(layers, SIZES), SIZES)
    ] == [2] * 3


@pytest.mark.parametrize("make", [lora, loha])
def test_what_was_trained_as_one_layer_is_split_by_its_outputs(make) -> None:  # type: ignore[no-untyped-def]
    one = make(sum(SIZES), 3) | {"alpha": torch.tensor(6.0)}
    parts = fused.split("qkv", one, SIZES)
    assert torch.allclose(torch.cat([delta(part) for part in parts]), delta(one))
    assert all(part["alpha"] == 6.0 for part in parts), "of as many ranks"


def test_the_alpha_of_a_joined_layer_is_shared_by_rank() -> None:
    joined = fused.join([lora(size, 2) for size in SIZES], SIZES) | {"alpha": torch.tensor(12.0)}
    parts = fused.split("qkv", joined, SIZES)
    assert [(part["alpha"].item(), part["lora_A.weight"].shape[0]) for part in parts] == [(4.0, 2)] * 3


def test_lokr_comes_apart_by_the_rows_of_its_left_factor_or_is_refused() -> None:
    one = {"lokr_w1": torch.randn(6, 1), "lokr_w2": torch.randn(2, WIDTH)}
    parts = fused.split("qkv", one, (4, 4, 4))
    assert torch.equal(torch.cat([delta(part) for part in parts]), delta(one))
    with pytest.raises(ConfigError, match="its LoKr layer qkv holds 3 layers of the base"):
        fused.split("qkv", {"lokr_w1": torch.randn(4, 1), "lokr_w2": torch.randn(3, WIDTH)}, (4, 4, 4))


@pytest.mark.parametrize(
    ("config", "parts", "told"),
    [
        ({"peft_type": "LOKR"}, ("to_q", "to_k", "to_v"), "a lokr adapter of transformer_blocks.0.attn.to_q"),
        ({"peft_type": "LOKR"}, ("to_q",), "a lokr adapter of transformer_blocks.0.attn.to_q"),
        ({"peft_type": "LOKR"}, ("to_out.0",), None),
        ({"peft_type": "LORA", "use_dora": True}, ("to_q", "to_v"), "a DoRA adapter of .*to_q without"),
        ({"peft_type": "LORA", "use_dora": True}, ("to_q", "to_k", "to_v"), None),
        ({"peft_type": "LORA"}, ("to_q", "to_v"), None),
    ],
)
def test_what_cannot_be_joined_is_refused(config: dict, parts: tuple[str, ...], told: str | None) -> None:
    tensors = {f"transformer_blocks.0.attn.{part}.lora_A.weight": torch.ones(1) for part in parts}
    said = comfyui_file.refuses(flux2.KLEIN, {"transformer": AdapterState(tensors, config)})
    if told is None:
        assert said is None
    else:
        assert said and re.match(told, said)
