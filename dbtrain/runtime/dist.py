"""Communication between ranks. Only this module and `train.parallel` use torch.distributed.

Every function also works without a process group, as a world of one rank. Control messages are CPU
tensors on gloo, so that they never stall a GPU stream. Gradients use the device's backend.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from dbtrain.runtime import slurm
from dbtrain.runtime.errors import ConfigError, Lost, Preempted, os_problem, reason
from dbtrain.runtime.heartbeat import GAVE_UP, PATIENCE_S, Heartbeat

PATIENCE = timedelta(hours=2)  # while preparing: the ranks' shares of work differ, and one may download
OF_RANKS = ("gloo", "NCCL", "imed out", "pair closure")  # in errors; the last beside one that timed out

_group: torch_dist.ProcessGroup | None = None  # used while training; has its own timeout
_groups: dict[float, torch_dist.ProcessGroup] = {}  # by timeout in seconds
_wait = PATIENCE
_heartbeat: Heartbeat | None = None
_alone = False


def init() -> None:
    """Join the process group that torchrun's or srun's variables describe. Does nothing in a world of one."""
    global _heartbeat
    slurm.adopt()
    if world() == 1 or is_initialized():
        return
    if device().type == "cuda":
        torch.cuda.set_device(device())
    hosts = rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    torch_dist.init_process_group(
        _backend(), timeout=PATIENCE, store=_store("ranks", hosts, PATIENCE), rank=rank(), world_size=world()
    )
    _heartbeat = Heartbeat(_store("pulse", False, timedelta(seconds=30)), rank(), world())


def _store(prefix: str, hosts: bool, timeout: timedelta) -> torch_dist.Store:
    """The store through which the ranks of one attempt find each other.

    Since torch 2.13 torchrun's own store outlives its restarts, and restarted ranks could find the
    addresses of their predecessors. With several nodes the restart count is not used, because nodes may
    disagree on it: the batch system restarts such a job as a whole.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = torch_dist.TCPStore(
        address, port, is_master=hosts, timeout=timeout, wait_for_workers=False, multi_tenant=True
    )
    one_node = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_node else "0"
    return torch_dist.PrefixStore(f"{prefix}/{attempt}/", store)


@contextmanager
def training(timeout_s: float) -> Iterator[None]:
    """In the block, no rank waits for another for longer than `timeout_s`."""
    global _group, _wait
    _wait = timedelta(seconds=timeout_s)
    if world() > 1 and timeout_s not in _groups:
        _groups[timeout_s] = torch_dist.new_group(backend=_backend(), timeout=_wait)
    _group = _groups.get(timeout_s)
    try:
        yield
    finally:
        _group, _wait = None, PATIENCE


@contextmanager
def patiently() -> Iterator[None]:
    """In the block, ranks wait for each other for up to `PATIENCE`, because their shares of work differ."""
    global _wait
    before, _wait = _wait, PATIENCE
    try:
        yield
    finally:
        _wait = before


def group() -> torch_dist.ProcessGroup | None:
    """The process group in which gradients are averaged. None is the default group."""
    return _group


def sharing(how: str, timeout_s: float) -> torch_dist.ProcessGroup | None:
    """The group of the ranks that hold a model together: of a "node", or "all"; None for "none", or if alone.

    Its collectives have the timeout of `training`. Call this on every rank.
    """
    if how == "none" or world() == 1:
        return None
    nodes: dict[str, list[int]] = {}
    for number, node in enumerate(gather_json(os.environ.get("GROUP_RANK") or socket.gethostname())):
        nodes.setdefault(node if how == "node" else "", []).append(number)
    groups = list(nodes.values())
    timeout = timedelta(seconds=timeout_s)
    mine, _ = torch_dist.new_subgroups_by_enumeration(groups, timeout=timeout, backend=_backend())
    return mine if mine.size() > 1 else None


def at(step: int) -> None:
    """Publish the step that this rank is at, so that the others can report it if the rank dies."""
    if _heartbeat:
        _heartbeat.step = step


def _backend() -> str:
    return "cpu:gloo,cuda:nccl" if device().type == "cuda" else "gloo"


def is_initialized() -> bool:
    return torch_dist.is_initialized()


def rank() -> int:
    return 0 if _alone else int(os.environ.get("RANK", "0"))


def world() -> int:
    return 1 if _alone else int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def alone() -> Iterator[None]:
    """In the block, this rank works for itself, as a world of one."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world() -> int:
    """How many ranks this node has."""
    given = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")
    return int(given.partition("(")[0].partition(",")[0])  # SLURM: for example `4(x2)`


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    """This rank's device: its GPU if there is one, else the CPU.

    srun may expose only its own GPU to each task; that GPU is then number 0.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank() % torch.cuda.device_count())


def lost(error: Exception) -> Lost | None:
    """A `Lost` if the error means that another rank is gone or does not answer, else None."""
    of_torch = isinstance(error, torch_dist.DistError) or "connectFullMesh" in str(error)
    if of_torch and not _heartbeat:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        return Lost(f"cannot join the other ranks at {place}: {reason(error)}", ended=True)
    if not _heartbeat or not (of_torch or any(word in str(error) for word in OF_RANKS)):
        return None
    culprit, ended = _heartbeat.absent()
    return Lost(f"{culprit}; this rank gives up at step {_heartbeat.step}: {reason(error)}", ended)


def finish(code: int) -> None:
    """End this process with `code` if it uses a process group; otherwise return.

    gloo's threads outlive destroy_process_group() and abort the interpreter in a third of all runs
    (torch 2.13). So this flushes the output and skips the interpreter's shutdown.
    """
    if is_initialized():
        if _heartbeat:
            _heartbeat.close(GAVE_UP if code == 3 else f"exit code {code}" if code else "")
        if rank() == 0 and code in (1, 2, 3) and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            time.sleep(2 * PATIENCE_S)  # the store ends with this process; let the others read it first
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def gather_json(value: Any) -> list[Any]:
    """The JSON-serializable values of all ranks, in rank order, on every rank."""
    if world() == 1:
        return [value]
    message = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world())]
    _wait_for(torch_dist.all_gather(sizes, torch.tensor([len(message)]), async_op=True))
    padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
    padded[: len(message)] = message
    everyone = [torch.zeros_like(padded) for _ in range(world())]
    _wait_for(torch_dist.all_gather(everyone, padded, async_op=True))
    return [json.loads(bytes(text[: int(size)].tolist())) for text, size in zip(everyone, sizes, strict=True)]


def barrier() -> None:
    """Wait until every rank is here, however long they have worked for themselves."""
    if _heartbeat:
        _heartbeat.barrier()


def _wait_for(work: torch_dist.Work) -> None:
    """Wait for a collective until the timeout of the current phase."""
    if not work.wait(_wait):
        raise RuntimeError("gloo: timed out")


def from_main(value: Any) -> Any:
    """Rank 0's JSON-serializable value, on every rank."""
    return gather_json(value if is_main() else None)[0]


@contextmanager
def agreed() -> Iterator[None]:
    """Raise a ConfigError, OSError or Preempted that one rank raises in the block on all ranks.

    Otherwise the other ranks would wait for it in their next collective. Every rank must enter the
    block, and the block must contain no collective.
    """
    problems: tuple[str, ...] = ()
    stopped = ""
    try:
        yield
    except ConfigError as error:
        problems = error.problems
    except OSError as error:
        problems = (os_problem(error),)
    except Preempted as stop:
        stopped = str(stop)
    everyone = gather_json([problems, stopped])
    if lines := [line for lines, _ in everyone for line in lines]:
        raise ConfigError(*dict.fromkeys(lines), shared=True)
    if stops := [stop for _, stop in everyone if stop]:
        raise Preempted(stops[0])


@contextmanager
def leaders_first() -> Iterator[None]:
    """Run the block on one rank of each node, then on the others. It must contain no collective."""
    if local_rank():
        gather_json(None)
    yield
    if not local_rank():
        gather_json(None)


class Vote:
    """The maximum of one number per rank and step, known to every rank one step later.

    No rank waits for the others, and all ranks act on the result at the same step.
    """

    def __init__(self) -> None:
        self.pending: tuple[Tensor, torch_dist.Work] | None = None

    def cast(self, number: int) -> int:
        """Cast a number; return the maximum of the previous step (in a world of one: of this step)."""
        if world() == 1:
            return number
        before = self.pending
        ballot = torch.tensor([number])
        self.pending = (
            ballot,
            torch_dist.all_reduce(ballot, torch_dist.ReduceOp.MAX, group=_group, async_op=True),
        )
        if before:
            _wait_for(before[1])
            return int(before[0])
        return 0


def assert_same(value: str, what: str) -> None:
    """Raise ConfigError on every rank unless all ranks have the same `value`."""
    values = gather_json(value)
    different = [str(number) for number, other in enumerate(values) if other != values[0]]
    if different:
        raise ConfigError(f"{what} differs between rank 0 and rank {', '.join(different)}", shared=True)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of a tensor over all ranks, on its device. The input stays unchanged."""
    total = values.clone()
    if world() > 1:
        torch_dist.all_reduce(total, group=_group)
    return total


def min_over_ranks(values: Tensor) -> Tensor:
    """Elementwise minimum of a tensor over all ranks, on its device."""
    least = values.clone()
    if world() > 1:
        torch_dist.all_reduce(least, torch_dist.ReduceOp.MIN, group=_group)
    return least
