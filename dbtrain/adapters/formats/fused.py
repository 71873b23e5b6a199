"""Layers that are several in Diffusers and one in a model's original code, such as queries, keys and values.

Their outputs lie one after the other. Joining the updates of several layers gives one of as many ranks, which
is block-diagonal; splitting gives back what was joined, or the parts of an update that was trained as one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dbtrain.adapters.formats.names import Layers
from dbtrain.adapters.state import MAGNITUDE
from dbtrain.runtime.errors import ConfigError

# Products (outputs, rank) x (rank, inputs) within a layer: names of the left and right factors.
PRODUCTS = (("lora_B.weight", "lora_A.weight"), ("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"))
BY_OUTPUT = (MAGNITUDE, "dora_scale", "lora_B.bias")  # one value per output


def join(layers: Sequence[Mapping[str, Tensor]], sizes: Sequence[int]) -> dict[str, Tensor]:
    """One layer's tensors for those of several, {} for a layer without an adapter. `sizes`: their outputs."""
    found: dict[str, Tensor] = {}
    present = [layer for layer in layers if layer]
    for left, right in PRODUCTS:
        if left not in present[0]:
            continue
        found[right] = torch.cat([layer[right] for layer in present])
        found[left] = torch.zeros(sum(sizes), len(found[right]))
        row = column = 0
        for layer, size in zip(layers, sizes, strict=True):
            if layer:
                rank = layer[left].shape[1]
                found[left][row : row + size, column : column + rank] = layer[left]
                column += rank
            row += size
    for name in BY_OUTPUT:
        if name in present[0]:
            found[name] = torch.cat([layer[name] for layer in present])
    return found


def split(module: str, layer: Mapping[str, Tensor], sizes: Sequence[int]) -> list[dict[str, Tensor]]:
    """The tensors of several layers from those of one, by their outputs.

    Raises ConfigError for an update that does not come apart.
    """
    if any(name.startswith("lokr_") for name in layer):
        return _split_lokr(module, layer, len(sizes))
    blocks = all(_is_diagonal(layer[left], sizes) for left, _ in PRODUCTS if left in layer)
    parts: list[dict[str, Tensor]] = [{} for _ in sizes]
    for left, right in PRODUCTS:
        if left not in layer:
            continue
        rows = layer[left].split(list(sizes))
        columns = layer[right].chunk(len(sizes)) if blocks else [layer[right]] * len(sizes)
        for number, part in enumerate(parts):
            rank = len(columns[number])
            start = number * rank if blocks else 0
            part[left] = rows[number][:, start : start + rank].contiguous()
            part[right] = columns[number].contiguous()
    for name in BY_OUTPUT:
        if name in layer:
            for part, values in zip(parts, layer[name].split(list(sizes)), strict=True):
                part[name] = values.contiguous()
    if "alpha" in layer:
        for part in parts:
            part["alpha"] = layer["alpha"] / len(sizes) if blocks else layer["alpha"]
    # A layer that had no adapter was joined as zeros.
    return [part if any(part[left].any() for left, _ in PRODUCTS if left in part) else {} for part in parts]


def _is_diagonal(left: Tensor, sizes: Sequence[int]) -> bool:
    """Whether each layer's outputs use ranks of their own, equally many."""
    rank, rest = divmod(left.shape[1], len(sizes))
    if rest or left.shape[0] != sum(sizes):
        return False
    off = left.clone()
    row = 0
    for number, size in enumerate(sizes):
        off[row : row + size, number * rank : (number + 1) * rank] = 0
        row += size
    return not off.any()


def _split_lokr(module: str, layer: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Rows of the left factor, if they divide."""
    name = "lokr_w1" if "lokr_w1" in layer else "lokr_w1_a"
    if len(layer[name]) % count:
        raise ConfigError(
            f"its LoKr layer {module} holds {count} layers of the base and does not come apart into them"
        )
    return [{**layer, name: rows.contiguous()} for rows in layer[name].chunk(count)]


def separated(found: dict[tuple[str, ...], dict[str, Tensor]], sizes: Mapping[str, int]) -> Layers:
    """Layers by module from layers by the modules that each holds. `sizes`: outputs by module."""
    layers: Layers = {}
    for modules, layer in found.items():
        if len(modules) == 1:
            layers[modules[0]] = layer
            continue
        parts = split(modules[0], layer, [sizes[module] for module in modules])
        layers |= {module: part for module, part in zip(modules, parts, strict=True) if part}
    return layers
