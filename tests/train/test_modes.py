"""Every way to compute a step gives the plain one's losses, as exactly as its arithmetic allows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dbtrain.data.batch import Batch
from dbtrain.models import kernels
from dbtrain.runtime.errors import ConfigError
from dbtrain.train import cuda_graph
from dbtrain.train.checkpoint import Progress
from dbtrain.train.step import compute_step, train_step
from tests import bases
from tests.conftest import Make, thinned, train
from tests.networks import awake, build, stream

STEPS = 3


@dataclass(frozen=True)
class Mode:
    """Settings that shall change nothing, and by how much losses and gradients may differ, relatively."""

    settings: dict[str, Any]
    losses: float
    grads: float  # of the norm of each parameter's gradient


MODES = {
    "channels last": Mode({"channels_last": True}, 1e-5, 1e-4),
    "math attention": Mode({"attention": "math"}, 1e-5, 1e-4),
    "flash attention": Mode({"attention": "flash"}, 1e-5, 1e-4),
    "micro-batches": Mode({"micro_batch": 1}, 1e-5, 1e-4),
    "checkpointing": Mode({"gradient_checkpointing": "blocks"}, 0, 0),
    "checkpointing of transformers": Mode({"gradient_checkpointing": "transformer"}, 0, 0),
    "int8 linears": Mode({"base_linears": "int8"}, 2e-2, 2e-1),
    "fp8 linears": Mode({"base_linears": "fp8"}, 5e-2, 5e-1),
    "4-bit linears": Mode({"base_linears": "nf4"}, 1e-1, 1),
    "8-bit products": Mode({"base_linears": "int8-dynamic"}, 2e-2, 2e-1),
    "bf16": Mode({"precision": "bf16"}, 2e-2, 1e-1),
    "pure bf16": Mode({"precision": "pure-bf16"}, 2e-2, 2e-1),
    "fp16": Mode({"precision": "fp16"}, 5e-3, 3e-2),
}  # fmt: skip
COMPILED = {  # on a slim base: half a minute of g++
    "inductor": Mode({"compile": True}, 1e-5, 1e-4),
    "aot_eager": Mode({"compile": "regional"}, 1e-5, 1e-4),
}


def steps(
    make: Make, prepared: Path, settings: dict[str, Any], backend: str = "inductor"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of a few steps, and the last gradient."""
    cfg = make(**{f"train__{key}": value for key, value in ({"micro_batch": 4} | settings).items()})
    model, batches = awake(build(cfg, prepared)), stream(cfg, prepared)
    names = set(model.state_dict())
    if cfg.train.compile:
        kernels.compile_module(model.denoiser, cfg.train.compile, backend)
    progress, losses = Progress.begin(model, cfg), []
    with kernels.attention(cfg.train.attention, torch.device("cpu")):
        for step in range(STEPS):
            losses.append(train_step(model, progress, batches, step, cfg).losses)
    batches.close()
    assert set(model.state_dict()) == names, "compiling renames nothing"
    return torch.stack(losses), {name: p.grad for name, p in model.trainable().items() if p.grad is not None}


def compare(make: Make, prepared: Path, mode: Mode, backend: str = "inductor") -> None:
    (plain, plain_grads), (losses, grads) = (steps(make, prepared, s, backend) for s in ({}, mode.settings))
    torch.testing.assert_close(losses, plain, rtol=mode.losses, atol=0)
    assert grads.keys() == plain_grads.keys()
    for name, grad in plain_grads.items():  # every layer: a mode may lose the gradient of some
        assert (grads[name] - grad).norm() <= mode.grads * grad.norm(), name


@pytest.mark.parametrize("name", thinned(MODES, 4))
def test_a_mode_gives_the_plain_losses(make: Make, prepared: Path, name: str) -> None:
    compare(make, prepared, MODES[name])


@pytest.mark.slow
@pytest.mark.xdist_group("inductor")  # the next one finds most kernels in the cache
@pytest.mark.parametrize("backend", COMPILED)
def test_a_compiled_step_gives_the_plain_losses(make: Make, prepared: Path, backend: str) -> None:
    compare(partial(make, model__path=str(bases.sd(size="slim"))), prepared, COMPILED[backend], backend)


def test_rows_on_the_device_are_the_same_batches(make: Make, prepared: Path) -> None:
    cfg = make(train__micro_batch=2)
    streamed, resident = stream(cfg, prepared), stream(cfg, prepared, resident_gib=1.0)
    assert resident.resident and not streamed.resident
    for _ in range(9):
        one, other = next(streamed), next(resident)
        assert torch.equal(one.stored["mean"], other.stored["mean"])
        assert torch.equal(one.stored["std"], other.stored["std"])
        assert torch.equal(one.noise, other.noise) and one.seen == other.seen
    assert set(resident.cache.reads.values()) == {1}, "each shard is read once"
    for batches in (streamed, resident):
        batches.close()
    too_large = stream(cfg, prepared, resident_gib=1e-6)
    too_large.close()
    assert not too_large.resident


def test_a_peeked_batch_is_still_the_next_one(make: Make, prepared: Path) -> None:
    cfg = make()
    batches = stream(cfg, prepared)
    first, second = batches.peek(), batches.micro_batch(0, 1)
    assert next(batches) is first and next(batches).seen == second.seen
    batches.close()


def test_a_recorded_step_reads_its_inputs_from_the_same_tensors(make: Make, prepared: Path) -> None:
    """What a recording relies on: batches copied into those of the first step give every step's result."""
    results = []
    for copied in (False, True):
        cfg = make(train__micro_batch=2)
        model, batches = awake(build(cfg, prepared)), stream(cfg, prepared)
        progress = Progress.begin(model, cfg)
        kept: list[Batch] = []
        for _ in range(STEPS):
            given = [next(batches) for _ in range(2)]
            if copied and kept:
                for mine, other in zip(kept, given, strict=True):
                    mine.take(other)
                given = kept
            kept = given
            outcome = compute_step(model, progress, given, cfg)
        batches.close()
        results.append(torch.cat([outcome.losses, outcome.grad_norm[None]]))
    assert torch.equal(*results)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    ("precision", "name"),
    [("fp32", "adamw"), ("fp32", "prodigy"), ("bf16", "adamw"), ("pure-bf16", "adamw"), ("fp16", "adamw"),
     ("fp16", "prodigy")],
)  # fmt: skip
def test_a_replayed_graph_gives_the_unrecorded_step(
    make: Make, prepared: Path, precision: str, name: str
) -> None:
    results = []
    for recorded in (False, True):
        cfg = make(
            train__micro_batch=2, train__precision=precision, train__cuda_graph=recorded, train__ema=0.9,
            optim={"name": name},
        )  # fmt: skip
        model = awake(build(cfg, prepared)).cuda()
        batches = stream(cfg, prepared, device=torch.device("cuda"))
        with cuda_graph.on_side_stream(recorded):
            compute = cuda_graph.recorded(compute_step, distributed=False) if recorded else compute_step
            progress, losses = Progress.begin(model, cfg), []
            for step in range(8):
                losses.append(train_step(model, progress, batches, step, cfg, compute).losses.clone())
        batches.close()
        assert progress.ema
        grads = (p.grad for p in model.trainable().values())
        results.append([torch.stack(losses), *grads, *progress.ema.averages])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_a_graph_needs_a_gpu_and_no_dropout(make: Make, prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.cuda_graph is true.*dropout to 0"):
        make(train__cuda_graph=True, adapter__dropout=0.1)
    if not torch.cuda.is_available():
        (tmp_path / "shards").symlink_to(prepared)
        with pytest.raises(ConfigError, match="there is no CUDA GPU here"):
            train(make(train__cuda_graph=True))


def test_attention_takes_the_kernels_that_it_is_told(make: Make, prepared: Path) -> None:
    ran = {}
    for name in ("auto", "flash", "math"):
        cfg = make(train__attention=name)
        model, batches = build(cfg, prepared), stream(cfg, prepared)
        activities = [torch.profiler.ProfilerActivity.CPU]
        with kernels.attention(name, torch.device("cpu")), torch.profiler.profile(activities=activities) as p:
            model(next(batches))
        batches.close()
        ran[name] = any("flash_attention" in event.key for event in p.key_averages())
    assert ran == {"auto": True, "flash": True, "math": False}
