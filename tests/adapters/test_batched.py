"""Layers with a LoRA for each slot."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dbtrain.adapters.batched import Stack


def test_a_convolution_keeps_its_input_once_for_the_backward_pass() -> None:
    """As PEFT's does, by which the memory of slots is forecast."""
    model = nn.Sequential(nn.Conv2d(32, 16, 3, padding=1, stride=2)).requires_grad_(False)
    stack = Stack(3, torch.float32)
    stack.add("unet", model, {"0": 2})
    stack.allocate(torch.device("cpu"))
    kept: dict[int, int] = {}  # bytes, by address

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(6, 32, 16, 16, requires_grad=True)
    with stack.in_place(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x)
    assert sum(kept.values()) < 1.5 * x.nbytes
