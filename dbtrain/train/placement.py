"""Where the denoiser's frozen weights live, in bytes: as they are stored, sharded over ranks, or swapped.

One fake step tells what training takes beside them, wherever they are. This is the arithmetic on top.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from dbtrain.models import block_swap
from dbtrain.models.blocks import blocks
from dbtrain.models.quantization import STORAGE, QuantizedLinear

GATHERED = 2  # blocks: the one at work, and the buffer in which the next one arrives
Part = tuple[tuple[int, int], ...]
"""(rows, bytes of a row) of each matrix."""


@dataclass(frozen=True)
class Weights:
    """Sizes of a denoiser's frozen weights, bytes. The matrices in its blocks are what ranks can share."""

    size: int = 0  # of all
    blocks: tuple[int, ...] = ()  # of each block
    matrices: tuple[Part, ...] = ()  # in each block
    decoded: int = 0  # that the largest quantized weight takes for a product
    quantized: int = 0  # how many weights are decoded

    @classmethod
    def of(cls, denoiser: nn.Module) -> Weights:
        """Those of a denoiser on whatever device, with adapters or without."""
        found = blocks(denoiser)
        linears = [layer for layer in denoiser.modules() if isinstance(layer, QuantizedLinear)]
        counts = [layer.in_features * layer.out_features for layer in linears]
        each = [layer.dtype.itemsize + STORAGE[layer.storage].indices for layer in linears]
        return cls(
            size=block_swap.frozen_bytes(denoiser),
            blocks=tuple(map(block_swap.frozen_bytes, found)),
            matrices=tuple(_part(block.parameters()) for block in found),
            decoded=max((one * count for one, count in zip(each, counts, strict=True)), default=0),
            quantized=sum(counts),
        )

    # With all but `kept` blocks sharded over `ranks`. Rows are padded to a multiple of the ranks.

    def saved(self, ranks: int, kept: int = 0) -> int:
        """Bytes that each rank does not hold."""
        sharded = self._sharded(kept)
        return sum(_padded(part, 1) - _padded(part, ranks) // ranks for part in sharded)

    def gathered(self, ranks: int, kept: int = 0, recomputed: bool = True) -> int:
        """Bytes that a rank has gathered at the peak, beside those it holds.

        Without recomputing the peak is where the forward pass ends, in the last block; else in the largest.
        """
        sizes = [_padded(part, ranks) for part in self._sharded(kept)]
        return GATHERED * max(sizes if recomputed else sizes[-1:], default=0)

    def received(self, ranks: int, kept: int = 0) -> float:
        """Bytes that a rank receives in a micro-batch: blocks twice, for forward and backward pass."""
        return 2 * sum(_padded(part, ranks) for part in self._sharded(kept)) * (1 - 1 / ranks)

    def _sharded(self, kept: int) -> list[Part]:
        return block_swap.spread(self.matrices, len(self.matrices) - kept)


def _part(parameters: Iterable[nn.Parameter]) -> Part:
    return tuple((len(p), p[:1].nbytes) for p in parameters if p.dim() > 1 and not p.requires_grad)


def _padded(part: Part, ranks: int) -> int:
    """Bytes of a part's matrices when each has a multiple of `ranks` rows."""
    return sum(-(-rows // ranks) * ranks * size for rows, size in part)
