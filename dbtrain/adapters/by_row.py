"""Adapters by row: the images of one batch have adapters of their own, in one pass through the base.

PEFT's own way, `adapter_names`, takes one LoRA a row and no DoRA, and gives it no scale of the row's.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

Scales = Mapping[str, float]
"""The adapters that are used together, each at its scale; {} is the base alone."""


def groups(images: Sequence[Scales]) -> list[tuple[Scales, list[int]]]:
    """The different ones, and the places in the batch of the images that have them."""
    found: dict[tuple[tuple[str, float], ...], list[int]] = {}
    for place, scales in enumerate(images):
        found.setdefault(tuple(scales.items()), []).append(place)
    return [(dict(scales), places) for scales, places in found.items()]


def batches(images: Sequence[Scales], able: Container[str]) -> list[list[int]]:
    """The places of the images, batch by batch: the adapters that are not `able` are alone in theirs."""
    apart = [places for scales, places in groups(images) if not all(name in able for name in scales)]
    rest = set(range(len(images))).difference(*apart)
    return [places for places in (sorted(rest), *apart) if places]


def tuner_layers(module: nn.Module) -> Iterator[Any]:
    """All layers of a module that hold adapters; PEFT nests layers of different kinds."""
    return (layer for layer in module.modules() if isinstance(layer, BaseTunerLayer))


@contextmanager
def adapting(denoiser: nn.Module, images: Sequence[Scales]) -> Iterator[None]:
    """In the block, each image of a batch has its own adapters in `denoiser`, where none may be in use.

    Where all images have the same, those have to be in use. Code that is compiled without these hooks is not
    run. The adapters' scales are changed.
    """
    different = groups(images)
    if len(different) == 1:
        yield
        return
    batch = _Batch(len(images))
    with ExitStack() as stack:
        stack.enter_context(denoiser.register_forward_pre_hook(batch.see, with_kwargs=True))
        for layer in tuner_layers(denoiser):
            known = set(layer._all_available_adapter_names())
            mine = [({name: scales[name] for name in scales if name in known}, places)
                    for scales, places in different]  # fmt: skip
            stack.enter_context(layer.register_forward_hook(partial(_add, batch, mine)))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


class _Batch:
    """Which rows of the tensors in the denoiser belong to which image."""

    def __init__(self, images: int) -> None:
        self.images = images
        self.calls = 0  # rows of the call at work: of all images, once or (with guidance) several times
        self.found: dict[tuple[Any, ...], Tensor] = {}

    def see(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.calls = len(args[0] if args else kwargs["hidden_states"])

    def rows(self, places: Sequence[int], tensor: Tensor) -> Tensor:
        """The rows of a layer's input that belong to these images.

        The input has one row for each row of the call, or as many for all (Krea 2: one for each token).
        """
        key = (self.calls, len(tensor), tensor.device, *places)
        if key not in self.found:
            each = len(tensor) // self.calls
            every = torch.arange(len(tensor), device=tensor.device).view(-1, self.images, each)
            self.found[key] = every[:, places].flatten()
        return self.found[key]


def _add(
    batch: _Batch,
    groups: Sequence[tuple[Scales, list[int]]],
    layer: Any,
    inputs: tuple[Tensor],
    output: Tensor,
) -> None:
    """Change a layer's output, which is the base's, to that of each image's adapters."""
    for scales, places in groups:
        if scales:
            rows = batch.rows(places, output)
            x, result = inputs[0][rows], output[rows]
            for name, scale in scales.items():
                layer.set_scale(name, scale)
                result = _adapted(layer, name, x, result)
            output[rows] = result.to(output.dtype)


def _adapted(layer: Any, name: str, x: Tensor, result: Tensor) -> Tensor:
    """The output for the input `x` with one adapter more than `result` has, as PEFT computes it."""
    if not isinstance(layer, LoraLayer):
        return result + layer._get_delta_activations(name, x)
    down, up = layer.lora_A[name], layer.lora_B[name]
    x = x.to(down.weight.dtype)
    if name in layer.lora_variant:  # DoRA
        return layer.lora_variant[name].forward(layer, active_adapter=name, x=x, result=result)
    return result + up(down(x)) * layer.scaling[name]
