"""A step recorded as a CUDA graph: one launch in place of thousands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import nn

from dbtrain.data.batch import Batch
from dbtrain.runtime.errors import ConfigError

WARM_UP = {False: 3, True: 11}  # steps before one is recorded; DDP settles its buckets within 11


def check(wanted: bool, device: torch.device) -> None:
    """Raise ConfigError if a step is to be recorded as a CUDA graph on a device that records none."""
    if wanted and device.type != "cuda":
        raise ConfigError("train.cuda_graph is true, but there is no CUDA GPU here; set it to false")


Result = TypeVar("Result", bound=NamedTuple)


class Recorded(Generic[Result]):
    """A step that is recorded as a CUDA graph after a few calls, and replayed from then on.

    The whole step, forward, backward and optimizer, is then one launch: a small batch takes as long as
    the GPU needs, not as long as Python needs to launch thousands of kernels. Its inputs are
    copied into the tensors that were recorded. Everything must run `on_side_stream`.
    """

    def __init__(self, compute: Callable[..., Result], distributed: bool) -> None:
        self.compute = compute
        self.calls_left = WARM_UP[distributed]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Batch] = []
        self.result: Result | None = None

    def __call__(self, ddp: nn.Module, progress: Any, batches: Sequence[Batch], cfg: Any) -> Result:
        if self.calls_left:
            self.calls_left -= 1
            return self.compute(ddp, progress, batches, cfg)
        if self.graph is None:
            self.inputs = list(batches)
            self.graph = torch.cuda.CUDAGraph()
            # thread_local: the thread that reads ahead may pin memory meanwhile.
            with torch.cuda.graph(
                self.graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
            ):
                self.result = self.compute(ddp, progress, self.inputs, cfg)
        else:
            for mine, given in zip(self.inputs, batches, strict=True):
                mine.take(given)
        self.graph.replay()
        assert self.result is not None
        seen = sum(batch.seen for batch in batches)
        return self.result._replace(seen=seen)  # its tensors are written anew by each replay


@contextmanager
def on_side_stream(wanted: bool) -> Iterator[None]:
    """In the block, kernels run on a stream of their own, as a recording needs it."""
    if not wanted:
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)
