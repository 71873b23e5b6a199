"""Which kernels compute a step: attention's by the GPU's generation, compiled ones, recorded ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dbtrain.data.dataloader import Batch
from dbtrain.runtime import files
from dbtrain.runtime.errors import ConfigError

# Attention kernels by preference: the first that can do a layer's shapes does them. A table and no
# measurement, so that every start of a run computes alike.
ATTENTION = {
    "cudnn": ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"),
    "flash": ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"),
    "efficient": ("EFFICIENT_ATTENTION", "MATH"),
    "math": ("MATH",),
}
CUDNN_FROM = (9, 0)  # compute capability: cuDNN's kernels beat flash attention from Hopper on, not before
REPEATED = ("BasicTransformerBlock", "ResnetBlock2D")  # what `compile: regional` compiles
WARM_UP = {False: 3, True: 11}  # steps before one is recorded; DDP settles its buckets within 11


def attention(name: str, device: torch.device) -> AbstractContextManager[Any]:
    """In the block, attention prefers the kernels `name`; "auto": what suits the device."""
    chosen = preferred(name, device)
    if chosen is None:
        return nullcontext()
    return sdpa_kernel([getattr(SDPBackend, kernel) for kernel in ATTENTION[chosen]], set_priority=True)


def preferred(name: str, device: torch.device) -> str | None:
    """The row of ATTENTION that `name` stands for on a device; None: torch's own choice."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return None
    return "cudnn" if torch.cuda.get_device_capability(device) >= CUDNN_FROM else "flash"


def check_graph(wanted: bool, device: torch.device) -> None:
    """Raise ConfigError if a step is to be recorded as a CUDA graph on a device that records none."""
    if wanted and device.type != "cuda":
        raise ConfigError("train.cuda_graph is true, but there is no CUDA GPU here; set it to false")


def compile_module(
    module: nn.Module,
    how: bool | str,
    backend: str | Callable[..., Any] = "inductor",
    activation_memory: float | None = None,
) -> None:
    """Compile a denoiser in place, whole (True) or its repeated blocks ("regional").

    Before DDP wraps it; state-dict keys keep their names. What is compiled is kept in the user's
    cache folder, for later runs and for this node's other ranks. `activation_memory` is the share of the
    activations to keep; the partitioner of forward and backward pass chooses which to compute again.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(files.cache() / "inductor"))
    from torch._dynamo import config as dynamo  # a second of imports that eager runs do not need
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    functorch.activation_memory_budget = activation_memory or 1.0  # read when the first step compiles
    dynamo.optimize_ddp = False  # one graph: it would split at DDP's first bucket
    dynamo.recompile_limit = max(dynamo.recompile_limit, 64)  # a block is compiled for each of its shapes
    # With it, torch 2.13 on CPUs mixes memory formats in convolution_backward: layers below an
    # upsampler silently get no gradient. On GPUs its heuristics leave UNets alone anyway.
    inductor.layout_optimization = False
    blocks = [one for one in module.modules() if type(one).__name__ in REPEATED]
    for one in blocks if how == "regional" else [module]:
        one.compile(backend=backend)


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
