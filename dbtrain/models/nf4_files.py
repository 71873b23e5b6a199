"""Weights that bitsandbytes rounded to 4 bits (NF4) and Diffusers or Transformers saved, read without it."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dbtrain.models.quantization import BLOCK, NF4, NF4_FP32
from dbtrain.models.weight_files import WeightFiles
from dbtrain.runtime.errors import ConfigError, reason

# `quantization_config` of the models that are read, and what older ones do not say.
CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
STORED = {"bnb_4bit_quant_storage": "uint8"}
STATE = ".quant_state.bitsandbytes__nf4"  # behind a weight's name: JSON, its characters as bytes
TABLES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


def is_nf4(settings: Mapping[str, Any]) -> bool:
    """Whether a model's config describes weights that `Nf4Files` reads."""
    found = settings.get("quantization_config")
    return isinstance(found, dict) and (CONFIG | STORED).items() <= (STORED | found).items()


class Nf4Files(WeightFiles):
    """Weight files of which some tensors are packed: two weights a byte, blocks of 64, row after row."""

    @property
    def names(self) -> Collection[str]:
        """The names of all weights."""
        packed = [name.removesuffix(STATE) for name in self._files if name.endswith(STATE)]
        beside = {name + end for name in packed for end in (STATE, *TABLES)}
        return [name for name in self._files if name not in beside]

    def shape(self, name: str) -> tuple[int, ...]:
        """The decoded shape. Raises ConfigError if the packed weight is broken."""
        state = self._state(name)
        return tuple(state["shape"]) if state else super().shape(name)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some rows of it. Packed ones are decoded to fp32, with the bits of bitsandbytes.

        Raises KeyError if no file has it, and ConfigError if it is broken.
        """
        state = self._state(name)
        if not state:
            return super().read(name, rows)
        height, width = state["shape"]
        start, stop, _ = (rows or slice(None)).indices(height)
        codes, scales = self._blocks(name, state, start, stop)
        # Each byte is an index of the table's pairs, the first weight in its upper half.
        values = self.read(f"{name}.quant_map")
        weights = nn.functional.embedding(codes.int(), torch.cartesian_prod(values, values))
        flat = weights.view(len(scales), -1).mul_(scales[:, None]).flatten()
        return flat[start * width % state["blocksize"] :][: (stop - start) * width].view(-1, width)

    def encoded(self, name: str, storage: str, rows: slice | None = None) -> tuple[Tensor, Tensor] | None:
        """The codes and scales of a packed weight, if no block is in two rows; see `WeightFiles.encoded`."""
        state = self._state(name)
        if not state or (storage, state["blocksize"], state["shape"][1] % BLOCK) != (NF4_FP32, BLOCK, 0):
            return None
        if not torch.equal(self.read(f"{name}.quant_map"), torch.tensor(NF4)):
            return None
        start, stop, _ = (rows or slice(None)).indices(state["shape"][0])
        codes, scales = (part.reshape(stop - start, -1) for part in self._blocks(name, state, start, stop))
        return codes, scales.view(torch.uint8)

    def _blocks(self, name: str, state: Mapping[str, Any], start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The bytes of codes, and the fp32 scales, of all blocks that these rows have a part in."""
        width, size = state["shape"][1], state["blocksize"]
        blocks = slice(start * width // size, math.ceil(stop * width / size))
        scales = self._scales(name, state, blocks)
        packed = range(super().shape(name)[0])[blocks.start * size // 2 : blocks.stop * size // 2]
        codes = super().read(name, slice(packed.start, packed.stop)).flatten()
        return nn.functional.pad(codes, (0, len(scales) * size // 2 - len(codes))), scales

    def _scales(self, name: str, state: Mapping[str, Any], blocks: slice) -> Tensor:
        """The scales of some blocks, fp32. They may have been rounded to 8 bits, in blocks of their own."""
        scales = self.read(f"{name}.absmax", blocks)
        if "nested_offset" not in state:
            return scales
        of = torch.arange(blocks.start, blocks.stop) // state["nested_blocksize"]
        steps, values = (self.read(f"{name}.nested_{table}") for table in ("absmax", "quant_map"))
        return values[scales.int()] * steps[of] + state["nested_offset"]

    def _state(self, name: str) -> dict[str, Any] | None:
        """How a weight is packed, or None. Raises ConfigError unless all parts of it have their sizes."""
        if name + STATE not in self._files:
            return None
        try:
            state: dict[str, Any] = json.loads(bytes(self.read(name + STATE).tolist()))
            rows, width = state["shape"]
            blocks = math.ceil(rows * width / state["blocksize"])
            sizes = {"": math.ceil(rows * width / 2), ".absmax": blocks, ".quant_map": 16}
            if "nested_offset" in state:
                nested = math.ceil(blocks / state["nested_blocksize"])
                sizes |= {".nested_absmax": nested, ".nested_quant_map": 256}
            found = {end: math.prod(WeightFiles.shape(self, name + end)) for end in sizes}
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise ConfigError(f"the 4-bit weight '{name}' is broken: {reason(error)}") from error
        if wrong := [f"{name}{end}" for end, size in sizes.items() if found[end] != size]:
            raise ConfigError(f"the 4-bit weight '{name}' is broken: '{wrong[0]}' has another size")
        return state
