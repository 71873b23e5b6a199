"""Record a training step as a CUDA graph: one launch instead of thousands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from dbtrain.runtime.errors import ConfigError

if TYPE_CHECKING:
    from dbtrain.config import Config
    from dbtrain.data.batch import Batch
    from dbtrain.train.checkpoint import Progress
    from dbtrain.train.metrics import Outcome
    from dbtrain.train.step import Compute

Kinds = tuple[tuple[torch.Size, bool], ...]  # of the batches of a step: their shapes, and which are redrawn
WARM_UP = {False: 3, True: 11}  # by whether DDP is used: its buckets take up to 11 steps to settle


def check(wanted: bool, device: torch.device) -> None:
    """Raise ConfigError if a CUDA graph is wanted on a device that has none."""
    if wanted and device.type != "cuda":
        raise ConfigError("train.cuda_graph is true, but there is no CUDA GPU here; set it to false")


class Recorded:
    """A step that is recorded as a CUDA graph, once a kind, after a few warm-up calls and then replayed.

    Forward, backward, and optimizer become a single launch, so that a small batch is not limited by the
    time that Python takes to launch thousands of kernels. Inputs are copied into the recorded tensors.
    Everything must run `on_side_stream`.
    """

    def __init__(self, compute: Compute, distributed: bool) -> None:
        self.compute = compute
        self.left = WARM_UP[distributed]  # calls to warm up: by all kinds
        self.again: dict[Kinds, int] = {}  # and by each
        self.steps: dict[Kinds, _Step] = {}

    def __call__(self, ddp: nn.Module, progress: Progress, batches: Sequence[Batch], cfg: Config) -> Outcome:
        kinds = tuple((batch.noise.shape, batch.redraws) for batch in batches)
        left = self.again.setdefault(kinds, WARM_UP[False])
        if self.left > 0 or left > 0:
            self.left, self.again[kinds] = self.left - 1, left - 1
            return self.compute(ddp, progress, batches, cfg)
        if kinds not in self.steps:
            inputs, graph = list(batches), torch.cuda.CUDAGraph()
            pool = next(iter(self.steps.values())).graph.pool() if self.steps else None
            # thread_local: the prefetching thread may pin memory during the capture.
            with torch.cuda.graph(
                graph, pool=pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
            ):
                result = self.compute(ddp, progress, inputs, cfg)
            self.steps[kinds] = _Step(graph, inputs, result)
        else:
            for mine, given in zip(self.steps[kinds].inputs, batches, strict=True):
                mine.take(given)
        step = self.steps[kinds]
        step.graph.replay()
        return step.result._replace(seen=sum(batch.seen for batch in batches))


@dataclass(frozen=True)
class _Step:
    """A recorded step, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Batch]
    result: Outcome


@contextmanager
def on_side_stream(wanted: bool) -> Iterator[None]:
    """Run the block's kernels on a side stream, which capturing requires."""
    if not wanted:
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)
