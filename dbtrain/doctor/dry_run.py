"""A run of two steps in a temporary folder, by the verbs themselves: what no look at files can find."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from dbtrain.config import Config
from dbtrain.data import photos
from dbtrain.doctor.case import Case, Found, error, ok, ranks_of
from dbtrain.doctor.gpu import gpus
from dbtrain.runtime import files
from dbtrain.runtime.run_folder import RunFolder, read_lines
from dbtrain.train import cuda_graph

STEPS = 2
PICTURES = 2  # photos, and class images


def dry_run(case: Case) -> Iterator[Found]:
    """Prepare a few pictures, train two steps, export; a line each, or the run's own error."""
    _ = case.base  # raises Unknown: it would be downloaded
    ranks = _possible(case)
    with tempfile.TemporaryDirectory(prefix="dbtrain-dry-run-") as scratch:
        folder = Path(scratch)
        cfg = shortened(case.cfg, folder)
        (folder / "config.yaml").write_text(cfg.dump())
        for verb in ("prepare", "train") if cfg.prepare else ("train",):
            since = time.perf_counter()
            problems = _failure(verb, folder / "config.yaml", ranks)
            yield from problems
            if problems:
                return
            said = (
                _told(RunFolder(folder / "run"), cfg.train.steps)
                if verb == "train"
                else "a few photos and class images"
            )
            yield ok(
                f"{verb}: {said}; {time.perf_counter() - since:.0f} s with its start, {_processes(ranks)}"
            )


def _possible(case: Case) -> int:
    """As many processes as are to train, if this machine has the GPUs for them; else one."""
    ranks, here = ranks_of(case, gpus(case)), torch.cuda.device_count() or os.cpu_count() or 1
    fits = case.cfg.train.global_batch % (ranks * case.cfg.train.micro_batch) == 0
    return ranks if fits and ranks <= here else 1


def _processes(ranks: int) -> str:
    return f"{ranks} process" + "es" * (ranks > 1)


def shortened(cfg: Config, folder: Path) -> Config:
    """The config for two steps on few pictures, all of it below `folder`; what computes stays as it is."""
    # A recording is made after some steps, and replayed from then on.
    steps = cuda_graph.WARM_UP[True] + STEPS if cfg.train.cuda_graph else STEPS
    changes = {
        "run_dir": str(folder / "run"), "hub": type(cfg.hub)(),
        "train": cfg.train.model_copy(
            update={"steps": steps, "log_every": 1, "checkpoint_every": steps, "wandb": None}
        ),
        "optim": cfg.optim.model_copy(update={"warmup_steps": min(cfg.optim.warmup_steps, steps)}),
        "sample": cfg.sample.model_copy(update={"prompts": (), "steps": min(cfg.sample.steps, STEPS)}),
        "validation": cfg.validation.model_copy(update={"images": 1}),
    }  # fmt: skip
    if cfg.prepare:
        sampling = cfg.prepare.sampling
        changes["data"] = cfg.data.model_copy(update={"shards": str(folder / "shards")})
        changes["prepare"] = cfg.prepare.model_copy(update={
            "photos": str(_some_photos(cfg, folder / "photos")), "class_dir": str(folder / "class"),
            "class_images": PICTURES, "held_out": 0, "class_held_out": 0,
            "sampling": sampling.model_copy(update={"steps": min(sampling.steps, STEPS)}),
        })  # fmt: skip
    return cfg.model_copy(update=changes)


def _some_photos(cfg: Config, folder: Path) -> Path:
    """A folder with copies of the first photos, and their captions."""
    assert cfg.prepare is not None
    folder.mkdir()
    for path in photos.of_subject(cfg.prepare)[:PICTURES]:
        for one in (path, path.with_suffix(".txt")):
            if one.is_file():
                shutil.copyfile(one, folder / one.name)
    if cfg.prepare.class_dir and files.expand(cfg.prepare.class_dir).is_dir():
        (folder.parent / "class").mkdir()
        for path in photos.find(cfg.prepare.class_dir, "prepare.class_dir", ignore=(".txt",))[:PICTURES]:
            shutil.copyfile(path, folder.parent / "class" / path.name)
    return folder


def _failure(verb: str, config: Path, ranks: int) -> list[Found]:
    """What a verb, run in processes of its own, says went wrong."""
    launcher = [sys.executable, "-m", "dbtrain"]
    if ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                    f"--nproc-per-node={ranks}", "-m", "dbtrain"]  # fmt: skip
    # Not the variables of whoever started this process: the dry run starts its own ranks.
    started = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS")
    env = {name: value for name, value in os.environ.items() if name not in started}
    done = subprocess.run([*launcher, verb, str(config)], capture_output=True, text=True, env=env)
    if done.returncode == 0:
        return []
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    told = [line.partition("error: ")[2] for line in lines if line.startswith("error: ")] or lines[-1:]
    return [error(f"{verb} ended with exit code {done.returncode}: {line}", "see the rows above, or run it")
            for line in told]  # fmt: skip


def _told(run: RunFolder, steps: int) -> str:
    """Time and memory of the last step, and what was exported."""
    speed = read_lines(run.table("speed"))[-1]
    exported = sorted(str(path.relative_to(run.path)) for path in run.export.rglob("*.safetensors"))
    return (
        f"{steps} steps, {speed['step_ms']:.0f} ms for the last, at most {speed['peak_gib']:.2f} GiB; "
        f"wrote {', '.join(exported)}"
    )
