"""Merging a training adapter into the base, and leaving it out for validation images.

It is merged rather than kept beside the trained adapter: steps cost no more time or memory of the GPU, and
training is the same as on a base that has it. For validation images the layers are exchanged for copies, so
that no arithmetic changes a bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from dbtrain.adapters import inject
from dbtrain.adapters.state import AdapterState
from dbtrain.models import block_swap
from dbtrain.models.quantization import QuantizedLinear
from dbtrain.runtime.errors import ConfigError, reason
from dbtrain.train.training_adapter import SETTING


def merge(denoiser: nn.Module, state: AdapterState) -> dict[str, nn.Module]:
    """Add an adapter to the weights of `denoiser`, in fp32; return copies of the layers without it, by name.

    Raises ConfigError if a weight is not finite afterwards.
    """
    parameters = inject.put_on(denoiser, state, inject.NAME)
    for parameter in parameters.values():  # which PEFT made in the base's dtype
        parameter.data = parameter.data.float()
    inject.fill(parameters, state)
    plain: dict[str, nn.Module] = {}
    for name, layer in list(denoiser.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            inner = layer.get_base_layer()
            plain[name] = deepcopy(inner)
            dtype = inner.get_parameter("weight").dtype
            layer.float()  # type: ignore[attr-defined]
            try:
                layer.merge(safe_merge=True)
            except ValueError as error:
                raise ConfigError(f"{SETTING}: its layer {name} is not finite: {reason(error)}") from error
            parent, _, last = name.rpartition(".")
            setattr(denoiser.get_submodule(parent), last, inner.to(dtype))
    del denoiser.peft_config
    return plain


@dataclass(frozen=True)
class LeftOut:
    """The layers that a training adapter changed, each with a copy without it, on the CPU."""

    layers: Sequence[tuple[nn.Module, nn.Module]] = ()

    @classmethod
    def of(cls, denoiser: nn.Module, plain: Mapping[str, nn.Module], storage: str) -> LeftOut:
        """`plain`: layers by name, before `denoiser` was quantized to `storage`."""
        pairs = []
        for name, layer in plain.items():
            live = denoiser.get_submodule(name)
            if isinstance(live, QuantizedLinear):
                layer = QuantizedLinear(layer, storage)  # type: ignore[arg-type]
            pairs.append((live, layer))
        return cls(pairs)

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
        for live, plain in self.layers:
            stored = _weights(plain)
            for name, tensor in _weights(live).items():
                used = tensor.to("cpu", copy=True)
                tensor.copy_(stored[name])
                stored[name].copy_(used)


def _weights(layer: nn.Module) -> dict[str, Tensor]:
    """What a training adapter changes of a layer: its weight, as it is stored. Biases may be trained."""
    return {name: tensor for name, tensor in block_swap.stored(layer).items() if name != "bias"}
