"""Record a training step as a CUDA graph: one launch instead of thousands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import nn

from dbtrain.runtime.errors import ConfigError

if TYPE_CHECKING:
    from dbtrain.config import Config
    from dbtrain.data.batch import Batch
    from dbtrain.train.checkpoint import Progress
    from dbtrain.train.metrics import Outcome
    from dbtrain.train.step import Compute

T = TypeVar("T")
Kinds = tuple[tuple[torch.Size, bool], ...]  # of the batches of a step: their shapes, and which are redrawn
WARM_UP = {False: 3, True: 11}  # by whether DDP is used: its buckets take up to 11 steps to settle


def check(wanted: bool, device: torch.device) -> None:
    """Raise ConfigError if a CUDA graph is wanted on a device that has none."""
    if wanted and device.type != "cuda":
        raise ConfigError("train.cuda_graph is true, but there is no CUDA GPU here; set it to false")


class Recorder(Generic[T]):
    """Records what is computed from batches as a CUDA graph, once a kind, after a few warm-up calls.

    Replaying it is a single launch, so that a small batch is not limited by the time that Python takes to
    launch thousands of kernels. Batches are copied into the recorded ones; all else that changes has to be
    in tensors that stay the same. Everything must run `on_side_stream`.
    """

    def __init__(self, distributed: bool = False) -> None:
        self.left = WARM_UP[distributed]  # calls to warm up: by all kinds
        self.again: dict[Kinds, int] = {}  # and by each
        self.recordings: dict[Kinds, _Recording[T]] = {}

    def __call__(self, compute: Callable[[Sequence[Batch]], T], batches: Sequence[Batch]) -> T:
        """What `compute`, which is the same every time, returns for these batches."""
        kinds = tuple((batch.noise.shape, batch.redraws) for batch in batches)
        left = self.again.setdefault(kinds, WARM_UP[False])
        if self.left > 0 or left > 0:
            self.left, self.again[kinds] = self.left - 1, left - 1
            return compute(batches)
        if kinds not in self.recordings:
            inputs, graph = list(batches), torch.cuda.CUDAGraph()
            pool = next(iter(self.recordings.values())).graph.pool() if self.recordings else None
            # thread_local: the prefetching thread may pin memory during the capture.
            with torch.cuda.graph(
                graph, pool=pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
            ):
                result = compute(inputs)
            self.recordings[kinds] = _Recording(graph, inputs, result)
        else:
            for mine, given in zip(self.recordings[kinds].inputs, batches, strict=True):
                mine.take(given)
        self.recordings[kinds].graph.replay()
        return self.recordings[kinds].result


@dataclass(frozen=True)
class _Recording(Generic[T]):
    """A recorded graph, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Batch]
    result: T


def recorded(compute: Compute, distributed: bool) -> Compute:
    """The same step, recorded: forward, backward, and optimizer. `distributed`: whether DDP is used."""
    recorder: Recorder[Outcome] = Recorder(distributed)

    def step(ddp: nn.Module, progress: Progress, batches: Sequence[Batch], cfg: Config) -> Outcome:
        outcome = recorder(lambda some: compute(ddp, progress, some, cfg), batches)
        return outcome._replace(seen=sum(batch.seen for batch in batches))

    return step


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
