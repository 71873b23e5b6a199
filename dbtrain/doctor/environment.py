"""Installed packages and the launcher: checks that run before torch is imported."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from importlib import metadata, util

from packaging.requirements import Requirement

from dbtrain.doctor.case import Case, Finding, error, ok, warning
from dbtrain.runtime import files

SHOWN = ("torch", "diffusers", "transformers", "peft")
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
START = "start it with torchrun or srun, or unset these variables"


def versions(case: Case | None = None) -> Iterator[Finding]:
    """Installed versions, against the package's requirements."""
    try:
        needed = [Requirement(text) for text in metadata.requires("dbtrain") or ()]
    except metadata.PackageNotFoundError:
        yield warning("dbtrain is not installed, so its requirements are unknown", "run: pip install -e .")
        return
    for one in needed:
        if one.marker and not one.marker.evaluate({"extra": ""}):
            continue
        found = version(one.name)
        if found is None:
            yield error(f"{one.name} is not installed", f"run: pip install '{one}'")
        elif not one.specifier.contains(found, prereleases=True):
            yield error(f"{one.name} is {found}, needs {one.specifier}", f"run: pip install -U '{one}'")
    yield ok(", ".join(f"{name} {version(name)}" for name in SHOWN))


def version(package: str) -> str | None:
    """The installed version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def packages(case: Case) -> Iterator[Finding]:
    """Optional packages that the config needs."""
    cfg = case.cfg
    scheme = files.scheme_of(cfg.data.shards)
    for asked, why, package, extra in (
        (cfg.train.wandb, "train.wandb", "wandb", "wandb"),
        (scheme in files.REMOTE, f"data.shards '{cfg.data.shards}'", "fsspec", "remote"),
        (scheme == "s3", f"data.shards '{cfg.data.shards}'", "s3fs", "remote"),
    ):
        if asked and util.find_spec(package) is None:
            yield error(
                f"{why} needs {package}, which is not installed", f"run: pip install 'dbtrain[{extra}]'"
            )
    without = (
        "" if util.find_spec("tensorboard") else "; no tensorboard, so the run writes no TensorBoard log"
    )
    yield ok(f"checked what the config needs{without}")


def started(case: Case | None = None) -> Iterator[Finding]:
    """Whether the variables of torchrun and srun are complete and consistent."""
    given = {name: os.environ[name] for name in (*NUMBERS, "MASTER_ADDR") if os.environ.get(name)}
    if invalid := [f"{n}={given[n]}" for n in NUMBERS if n in given and not given[n].isdigit()]:
        yield error(f"{', '.join(invalid)}: not a number", START)
        return
    tasks = _number("SLURM_STEP_NUM_TASKS")
    if tasks > 1 and "RANK" not in given:  # ranks of srun, whose variables torchrun's are set from
        yield from _tasks(tasks)
        return
    world = int(given.get("WORLD_SIZE", 1))
    if "RANK" in given and "WORLD_SIZE" not in given:
        yield error(f"RANK is {given['RANK']}, but WORLD_SIZE is not set: each rank would train alone", START)
    elif world > 1 and "RANK" not in given:
        yield error(f"WORLD_SIZE is {world}, but RANK is not set: every process would be rank 0", START)
    elif int(given.get("RANK", 0)) >= world:
        yield error(f"RANK is {given['RANK']}, but WORLD_SIZE is {world}", START)
    if world > 1 and (missing := [name for name in ADDRESS if name not in given]):
        yield error(f"WORLD_SIZE is {world}, but there is no {' and no '.join(missing)} to connect to",
                    START)  # fmt: skip
    if world > 1 and "RANK" in given and "LOCAL_RANK" not in given:
        yield warning("LOCAL_RANK is not set: all ranks of a node would use its first GPU", START)
    yield ok(f"rank {given['RANK']} of {world}" if "RANK" in given else "one process")


def _tasks(tasks: int) -> Iterator[Finding]:
    """The number of srun tasks, against the GPUs of their node."""
    here, gpus = _number("SLURM_NTASKS_PER_NODE"), _number("SLURM_GPUS_ON_NODE")
    here = here or -(-tasks // max(1, _number("SLURM_STEP_NUM_NODES") or _number("SLURM_JOB_NUM_NODES")))
    cure = f"use srun --ntasks-per-node={gpus}, or request other --gpus-per-node"
    if gpus and here > gpus:
        yield error(f"srun starts {here} tasks on a node with {gpus} GPUs, but NCCL cannot share a GPU", cure)
    elif gpus > here:
        yield warning(f"srun starts {here} tasks on a node with {gpus} GPUs: the other GPUs stay idle", cure)
    yield ok(f"{tasks} srun tasks")


def job(case: Case) -> Iterator[Finding]:
    """The batch job's remaining time, against the time that a run needs for its last checkpoint."""
    if not os.environ.get("SLURM_JOB_ID"):
        yield ok("not in a SLURM job")
        return
    before, end = case.cfg.faults.stop_before_s, os.environ.get("SLURM_JOB_END_TIME", "")
    if not end.isdigit():
        yield warning(
            "SLURM_JOB_END_TIME is not set, so the run cannot save before the job's time limit",
            "submit with launch/train.sbatch, which sets it, or with --signal=USR1@180",
        )
        return
    left = float(end) - time.time()
    cure = "request more time, or lower faults.stop_before_s"
    if left <= before:
        yield error(f"the job ends in {left:.0f} s: a run stops {before:g} s before, so at once", cure)
    elif left < 2 * before:
        yield warning(f"the job ends in {left:.0f} s, and a run stops {before:g} s before", cure)
    else:
        yield ok(f"the job ends in {left / 60:.0f} min; a run stops {before:g} s before")


def _number(name: str) -> int:
    """The number that a SLURM variable starts with; 0 if it is not set."""
    digits = os.environ.get(name, "").partition("(")[0]
    return int(digits) if digits.isdigit() else 0
