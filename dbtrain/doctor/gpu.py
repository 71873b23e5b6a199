"""The GPU: whether there is one, and whether it can do what the config asks for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib import util

import torch

from dbtrain.config import Config
from dbtrain.doctor.case import Case, Finding, error, ok, problems_of, warning
from dbtrain.models import kernels
from dbtrain.runtime import dist, files
from dbtrain.train import cuda_graph

LARGE = 200 << 20  # bytes of a denoiser that is too slow to train on a CPU


def ranks_of(case: Case) -> int:
    """How many processes will train: as given, as launched, or one for each GPU of this machine."""
    if case.ranks:
        return case.ranks
    launched = os.environ.get("WORLD_SIZE", "")
    if launched.isdigit() and int(launched):
        return int(launched)
    return max(1, 0 if case.gib else torch.cuda.device_count())


def gpu(case: Case) -> Iterator[Finding]:
    """The device, its precisions, and its attention kernels."""
    train = case.cfg.train
    found = torch.cuda.is_available()
    if case.gib:
        yield ok(f"a GPU elsewhere with {case.gib:g} GiB; its model is unknown")
    elif not found:
        yield from _none(case)
    else:
        yield from _there(case)
    if train.cuda_graph and not found and case.gib:
        yield warning("train.cuda_graph is true: this machine has no GPU to try it on",
                      "run doctor on the GPU's machine too")  # fmt: skip
    elif not case.gib:
        yield from problems_of(lambda: cuda_graph.check(train.cuda_graph, dist.device()), "set it to false")


def _none(case: Case) -> Iterator[Finding]:
    paths = case.base.weight_files(case.base.family.denoiser) if case.knows("base") else []
    weights = sum(path.stat().st_size for path in paths)
    text = "no CUDA GPU here: trains on the CPU"
    if weights > LARGE:
        yield warning(f"{text}, which takes days: the denoiser has {files.size_text(weights)} of weights",
                      "use a machine with a GPU; --gib SIZE predicts whether it fits")  # fmt: skip
    else:
        yield ok(text)
        yield from _emulated(case.cfg)


def _emulated(cfg: Config) -> Iterator[Finding]:
    """Precisions that a CPU has to emulate, unless it is of the few with units for them."""
    drawn = cfg.prepare and cfg.prepare.has_class_images
    keys = ("train.precision", *(["prepare.sampling.precision"] if drawn else ()), "sample.precision")
    if halved := [f"{key} is {value}" for key in keys if "16" in (value := cfg.get(key))]:
        yield warning(f"{', '.join(halved)}: most CPUs take several times as long for 16 bits as for 32",
                      "use fp32 on a CPU")  # fmt: skip


def _there(case: Case) -> Iterator[Finding]:
    train, about = case.cfg.train, torch.cuda.get_device_properties(dist.device())
    kernel = kernels.preferred(train.attention, dist.device())
    yield ok(f"{torch.cuda.device_count()} x {about.name}, {about.total_memory / 2**30:.1f} GiB each; "
             f"attention: {kernel}")  # fmt: skip
    if "bf16" in train.precision and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield warning(f"train.precision is {train.precision}, which {about.name} emulates slowly",
                      "use train.precision=fp16")  # fmt: skip


def compiling(case: Case) -> Iterator[Finding]:
    """What torch.compile calls: a C++ compiler for CPUs, Triton and a C compiler for GPUs."""
    prepare = case.cfg.prepare
    asked = [name for name, value in (
        ("train.compile", case.cfg.train.compile),
        ("prepare.sampling.compile",
         prepare and prepare.has_class_images and prepare.sampling.compile is True),
    ) if value]  # fmt: skip
    if not asked:
        yield ok("not needed: train.compile is off")
        return
    gpus = torch.cuda.is_available() or case.gib
    compiler = os.environ.get("CC", "gcc") if gpus else os.environ.get("CXX", "g++")
    others = ("cc", "clang") if gpus else ()
    missing = [] if any(map(shutil.which, (compiler, *others))) else [f"the compiler {compiler}"]
    missing += ["Triton"] if gpus and not util.find_spec("triton") else []
    if missing:
        yield error(f"{' and '.join(asked)} needs {' and '.join(missing)}, not found here",
                    f"install it, or set {asked[0]}=false")  # fmt: skip
    else:
        yield ok(f"{' and '.join(asked)}: {compiler}{' and Triton' if gpus else ''} found")
