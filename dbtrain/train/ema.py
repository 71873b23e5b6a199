"""A moving average of the trained parameters, which varies less than they do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Ema:
    """The exponential moving average of the parameters, fp32 on their device.

    The decay of step t, counted from 0, is min(decay, (1 + t) / (10 + t)), so that the first steps are soon
    forgotten. Polyak & Juditsky 1992; the warm-up is TensorFlow's.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.parameters: list[torch.Tensor] = list(parameters)
        self.decay = decay
        self.averages = [parameter.detach().clone() for parameter in self.parameters]
        # On the device, so that a recorded step sees it change.
        self.share = torch.zeros((), device=self.averages[0].device)  # of the parameters in the next update

    def begin(self) -> None:
        """Start from the parameters as they are."""
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            average.copy_(parameter.detach())

    def at(self, step: int) -> None:
        """Prepare the update after step `step`, counted from 0."""
        self.share.fill_(1 - min(self.decay, (1 + step) / (10 + step)))

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the parameters. Reads nothing on the host."""
        ways = torch._foreach_sub(self.parameters, self.averages)
        torch._foreach_mul_(ways, self.share)
        torch._foreach_add_(self.averages, ways)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """In the block, the parameters are the averages. Afterwards every bit is as before."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)
