"""Switching a trained adapter off for a while, to ask what the base predicts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from dbtrain.adapters.batched import BatchedLora
from dbtrain.adapters.inject import name_in_files, trainable


class Switch(nn.Module):
    """Turns a module with an adapter into its base, bit for bit, and back.

    The layers of the base are put in the place of those that PEFT wrapped around them, whose own switch would
    keep their casts. Trained biases are exchanged for those of the base, of which this holds a copy.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Call it before anything is trained or restored. `dtype`: that of the base."""
        super().__init__()
        # Lists rather than submodules: they are parts of `module` already.
        self.layers = [
            (parent, name, layer)
            for parent in module.modules()
            for name, layer in parent.named_children()
            if isinstance(layer, (BaseTunerLayer, BatchedLora))
        ]
        self.biases: list[tuple[nn.Module, str]] = []
        for path, parameter in trainable(module).items():
            if name_in_files(path) is None:
                owner, _, name = path.rpartition(".")
                plain = parameter.detach().to(dtype, copy=True)
                self.register_buffer(f"bias_{len(self.biases)}", plain, persistent=False)
                self.biases.append((module.get_submodule(owner), name))

    @contextmanager
    def off(self) -> Iterator[None]:
        """In the block, the module computes as the base does. Call it without gradients."""
        trained = [owner._parameters[name] for owner, name in self.biases]
        for parent, name, layer in self.layers:
            parent._modules[name] = layer.get_base_layer()
        for number, (owner, name) in enumerate(self.biases):
            # As torch.func.functional_call does.
            owner._parameters[name] = self.get_buffer(f"bias_{number}")  # type: ignore[assignment]
        try:
            yield
        finally:
            for parent, name, layer in self.layers:
                parent._modules[name] = layer
            for (owner, name), parameter in zip(self.biases, trained, strict=True):
                owner._parameters[name] = parameter
