"""Loading a Diffusers model: its modules without weights, then each weight from the files to its place.

A place may hold only some rows of a weight, or its codes. Diffusers' own loader reads whole weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from dbtrain.models.quantization import QuantizedLinear, encode
from dbtrain.models.weight_files import WeightFiles
from dbtrain.runtime import memory

Local = Callable[[Tensor], tuple[Tensor, slice | None]]
"""(parameter) -> the part of it that this rank holds, and which rows these are; None: all."""
Changes = Mapping[str, Callable[[Tensor], Tensor]]
"""Name of a weight -> (the weight as the base has it) -> the weight to train on."""
Plain = list[tuple[nn.Module, dict[str, Tensor]]]
"""Layers whose weight was changed, each with what it would hold without the change."""


def skeleton(kind: Any, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """A model of the class `kind` whose parameters are on the meta device, in the dtypes that `fill` uses.

    Buffers are real, because constructors compute those that no file holds.
    """
    with parameters_on_meta(dtype):
        module: nn.Module = kind.from_config(config)
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(_dtype(module, name, parameter, dtype))
    return module


@contextmanager
def parameters_on_meta(dtype: torch.dtype) -> Iterator[None]:
    """In the block, new modules have real buffers, and parameters in `dtype` on the meta device."""

    def moved(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        fresh = parameter is not None and not parameter.is_meta  # not one that modules share
        return nn.Parameter(parameter.to("meta"), requires_grad=False) if fresh else None

    default, hook = torch.get_default_dtype(), register_module_parameter_registration_hook(moved)  # type: ignore[arg-type]
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(default)
        hook.remove()


def _dtype(module: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a weight in a model of `dtype`. Some models keep their norms in fp32."""
    if not tensor.is_floating_point():
        return tensor.dtype
    kept = getattr(module, "_keep_in_fp32_modules", None) or ()
    return torch.float32 if set(kept) & set(name.split(".")) else dtype


def names(module: nn.Module, files: WeightFiles) -> dict[str, str]:
    """The name in `files` of each weight there, by its name in `module`; old VAEs have other names."""
    found = {name: name for name in files.names}
    module._fix_state_dict_keys_on_load(found)  # type: ignore[operator]  # renames keys
    return found


def unfit(module: nn.Module, files: WeightFiles) -> list[str]:
    """The names of weights that `files` lack, or have in another shape."""
    found = names(module, files)
    return sorted(
        name
        for name, _, _, shape in _places(module)
        if name not in found or files.shape(found[name]) != tuple(shape)
    )


def whole(parameter: Tensor) -> tuple[Tensor, slice | None]:
    """A parameter that is not sharded. See `Local`."""
    return parameter, None


@torch.no_grad()
def fill(
    module: nn.Module,
    files: WeightFiles,
    dtype: torch.dtype,
    local: Local = whole,
    changes: Changes | None = None,
) -> Plain:
    """Read the weights of a `skeleton`, whose layers may have been quantized or sharded by rows since.

    Parameters that are not on the meta device are filled where they are. Of a sharded weight no more is read
    than the rows that are `local`, unless it has a change.
    Raises KeyError if `files` lack a weight.
    """
    named, plain, encoded = names(module, files), [], 0
    for name, part, attributes, _ in _places(module):
        rows = local(getattr(part, attributes[0]))[1]
        change = (changes or {}).get(name)
        values: tuple[Tensor, ...] | None = None
        if isinstance(part, QuantizedLinear) and attributes == CODES:
            values = files.encoded(named[name], part.storage, rows)
        if change or values is None:
            weight = files.read(named[name], None if change else rows)
            weight = weight.to(_dtype(module, name, weight, dtype))
            if change:
                cut = rows or slice(None)
                was = values or _stored(part, attributes, weight[cut])
                plain.append((part, dict(zip(attributes, was, strict=True))))
                weight = change(weight)[cut]
            values = _stored(part, attributes, weight)
        for attribute, value in zip(attributes, values, strict=True):
            held = local(getattr(part, attribute))[0]
            if attribute in part._buffers:
                setattr(part, attribute, value)
            elif held.is_meta:
                setattr(part, attribute, nn.Parameter(value, requires_grad=False))
            else:
                held.copy_(value)
        encoded += values[0].nbytes if attributes == CODES else 0
        if encoded > UNTRIMMED:
            encoded = 0
            memory.trim()
    return plain


Place = tuple[str, nn.Module, tuple[str, ...], torch.Size]
CODES = ("codes", "scale")  # of a quantized weight
ENCODED = 2**20  # weights that are encoded at a time
UNTRIMMED = 2**27  # bytes of codes, between which encoding leaves holes in the heap


def _places(module: nn.Module) -> Iterator[Place]:
    """(name of a weight, its module, the attributes that hold it, its shape), for each that files have."""
    for path, part in module.named_modules():
        start = f"{path}." if path else ""
        own: dict[str, Any] = {**part._parameters, **part._buffers}
        for name, tensor in own.items():
            if tensor is not None and name not in (*part._non_persistent_buffers_set, *CODES):
                yield f"{start}{name}", part, (name,), tensor.shape
        if isinstance(part, QuantizedLinear):
            yield f"{start}weight", part, CODES, torch.Size([part.out_features, part.in_features])


def _stored(part: nn.Module, attributes: tuple[str, ...], weight: Tensor) -> tuple[Tensor, ...]:
    """What the attributes of a module hold of some rows of a weight."""
    if attributes != CODES:
        return (weight,)
    # What stays comes first: behind the fp32 copies that encoding needs, it would leave holes in the heap.
    widths = [getattr(part, attribute).shape[1] for attribute in attributes]
    stored = tuple(weight.new_empty(len(weight), width, dtype=torch.uint8) for width in widths)
    few = max(1, ENCODED // weight.shape[1])
    for start in range(0, len(weight), few):
        encoded = encode(weight[start : start + few], part.storage)  # type: ignore[arg-type]
        for whole_rows, piece in zip(stored, encoded, strict=True):
            whole_rows[start : start + few] = piece
    return stored
