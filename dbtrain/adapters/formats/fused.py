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
    """One layer's tensors for those of several, {} for a layer without an adapter. `sizes`: their outputs.

    Every layer has as many ranks in it as the largest; those that it does not use are zero.
    """
    present = [layer for layer in layers if layer]
    found: dict[str, Tensor] = {}
    for left, right in PRODUCTS:
        if left not in present[0]:
            continue
        rank, width = max(layer[left].shape[1] for layer in present), present[0][right].shape[1]
        like = present[0][left]
        found[left], found[right] = like.new_zeros(sum(sizes), rank * len(layers)), like.new_zeros(0, width)
        for number, (layer, size) in enumerate(zip(layers, sizes, strict=True)):
            rows, columns = sum(sizes[:number]), number * rank
            inputs = like.new_zeros(rank, width)
            if layer:
                its = layer[left].shape[1]
                found[left][rows : rows + size, columns : columns + its] = layer[left]
                inputs[:its] = layer[right]
            found[right] = torch.cat([found[right], inputs])
    for name in BY_OUTPUT:
        if name in present[0]:
            like = present[0][name]
            pairs = zip(layers, sizes, strict=True)
            found[name] = torch.cat(
                [layer.get(name, like.new_zeros(size, *like.shape[1:])) for layer, size in pairs]
            )
    return found


def split(module: str, layer: Mapping[str, Tensor], sizes: Sequence[int]) -> list[dict[str, Tensor]]:
    """The tensors of several layers from those of one, by their outputs; {} for one without an adapter.

    Raises ConfigError for an update that does not come apart.
    """
    if any(name.startswith("lokr_") for name in layer):
        return _split_lokr(module, layer, len(sizes))
    products = [(left, right) for left, right in PRODUCTS if left in layer]
    blocks = all(_is_diagonal(layer[left], sizes) for left, _ in products)
    parts: list[dict[str, Tensor]] = [{} for _ in sizes]
    for left, right in products:
        share = layer[left].shape[1] // (len(sizes) if blocks else 1)
        for number, (part, rows) in enumerate(zip(parts, layer[left].split(list(sizes)), strict=True)):
            start = number * share if blocks else 0
            part[left], part[right] = rows[:, start : start + share], layer[right][start : start + share]
    for part in parts:
        if "alpha" in layer:
            part["alpha"] = layer["alpha"] / len(sizes) if blocks else layer["alpha"]
        if blocks:
            _trim(part, products)
    for name in BY_OUTPUT:
        if name in layer:
            for part, values in zip(parts, layer[name].split(list(sizes)), strict=True):
                if part:
                    part[name] = values
    return [{name: tensor.contiguous() for name, tensor in part.items()} for part in parts]


def _trim(part: dict[str, Tensor], products: Sequence[tuple[str, str]]) -> None:
    """Drop the last ranks that are zero, as `join` filled them in; everything, if there are no others."""
    before = part[products[0][0]].shape[1]
    used = [part[left].any(0) | part[right].any(1) for left, right in products]
    ranks = torch.stack(used).any(0).nonzero().flatten()
    if not len(ranks):
        part.clear()
        return
    rank = int(ranks[-1]) + 1
    for left, right in products:
        part[left], part[right] = part[left][:, :rank], part[right][:rank]
    if "alpha" in part:  # the scale is alpha / rank
        part["alpha"] = part["alpha"] * rank / before


def _is_diagonal(left: Tensor, sizes: Sequence[int]) -> bool:
    """Whether each layer's outputs use ranks of their own, equally many."""
    rank, rest = divmod(left.shape[1], len(sizes))
    if rest or left.shape[0] != sum(sizes):
        return False
    off = left.clone()
    for number, size in enumerate(sizes):
        row = sum(sizes[:number])
        off[row : row + size, number * rank : (number + 1) * rank] = 0
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
