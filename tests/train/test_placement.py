"""Where frozen weights live: sizes counted by hand, and as fully_shard and block swap have them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dbtrain.models import block_swap, quantization
from dbtrain.train.memory import Prediction
from dbtrain.train.memory_counter import MemoryCounter
from dbtrain.train.placement import Weights


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(64), nn.Linear(64, 66, bias=False)
        self.adapter = nn.Linear(64, 4)


class Denoiser(nn.Module):
    _repeated_blocks = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 64)
        self.blocks = nn.ModuleList(Block() for _ in range(5))
        for block in self.blocks:
            block.norm.requires_grad_(False)
            block.inner.requires_grad_(False)
        self.first.requires_grad_(False)


MATRIX, ROOT = 66 * 64 * 4, 64 * 8 * 4  # bytes in fp32
WHOLE = 5 * MATRIX + ROOT


def prediction(weights: Weights) -> Prediction:
    return Prediction(weights.size, 0, 0, 10**6, 0, weights=weights)


def test_trained_weights_are_not_counted_and_vectors_are_not_shared() -> None:
    weights = Weights.of(Denoiser())
    assert weights.held(1) == WHOLE
    assert weights.blocks == (MATRIX + 2 * 512,) * 5, "a norm's two vectors take 512 bytes each"
    assert weights.size == sum(weights.blocks) + ROOT + 512
    assert Weights.of(Denoiser().to("meta")) == weights


@pytest.mark.parametrize(("ranks", "rows"), [(2, 66), (4, 68), (8, 72)])
def test_each_rank_holds_padded_rows_and_gathers_two_blocks_and_the_root(ranks: int, rows: int) -> None:
    weights, padded = Weights.of(Denoiser()), rows * 64 * 4
    assert weights.held(ranks) == (5 * padded + ROOT) / ranks
    assert weights.gathered(ranks) == 2 * padded + ROOT
    assert weights.received(ranks) == (2 * 5 * padded + ROOT) * (ranks - 1) / ranks
    found = prediction(weights).sharded(ranks)
    assert found.peak == prediction(weights).peak - WHOLE + weights.held(ranks) + weights.gathered(ranks)
    assert prediction(weights).sharded(1) == prediction(weights)


def test_swapped_blocks_take_two_buffers() -> None:
    weights = Weights.of(Denoiser())
    found = prediction(weights).swapped(4)
    assert prediction(weights).peak - found.peak == block_swap.saved_bytes(weights.blocks, 4) > 0
    assert found.in_host_memory == 4 * weights.blocks[0]


@pytest.mark.parametrize(("storage", "codes", "decoded"), [("int8", 64 + 4, 4), ("nf4", 32 + 4 + 1, 4 + 2)])
def test_quantized_weights_are_counted_with_what_a_product_decodes(
    storage: str, codes: int, decoded: int
) -> None:
    denoiser = Denoiser()
    full = Weights.of(denoiser)
    quantization.quantize(denoiser, storage)
    weights = Weights.of(denoiser)
    assert sum(rows * size for rows, size in weights.matrices[0]) == 66 * codes
    assert weights.quantized == 5 * 66 * 64 and weights.decoded == 66 * 64 * decoded
    found, plain = prediction(full).stored(weights), prediction(full)
    assert plain.base - found.base == full.size - weights.size > 0
    assert found.activations == plain.activations + weights.decoded


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_a_product_takes_what_is_counted_for_it(storage: str) -> None:
    """Seen while a real one runs, forward and backward, beside the stored weight."""
    layer = nn.Sequential(nn.Linear(256, 512, bias=False)).requires_grad_(False)
    quantization.quantize(layer, storage)
    weights, x = Weights.of(layer), torch.randn(4, 256, requires_grad=True)
    with MemoryCounter() as counter:
        layer(x).sum().backward()
    assert counter.peak == pytest.approx(weights.size + weights.decoded, rel=0.1)
