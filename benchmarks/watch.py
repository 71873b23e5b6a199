"""A training run seen from outside: stamps and counts around every step."""

from __future__ import annotations

import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import trainer

COUNTED = 3  # steps after the timed ones: dispatched ops, profile, host syncs
READS = "_local_scalar_dense"  # what every read of a tensor's value on the host comes down to
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx")


@dataclass(frozen=True)
class Plan:
    """Steps to leave out at first, then windows of steps that are timed; `COUNTED` more follow."""

    warm_up: int
    windows: int
    window: int

    @property
    def timed(self) -> int:
        return self.warm_up + self.windows * self.window

    @property
    def steps(self) -> int:
        return self.timed + COUNTED


@dataclass
class Seen:
    """What was seen; the parent reads it as JSON."""

    load_s: float = 0.0
    first_step_s: float = 0.0
    windows: list[dict[str, float]] = field(default_factory=list)  # wall_s, cpu_s, wait_s each
    step_ms: list[float] = field(default_factory=list)  # of the device, or of this process's CPU time
    allocated_gib: float | None = None  # on the GPU, at most, from after the warm-up
    reserved_gib: float | None = None
    resident_gib: float = 0.0  # of the process, at most
    counts: dict[str, Any] = field(default_factory=dict)
    comm: dict[str, float] = field(default_factory=dict)


class Ops(TorchDispatchMode):
    """Counts what is dispatched, without views, and collectives with their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = self.collectives = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = [r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns]
        self.ops += not any(views)
        if func.namespace == "c10d":
            tensors = [t for t in _flat(args) if isinstance(t, torch.Tensor)]
            self.collectives += 1
            self.bytes += sum(t.nbytes for t in tensors)
        return func(*args, **kwargs or {})


class Watch:
    """In its `run` block, one `train` follows the plan, and is seen."""

    def __init__(self, plan: Plan, device: torch.device, compiled: bool) -> None:
        self.plan, self.device, self.compiled = plan, device, compiled
        self.seen = Seen()
        self.marks: list[Any] = []  # one a step from the end of the warm-up: CUDA events or CPU seconds
        self.edge: dict[str, float] = {}
        self.wait_s = 0.0
        self.began = self.built = 0.0
        self.graphs = 0
        self.ops = Ops()
        self.profile: Any = None
        self.warned: list[warnings.WarningMessage] = []
        self.catch: Any = None

    @contextmanager
    def run(self) -> Iterator[Seen]:
        with trainer.each_step(self._before, self._after), trainer.when_loaded(self._loaded):
            self.began = time.perf_counter()
            yield self.seen
        self.seen.resident_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def _loaded(self) -> None:
        self._sync()
        self.built = time.perf_counter()
        self.seen.load_s = self.built - self.began

    def _before(self, done: int, wait_s: float) -> None:
        """The step is queued, its metrics are not yet kept."""
        plan = self.plan
        if done == 1:
            self._sync()
            self.seen.first_step_s = time.perf_counter() - self.built
        if plan.warm_up < done <= plan.timed:
            self.wait_s += wait_s
        if done == plan.timed + 1 and not self.compiled:
            self.ops.__exit__(None, None, None)
            self.seen.counts |= {
                "dispatched ops": self.ops.ops,
                "collectives": self.ops.collectives,
                "collective bytes": self.ops.bytes,
            }
        if done == plan.timed + 2:
            self._sync()
            self.profile.__exit__(None, None, None)
            self._read_profile(self.profile.events())
        if done == plan.timed + 3 and self.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
            self.catch.__exit__(None, None, None)
            syncs = sum("synchroniz" in str(one.message) for one in self.warned)
            self.seen.counts["host syncs"] = syncs

    def _after(self, done: int) -> None:
        plan = self.plan
        if plan.warm_up <= done <= plan.timed:
            self._mark()
            if (done - plan.warm_up) % plan.window == 0:
                self._window(done)
        if done == plan.warm_up:
            self.graphs = _compiled_frames()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
        if done == plan.timed:
            self._end_of_timing()
            if not self.compiled:
                self.ops.__enter__()
        if done == plan.timed + 1:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if self.device.type == "cuda":
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            self.profile = torch.profiler.profile(activities=kinds).__enter__()
        if done == plan.timed + 2 and self.device.type == "cuda":
            self.catch = warnings.catch_warnings(record=True)
            self.warned = self.catch.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def _mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.process_time())

    def _window(self, done: int) -> None:
        self._sync()
        now = {"wall_s": time.perf_counter(), "cpu_s": time.process_time(), "wait_s": self.wait_s}
        if done > self.plan.warm_up:
            self.seen.windows.append({name: value - self.edge[name] for name, value in now.items()})
        self.edge = now

    def _end_of_timing(self) -> None:
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if self.device.type == "cuda":
            self.seen.step_ms = [before.elapsed_time(after) for before, after in pairs]
            self.seen.allocated_gib = torch.cuda.max_memory_allocated() / 2**30
            self.seen.reserved_gib = torch.cuda.max_memory_reserved() / 2**30
        else:
            self.seen.step_ms = [1000 * (after - before) for before, after in pairs]
        if "torch._dynamo" in sys.modules:
            counters = sys.modules["torch._dynamo.utils"].counters
            self.seen.counts |= {
                "graphs": counters["stats"].get("unique_graphs", 0),
                "graph breaks": sum(counters["graph_break"].values()),
                "recompiles": _compiled_frames() - self.graphs,
            }

    def _read_profile(self, events: Any) -> None:
        names = [event.name for event in events]
        reads = [event for event in events if READS in event.name and not _within(event, "aten::_fused_")]
        self.seen.counts["host reads"] = len(reads)
        if self.device.type == "cuda":
            self.seen.counts["kernel launches"] = sum(name in LAUNCHES for name in names)
            self.seen.counts["graph launches"] = sum("GraphLaunch" in name for name in names)
        self.seen.comm = exposed(events)

    def _sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def exposed(events: Any) -> dict[str, float]:
    """Milliseconds of collectives in a profile, in all, and while nothing else ran on the device.

    On a CPU a collective lasts from when it was asked for until it was there.
    """
    gpu = any("cuda" in str(e.device_type).lower() and "nccl" in e.name.lower() for e in events)
    comm: list[tuple[float, float]] = []
    work: list[tuple[float, float]] = []
    for event in events:
        span = (event.time_range.start, event.time_range.end)
        name = event.name.lower()
        if gpu and "cuda" in str(event.device_type).lower():
            (comm if "nccl" in name else work).append(span)
        elif not gpu and name.startswith("gloo:"):
            comm.append(span)
        elif not gpu and name.startswith("aten::"):
            work.append(span)
    return {"collective_ms": _length(_union(comm)) / 1000,
            "exposed_ms": (_length(_union([*comm, *work])) - _length(_union(work))) / 1000}  # fmt: skip


def _within(event: Any, name: str) -> bool:
    """Whether an event happened inside one of that name: fused optimizers read their counters on CPUs."""
    while event := event.cpu_parent:
        if event.name.startswith(name):
            return True
    return False


def _union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _length(spans: list[tuple[float, float]]) -> float:
    return sum(end - start for start, end in spans)


def _flat(args: Any) -> Iterator[Any]:
    for arg in args:
        if isinstance(arg, (list, tuple)):
            yield from _flat(arg)
        else:
            yield arg


def _compiled_frames() -> int:
    """How many frames were compiled so far, again or for the first time."""
    if "torch._dynamo" not in sys.modules:
        return 0
    metrics: Callable[[], Any] = sys.modules["torch._dynamo.utils"].get_compilation_metrics
    return len(metrics())
