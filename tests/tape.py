"""A CUDA graph's semantics on a CPU: the operators of a computation, replayed on the same tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """Stands in for `torch.cuda.CUDAGraph`: what Python computed while it recorded stays as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a graph cannot be read on the host"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def pool(self) -> None:
        """Where a graph's memory is; a tape keeps every tensor."""

    def replay(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                for there, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    # Views, and what is written in place, are the recorded tensors' memory already.
                    if isinstance(there, Tensor) and there.data_ptr() != new.data_ptr():
                        there.copy_(new)


@contextmanager
def recording(tape: Tape, **_: object) -> Iterator[None]:
    """Stands in for `torch.cuda.graph`, but also runs what is recorded, so that has to bear repetition."""
    with tape:
        yield
