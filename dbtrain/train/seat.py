"""A run in a slot."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from torch import Tensor, nn

from dbtrain.train.adapted import Adapted
from dbtrain.train.setup import Job


class SlotAdapter(Adapted):
    """The adapter in a slot, as its run sees it: PEFT's modules, without the base's weights."""

    def __init__(self, modules: dict[str, nn.Module], row: tuple[Tensor, Tensor]) -> None:
        self.modules, self.row = modules, row

    @property
    def trained(self) -> dict[str, nn.Module]:
        return {name: module for name, module in self.modules.items() if hasattr(module, "peft_config")}


@dataclass
class Seat:
    """A run in a slot."""

    job: Job
    step: int  # steps so far
    held: ExitStack  # its files and its place
    saved: bool = True  # whether the step has a checkpoint

    def save(self) -> None:
        self.job.save(self.step)
        self.saved = True

    @property
    def ended(self) -> bool:
        return self.step >= self.job.cfg.train.steps or self.job.validation.stopped
