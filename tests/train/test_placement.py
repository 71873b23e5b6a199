"""Where frozen weights live: sizes counted by hand, and as fully_shard and block swap have them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dbtrain.models import block_swap, quantization
from dbtrain.models.memory_counter import MemoryCounter
from dbtrain.train.memory import SPARE, Prediction
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


def prediction(weights: Weights) -> Prediction:
    return Prediction(weights.size, 0, 0, 10**6, 0, weights=weights)


def test_trained_weights_are_not_counted_and_vectors_are_not_shared() -> None:
    weights = Weights.of(Denoiser())
    assert weights.saved(1) == 0
    assert weights.saved(2) == 5 * MATRIX / 2
    assert weights.blocks == (MATRIX + 2 * 512,) * 5, "a norm's two vectors take 512 bytes each"
    assert weights.size == sum(weights.blocks) + ROOT + 512
    assert Weights.of(Denoiser().to("meta")) == weights


@pytest.mark.parametrize(("ranks", "rows"), [(2, 66), (4, 68), (8, 72)])
def test_each_rank_holds_padded_rows_and_gathers_two_blocks(ranks: int, rows: int) -> None:
    """Of the blocks that it does not keep whole."""
    weights, padded = Weights.of(Denoiser()), rows * 64 * 4
    for kept in (0, 2):
        sharded = 5 - kept
        assert weights.saved(ranks, kept) == sharded * (MATRIX - padded / ranks)
        assert weights.gathered(ranks, kept) == 2 * padded
        assert weights.received(ranks, kept) == 2 * sharded * padded * (ranks - 1) / ranks
        found = prediction(weights).sharded(ranks, kept)
        moved = weights.gathered(ranks, kept) - weights.saved(ranks, kept)
        assert found.peak == prediction(weights).peak + moved
    assert prediction(weights).sharded(ranks, 5).peak == prediction(weights).peak
    assert prediction(weights).sharded(1) == prediction(weights)


@pytest.mark.parametrize(("kept", "fewer"), [(5, 2), (2, 1), (1, 0), (0, 0)])
def test_as_many_blocks_stay_whole_as_leave_a_tenth_of_the_gpu_free(kept: int, fewer: int) -> None:
    """Sharding one or two blocks saves nothing: two are gathered."""
    block = 2**30
    weights = Weights(8 * 5 * block, (8 * block,) * 5, (((8, block),),) * 5)
    step = prediction(weights)
    has = step.sharded(8, kept).needed / (1 - SPARE)
    assert step.blocks_to_keep(has + 1024, 8) == kept
    assert step.blocks_to_keep(has - 1024, 8) == fewer
    assert step.blocks_to_keep(0.0, 8) == 0


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
