"""The two programs, with the same task and from the same folders, each in processes of its own.

Both are watched from outside, by `hook/sitecustomize.py` on their PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
HOOK, STANDIN = Path(__file__).parent / "hook", Path(__file__).parent / "standin"
PROMPTS = ("a photo of sks mug", "a photo of a mug")
LORA = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Task:
    """What both are to do. A step is `batch` instance and `batch` class images, times `accumulation`."""

    base: Path
    photos: Path
    class_images: int
    resolution: int
    batch: int
    accumulation: int
    rank: int
    lr: float
    steps: int
    precision: str  # fp32 | bf16
    threads: int
    device: str  # cpu | cuda

    @property
    def epoch(self) -> int:
        """Steps until the reference has seen every picture."""
        return -(
            -max(self.class_images, len(list(self.photos.iterdir()))) // (self.batch * self.accumulation)
        )


@dataclass(frozen=True)
class Reference:
    """The reference script, unmodified, and the Python that has what it imports."""

    script: Path
    python: str
    torchvision: bool  # whether that Python can import it; else there is a stand-in

    @classmethod
    def find(cls, script: Path, python: str) -> Reference:
        """Raises FileNotFoundError if there is no such script, RuntimeError if accelerate is missing."""
        if not script.is_file():
            raise FileNotFoundError(f"--script is '{script}', which is no file")
        if not _imports(python, "import accelerate, diffusers, peft"):
            raise RuntimeError(
                f"--python is '{python}', which cannot import accelerate, diffusers and peft: "
                "give a Python of an environment that has them"
            )
        return cls(script.absolute(), python, _imports(python, "from torchvision import transforms"))

    def command(self, task: Task, classes: Path, out: Path, seed: int) -> list[str]:
        """As the script's own documentation has it, with every default that matters said aloud."""
        mixed = {"fp32": "no"}.get(task.precision, task.precision)
        launch = [
            self.python, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1",
            "--mixed_precision", mixed, "--dynamo_backend", "no", "--num_cpu_threads_per_process",
            str(task.threads), *(["--cpu"] if task.device == "cpu" else []),
        ]  # fmt: skip
        settings = {
            "pretrained_model_name_or_path": task.base, "instance_data_dir": task.photos,
            "class_data_dir": classes, "num_class_images": task.class_images, "prior_loss_weight": 1.0,
            "instance_prompt": PROMPTS[0], "class_prompt": PROMPTS[1], "output_dir": out,
            "resolution": task.resolution, "train_batch_size": task.batch,
            "gradient_accumulation_steps": task.accumulation, "rank": task.rank,
            "learning_rate": task.lr, "lr_scheduler": "constant", "lr_warmup_steps": 0,
            "max_train_steps": task.steps, "checkpointing_steps": 10**9, "mixed_precision": mixed,
            "seed": seed,
        }  # fmt: skip
        flags = ["--with_prior_preservation", "--center_crop", "--pre_compute_text_embeddings"]
        words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        return [*launch, str(self.script), *words, *flags]


def settings(task: Task, classes: Path, work: Path, seed: int) -> dict[str, Any]:
    """dbtrain's config of the task; what is not said is its default, as for the reference."""
    return {
        "run_dir": str(work / "run"), "seed": seed, "model": {"path": str(task.base)},
        "prepare": {
            "photos": str(task.photos), "instance_prompt": PROMPTS[0], "class_prompt": PROMPTS[1],
            "class_images": task.class_images, "class_dir": str(classes), "resolution": task.resolution,
            "sampling": {"precision": "fp32" if task.device == "cpu" else "bf16"},
        },
        "data": {"shards": str(work / "shards")},
        "adapter": {"rank": task.rank, "targets": "attention"},
        "optim": {"lr": task.lr},
        "train": {
            "steps": task.steps, "global_batch": task.batch * task.accumulation, "micro_batch": task.batch,
            "precision": task.precision, "checkpoint_every": task.steps,
        },
    }  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What one program took, start to end, and what was seen of it from outside."""

    wall_s: float
    cpu_s: float  # of all its processes
    seen: dict[str, Any]
    folder: Path

    def step(self, first: int) -> dict[str, float]:
        """CPU and wall time of a step after the first `first`, ms: everything between two steps counts."""
        stamps = self.seen["stamps"]
        (wall, cpu), (wall_end, cpu_end) = stamps[first - 1], stamps[-1]
        steps = len(stamps) - first
        return {"cpu": 1000 * (cpu_end - cpu) / steps, "wall": 1000 * (wall_end - wall) / steps}

    @property
    def start_cpu_s(self) -> float:
        """CPU time of the training process up to the end of its first step."""
        return self.seen["stamps"][0][1]

    @property
    def after_cpu_s(self) -> float:
        """CPU time of all the rest: after the last step, and the launcher's."""
        return self.cpu_s - self.seen["stamps"][-1][1]


def run_reference(
    reference: Reference, task: Task, classes: Path, work: Path, seed: int = 0, **watch: Any
) -> Run:
    """The script from its start to its end. `watch`: what the hook is to do besides taking times."""
    if not reference.torchvision:
        watch["standin"] = str(STANDIN)
    _empty(work)
    return _run(reference.command(task, classes, work / "run", seed), task, work, [HOOK], watch)


def run_ours(task: Task, classes: Path, work: Path, seed: int = 0, **watch: Any) -> Run:
    """`dbtrain run`: prepare, train and export, in one process."""
    _empty(work)
    (work / "config.yaml").write_text(yaml.safe_dump(settings(task, classes, work, seed)))
    command = [sys.executable, "-m", "dbtrain", "run", str(work / "config.yaml")]
    return _run(command, task, work, [HOOK, ROOT], watch)


def prepare_ours(task: Task, classes: Path, work: Path, seed: int = 0) -> Path:
    """The class images that dbtrain draws, as files of a folder of their own."""
    _empty(work)
    (work / "config.yaml").write_text(yaml.safe_dump(settings(task, work / "drawn", work, seed)))
    subprocess.run(
        [sys.executable, "-m", "dbtrain", "prepare", str(work / "config.yaml")], check=True,
        env=_env(task, [ROOT]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    classes.mkdir(parents=True, exist_ok=True)
    for picture in sorted((work / "drawn").rglob("*.png")):
        shutil.copy(picture, classes / picture.name)
    return classes


def _run(command: list[str], task: Task, work: Path, paths: list[Path], watch: dict[str, Any]) -> Run:
    seen = work / "seen.json"
    asked = {"out": str(seen), "steps": task.steps, **watch}
    env = _env(task, paths) | {"SIDE_BY_SIDE": json.dumps(asked)}
    with (work / "said.txt").open("wb") as said:
        started = time.perf_counter()
        child = subprocess.Popen(command, env=env, stdout=said, stderr=said, cwd=work)
        _, status, usage = os.wait4(child.pid, 0)  # its children's time as well, if it waited for them
        wall_s = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode or not seen.exists():
        lines = (work / "said.txt").read_text(errors="replace").strip().splitlines()
        told = "\n".join(lines[-15:])
        raise RuntimeError(f"{Path(command[0]).name} ended with code {child.returncode}:\n{told}")
    return Run(wall_s, usage.ru_utime + usage.ru_stime, json.loads(seen.read_text()), work)


def _env(task: Task, paths: list[Path]) -> dict[str, str]:
    """The same threads for both, no network, and nothing else of ours on the path."""
    threads = str(task.threads)
    return {
        **os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _imports(python: str, line: str) -> bool:
    env = {**os.environ, "PYTHONPATH": ""}
    return subprocess.run([python, "-c", line], env=env, capture_output=True).returncode == 0
