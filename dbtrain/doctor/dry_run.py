"""A run of two steps in a temporary folder with the real commands, to find what no check of files can."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from dbtrain.config import Config
from dbtrain.data import captions, masks, photos
from dbtrain.doctor.case import Case, Finding, error, ok
from dbtrain.doctor.gpu import ranks_of
from dbtrain.runtime import files
from dbtrain.runtime.run_folder import RunFolder, read_lines
from dbtrain.train import cuda_graph

STEPS = 2
IMAGES = 2  # photos, and class images
# Variables of the launcher that started this process: a run that it starts has ranks of its own.
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
            "SLURM_STEP_NUM_TASKS")  # fmt: skip


def dry_run(case: Case) -> Iterator[Finding]:
    """Prepare a few images, train two steps and sample: one finding each, or the command's own error.

    The commands remember their speed as those of a run do.
    """
    _ = case.base  # raises Unknown instead of downloading it
    ranks = _possible_ranks(case)
    with tempfile.TemporaryDirectory(prefix="dbtrain-dry-run-") as scratch:
        folder = Path(scratch)
        cfg = shortened(case.cfg, folder)
        (folder / "config.yaml").write_text(cfg.dump())
        for verb in _verbs(cfg):
            since = time.perf_counter()
            done = run_command([verb, str(folder / "config.yaml")], ranks)
            if done.returncode:
                yield from _problems(verb, done)
                return
            result = {"prepare": "a few photos and class images", "sample": "one prompt"}.get(verb)
            if verb == "train":
                result = _result(RunFolder(folder / "run"), cfg.train.steps)
            processes = f"{ranks} process" + "es" * (ranks > 1)
            yield ok(f"{verb}: {result}; {time.perf_counter() - since:.0f} s with startup, {processes}")


def _verbs(cfg: Config) -> list[str]:
    asked = {"prepare": cfg.prepare, "train": True, "sample": cfg.sample.prompts}
    return [verb for verb, wanted in asked.items() if wanted]


def _possible_ranks(case: Case) -> int:
    """The processes that will train, if the batch and this machine allow so many; else 1."""
    ranks, here = ranks_of(case), torch.cuda.device_count() or os.cpu_count() or 1
    fits = case.cfg.train.global_batch % (ranks * case.cfg.train.micro_batch) == 0
    return ranks if fits and ranks <= here else 1


def shortened(cfg: Config, folder: Path) -> Config:
    """The config for two steps on few images, with all paths in `folder`. The computation stays the same."""
    # A CUDA graph is recorded after some warm-up steps, and replayed from then on.
    steps = cuda_graph.WARM_UP[True] + STEPS if cfg.train.cuda_graph else STEPS
    changes = {
        "run_dir": str(folder / "run"), "hub": type(cfg.hub)(),
        "train": cfg.train.model_copy(
            update={"steps": steps, "stop": "steps", "log_every": 1, "checkpoint_every": steps, "wandb": None}
        ),
        "optim": cfg.optim.model_copy(update={"warmup_steps": min(cfg.optim.warmup_steps, steps)}),
        "sample": cfg.sample.model_copy(
            update={"prompts": cfg.sample.prompts[:1], "images": 1, "steps": min(cfg.sample.steps, STEPS)}
        ),
        "validation": cfg.validation.model_copy(update={"images": 1}),
    }  # fmt: skip
    if cfg.prepare:
        sampling = cfg.prepare.sampling
        changes["data"] = cfg.data.model_copy(update={"shards": str(folder / "shards")})
        found = [_some_photos(one, folder / f"photos-{k}") for k, one in enumerate(cfg.each_subject())]
        changes["subjects"] = tuple(
            one.model_copy(update={"photos": there}) for one, there in zip(cfg.subjects, found, strict=False)
        )
        changes["prepare"] = cfg.prepare.model_copy(update={
            "photos": found[0], "class_dir": str(_own_class_images(cfg, folder / "class")),
            "class_images": min(IMAGES, cfg.prepare.class_images), "held_out": 0, "class_held_out": 0,
            "subfolders": False, "repeats": {}, "weights": {},
            "sampling": sampling.model_copy(update={"steps": min(sampling.steps, STEPS)}),
        })  # fmt: skip
    return cfg.model_copy(update=changes)


def _some_photos(cfg: Config, folder: Path) -> str:
    """`folder` with copies of the first photos of a subject, their captions and masks, under new names."""
    assert cfg.prepare is not None
    folder.mkdir()
    for number, path in enumerate(photos.of_subject(cfg.prepare)[:IMAGES]):
        caption, mask, stem = captions.file_of(path), masks.file_of(path), f"{number}-{path.stem}"
        shutil.copyfile(path, folder / f"{stem}{path.suffix}")
        if caption.is_file():
            shutil.copyfile(caption, folder / f"{stem}{caption.suffix}")
        if mask:
            shutil.copyfile(mask, folder / f"{stem}{masks.MASKS[0]}")
    return str(folder)


def _own_class_images(cfg: Config, folder: Path) -> Path:
    """`folder` with copies of the user's first class images, if there are any."""
    assert cfg.prepare is not None
    if cfg.prepare.class_dir and files.expand(cfg.prepare.class_dir).is_dir():
        folder.mkdir()
        for path in photos.find(cfg.prepare.class_dir, "prepare.class_dir", ignore=(".txt",))[:IMAGES]:
            shutil.copyfile(path, folder / path.name)
    return folder


def run_command(arguments: Sequence[str], ranks: int) -> subprocess.CompletedProcess[str]:
    """Run `dbtrain` with these arguments in `ranks` new processes, and capture its output."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *(torchrun if ranks > 1 else []), "-m", "dbtrain", *arguments]
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    return subprocess.run(command, capture_output=True, text=True, env=env)


def _problems(verb: str, done: subprocess.CompletedProcess[str]) -> Iterator[Finding]:
    """The errors that a failed command printed, or else its last line."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines[-1:]
    for line in errors:
        yield error(f"{verb} ended with exit code {done.returncode}: {line}", "see the rows above, or run it")


def _result(run: RunFolder, steps: int) -> str:
    """Time and memory of the last step, and the exported files."""
    speed = read_lines(run.table("speed"))[-1]
    exported = sorted(str(path.relative_to(run.path)) for path in run.export.rglob("*.safetensors"))
    return (
        f"{steps} steps, {speed['step_ms']:.0f} ms for the last, at most {speed['peak_gib']:.2f} GiB; "
        f"wrote {', '.join(exported)}"
    )
