"""What `doctor` says about the memory that training takes, and which settings fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from dbtrain.config import Config
from dbtrain.data.sizes import Size
from dbtrain.doctor.plans import Plan, plans
from dbtrain.models import denoiser
from dbtrain.models.base import Base
from dbtrain.models.denoiser import Work
from dbtrain.models.pretrained import DTYPES
from dbtrain.runtime import dist
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.memory import GIB
from dbtrain.train.memory import Prediction, memory_of, predict

NOTABLY = 0.95  # of a step's time: shorter ones are worth a change
LONGEST = 512  # tokens of a prompt, where prompts differ in length
PRECISE = ("full", "int8", "int8-dynamic", "fp8", "nf4")  # in order of their errors


def report(cfg: Config, gib: float | None = None, ranks: int = 1) -> Iterator[str]:
    """Lines about the memory that training takes on each of `ranks` devices, and about other settings.

    `gib`: memory of the GPU to train on, if it is not in this machine. Without any GPU, the lines are about
    the CPU. If training does not fit, raises ConfigError after the last line, with settings that would.
    """
    # The prediction.
    base = Base.find(cfg.model)
    device = "cuda" if gib or torch.cuda.is_available() else "cpu"
    has = gib * GIB if gib else memory_of(dist.device())
    found = predict(cfg, base, device, ranks, has=has if device == "cuda" else 0.0)
    count = found.blocks_to_swap(has) if cfg.train.swap_blocks == "auto" else 0
    found = found.swapped(count) if count else found
    yield f"for training on a {'GPU' if device == 'cuda' else 'CPU (--gib SIZE: on a GPU)'}, GiB"
    yield from _parts(found, device)
    if count:
        yield f"train.swap_blocks=auto swaps {count} of {len(found.weights.blocks)} blocks"
    if cfg.train.shard != "none" and ranks > 1:
        yield f"each GPU holds {found.kept} of {len(found.weights.blocks)} blocks whole"
    if cfg.train.compile:
        yield "train.compile is on: it keeps fewer activations than eager training, which this predicts"
    if device == "cpu":
        return
    yield from generating(cfg, base, has)
    # Other settings.
    fits = found.needed <= has
    yield f"{'fits' if fits else 'does not fit'} into {has / GIB:.1f} GiB"
    every = plans(cfg, base, has, ranks, [cfg.train.micro_batch] if fits else _micro_batches(cfg, ranks))
    every = [replace(plan, takes=found) if not plan.changes(cfg) else plan for plan in every]
    yield "by the time of a step, estimated for a GPU with 100 TFLOP/s, 800 GB/s, and 20 GB/s from outside:"
    yield from _table(every, has)
    if fits:
        now, best = next((plan for plan in every if not plan.changes(cfg)), None), _best(every, has)
        if now and best and best.step_s < NOTABLY * now.step_s:
            yield f"faster, and fits too: {' '.join(best.changes(cfg))}"
        return
    raise ConfigError(
        f"training needs {found.needed / GIB:.2f} GiB, which does not fit into {has / GIB:.1f} GiB"
        f"{_instead(cfg, every, has)}"
    )


def generating(cfg: Config, base: Base, has: float) -> Iterator[str]:
    """What images take that are generated before and after training, which swap blocks as they need to."""
    prepare, sample, vae = cfg.prepare, cfg.sample, tuple(filter(None, [base.family.vae]))
    tasks: list[tuple[str, str, str, Work]] = []
    if prepare and prepare.has_class_images:
        how, beside = prepare.sampling, vae if prepare.class_pictures or base.family.needs_vae else ()
        work = Work.of([], how.batch, how.guidance, Size.square(prepare.side), beside)
        tasks.append(("class images", "prepare.sampling.batch", how.precision, work))
    if prepare and sample.prompts:
        work = Work.of(
            [], sample.batch, sample.guidance, Size.square(prepare.side), (*vae, *base.family.adaptable_text)
        )
        tasks.append(("samples", "sample.batch", sample.precision, work))
    for name, setting, precision, work in tasks if base.family.enlarges == 1 else ():
        takes = denoiser.needs(base, cfg.train.base_linears, DTYPES[precision], replace(work, tokens=LONGEST))
        count = takes.blocks_to_swap(has)
        size = takes.swapped(count)
        swapped = f" with {count} of {len(takes.blocks)} blocks swapped" if count else ""
        cure = f", which is too much; use a smaller {setting}" if size > has else ""
        yield f"generating {name} takes {size / GIB:.2f} GiB{swapped}{cure}"


def _micro_batches(cfg: Config, ranks: int) -> list[int]:
    """The micro-batch, and smaller ones that ranks can share."""
    train = cfg.train
    smaller = (n for n in range(train.micro_batch - 1, 0, -1) if train.global_batch % (n * ranks) == 0)
    return [train.micro_batch, *smaller]


def _instead(cfg: Config, every: Sequence[Plan], has: float) -> str:
    """Settings that fit, without validation images if nothing else does."""
    without = [replace(plan, takes=replace(plan.takes, validation=0)) for plan in every]
    for dropped, found in ((), every), (("validation.prompts=[]",), without):
        if best := _best(found, has):
            return f"; use {' '.join((*dropped, *best.changes(cfg)))}"
    return (
        ", and neither do other settings; use a smaller adapter.rank or prepare.resolution, or a larger GPU"
    )


def _best(every: Sequence[Plan], has: float) -> Plan | None:
    """The plan with the most precise weights among the fastest that fit."""
    fitting = [plan for plan in every if plan.takes.needed <= has]
    fast = [plan for plan in fitting if plan.step_s * NOTABLY <= fitting[0].step_s]
    return min(fast, key=lambda plan: PRECISE.index(plan.settings["base_linears"]), default=None)


def _parts(found: Prediction, device: str) -> Iterator[str]:
    rows = [
        ("base", found.base), ("adapter", found.adapter), ("optimizer", found.moments),
        ("activations", found.activations), ("accumulated gradients", found.gradients),
        *([("blocks gathered from other GPUs", found.gathered)] if found.gathered else []),
        *([("or, instead, validation images", found.validation)] if found.validation else []),
        ("peak", found.peak),
    ]  # fmt: skip
    if device == "cuda":
        rows.append(("with context, workspaces, fragmentation (estimated)", found.needed))
    if found.in_host_memory:
        rows.append(("page-locked host memory of each process", found.in_host_memory))
    yield from (f"  {name:51} {size / GIB:8.3f}" for name, size in rows)


def _table(every: Sequence[Plan], has: float) -> Iterator[str]:
    """A line for each plan. A column stands only if it tells plans apart."""
    names = [name for name in every[0].settings if len({plan.settings[name] for plan in every}) > 1]
    wide = [max(len(name), 4) for name in names]
    yield (
        "  "
        + "  ".join(f"{name:{width}}" for name, width in zip(names, wide, strict=True))
        + ("  GPU, GiB  host, GiB  time")
    )
    fastest = every[0].step_s
    for plan in every:
        settings = "  ".join(
            f"{plan.settings[name]!s:{width}}" for name, width in zip(names, wide, strict=True)
        )
        yield (
            f"  {settings}  {plan.takes.needed / GIB:8.2f}  {plan.host / GIB:9.2f}  "
            f"{plan.step_s / fastest:4.2f}{'  fits' if plan.takes.needed <= has else ''}"
        )
