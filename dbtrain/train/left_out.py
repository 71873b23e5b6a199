"""Merging a training adapter into the base, and leaving it out for validation images.

It is merged rather than kept beside the trained adapter: steps cost no more time or memory of the GPU, and
training is the same as on a base that has it. For validation images the layers are exchanged for copies, so
that no arithmetic changes a bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dbtrain.adapters import inject
from dbtrain.adapters.state import AdapterState
from dbtrain.models import block_swap, loading
from dbtrain.runtime.errors import ConfigError, reason
from dbtrain.train import parallel
from dbtrain.train.training_adapter import SETTING


def merging(denoiser: nn.Module, state: AdapterState) -> loading.Changes:
    """What an adapter does to the weights of a `denoiser` on the meta device, in fp32."""
    owners = {re.split(r"\.(?:lora|hada|lokr)_", label)[0] for label in state.tensors}
    return {f"{name}.weight": partial(_merged, denoiser.get_submodule(name), name, state) for name in owners}


def _merged(layer: nn.Module, name: str, state: AdapterState, weight: Tensor) -> Tensor:
    """The weight of a layer with an adapter. Raises ConfigError if it is not finite."""
    alone, (*parents, last) = nn.Module(), name.split(".")
    owner = alone
    for parent in parents:  # the adapter's settings may be by name
        owner.add_module(parent, child := nn.Module())
        owner = child
    layer = deepcopy(layer)
    layer.weight = nn.Parameter(weight.float(), requires_grad=False)
    owner.add_module(last, layer)
    own = {label: tensor for label, tensor in state.tensors.items() if label.startswith(f"{name}.")}
    parameters = inject.put_on(alone, AdapterState(own, state.config), inject.NAME)
    inject.fill(parameters, state)
    try:
        alone.get_submodule(name).merge(safe_merge=True)  # type: ignore[operator]
    except ValueError as error:
        raise ConfigError(f"{SETTING}: its layer {name} is not finite: {reason(error)}") from error
    return layer.weight.data.to(weight.dtype)


@dataclass(frozen=True)
class LeftOut:
    """The layers that a training adapter changed, each with what it holds without it, on the CPU."""

    denoiser: nn.Module
    layers: loading.Plain

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """In the block, the layers are the base's own. Afterwards every bit is as before."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        parallel.reshard(self.denoiser)
        for layer, stored in self.layers:
            kept = block_swap.stored(layer)
            for name, plain in stored.items():
                live, _ = parallel.local(kept[name])
                used = live.to("cpu", copy=True)
                live.copy_(plain)
                plain.copy_(used)
