"""Where the denoiser's frozen weights live, in bytes: as they are stored, sharded over ranks, or swapped.

One fake step tells what training takes beside them, wherever they are. This is the arithmetic on top.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from dbtrain.models import block_swap
from dbtrain.models.blocks import blocks
from dbtrain.models.quantization import QuantizedLinear

GATHERED = 2  # blocks: the one at work, and the buffer in which the next one arrives
INDICES = {"nf4": 2, "nf4-fp32": 2}  # bytes a weight that decoding takes besides the decoded weight
Part = tuple[tuple[int, int], ...]
"""(rows, bytes of a row) of each matrix."""


@dataclass(frozen=True)
class Weights:
    """Sizes of a denoiser's frozen weights, bytes. Its matrices are what ranks can share."""

    size: int = 0  # of all
    blocks: tuple[int, ...] = ()  # of each block
    matrices: tuple[Part, ...] = ()  # in each block
    root: Part = ()  # matrices around the blocks
    decoded: int = 0  # that the largest quantized weight takes for a product
    quantized: int = 0  # how many weights are decoded

    @classmethod
    def of(cls, denoiser: nn.Module) -> Weights:
        """Those of a denoiser on whatever device, with adapters or without."""
        found = blocks(denoiser)
        inner = {parameter for block in found for parameter in block.parameters()}
        linears = [layer for layer in denoiser.modules() if isinstance(layer, QuantizedLinear)]
        counts = [layer.in_features * layer.out_features for layer in linears]
        each = [layer.dtype.itemsize + INDICES.get(layer.storage, 0) for layer in linears]
        return cls(
            size=block_swap.frozen_bytes(denoiser),
            blocks=tuple(map(block_swap.frozen_bytes, found)),
            matrices=tuple(_part(block.parameters()) for block in found),
            root=_part(parameter for parameter in denoiser.parameters() if parameter not in inner),
            decoded=max((one * count for one, count in zip(each, counts, strict=True)), default=0),
            quantized=sum(counts),
        )

    def held(self, ranks: int) -> int:
        """Bytes of matrices that each of `ranks` holds. Rows are padded to a multiple of them."""
        return sum(_padded(part, ranks) // ranks for part in (*self.matrices, self.root))

    def gathered(self, ranks: int, recomputed: bool = True) -> int:
        """Bytes that a rank has gathered at the peak, beside those it holds; the root stays so in a step.

        Without recomputing the peak is where the forward pass ends, in the last block; else in the largest.
        """
        sizes = self._gathers(ranks)
        return _padded(self.root, ranks) + GATHERED * max(sizes if recomputed else sizes[-1:], default=0)

    def received(self, ranks: int) -> float:
        """Bytes that a rank receives in a micro-batch: blocks twice, for forward and backward pass."""
        return (_padded(self.root, ranks) + 2 * sum(self._gathers(ranks))) * (1 - 1 / ranks)

    def _gathers(self, ranks: int) -> list[int]:
        return [_padded(part, ranks) for part in self.matrices]


def _part(parameters: Iterable[nn.Parameter]) -> Part:
    return tuple((len(p), p[:1].nbytes) for p in parameters if p.dim() > 1 and not p.requires_grad)


def _padded(part: Part, ranks: int) -> int:
    """Bytes of a part's matrices when each has a multiple of `ranks` rows."""
    return sum(-(-rows // ranks) * ranks * size for rows, size in part)
