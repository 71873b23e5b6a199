"""Many subjects, photos to adapters: subjects an hour of a fleet, beside one run after another.

    python -m benchmarks.fleet --model sd15 --steps 400 --subjects 1 4 16

Class images, and with `train.compile` compiled code, are cached before anything is timed; photos are encoded
in every run. *Fixed* is all that is neither training, validation nor export: start, loading, encoding. As the
runs of one subject after another are independent, `--singles` of them are timed for all numbers of subjects.
The subjects are drawn, five photos each; all models but `tiny` have random weights. Times are wall seconds on
a GPU and CPU seconds of one thread on a CPU.

With `--script`, Diffusers' examples/dreambooth/train_dreambooth_lora.py, unmodified, is run on one subject
after another too: as many steps, images and parameters, its class images given. It needs accelerate and
torchvision, which another `--python` may have.

    python -m benchmarks.fleet --model tiny --batch 1 --ranks 1 2 --subjects 16

With `--ranks`, whole commands are timed by the clock instead, in turns.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks import bases, common, job, verbs
from benchmarks.common import Measure, Result, Row
from dbtrain.config import Model
from dbtrain.models.base import Base
from dbtrain.runtime import console
from dbtrain.runtime.hashing import sha256_of
from dbtrain.tiny import world
from dbtrain.tiny.paint import render

PHOTOS, RANK, RATE = 5, 4, 1e-4
Spent = dict[str, float]  # seconds by phase


def run(args: argparse.Namespace, work: Path) -> Result:
    if args.smoke:
        args.model, args.repeats, args.singles, args.subjects = "tiny", 1, 1, [1, 2]
        args.steps, args.class_images = 2, 2
    place = Path(tempfile.mkdtemp(prefix="fleet-", dir=work))
    photos = _photos(place / "photos", max(*args.subjects, args.singles))
    base = bases.model(args.model, work, weights=True).path
    config = _config(args, place, base)
    if args.ranks:
        rows = _by_the_clock(args, base, config, photos, place)
        note = "Wall time of whole commands: runs and the script with all cores, ranks with a thread each."
        name = f"{args.model}-{args.device}-{max(args.subjects)}-on-{max(args.ranks)}-ranks{args.tag}"
        return common.result(args, "fleet", name, rows, note)
    rows = []
    runs = args.singles * (1 + bool(args.script)) + args.repeats * len(args.subjects)
    with console.bar(runs, f"fleet {args.model}", "run") as bar:
        _warm(args, config, photos, place)
        singles = []
        for number in range(args.singles):
            singles.append(_single(args, config, photos[number], place / f"single-{number}"))
            bar.update()
        rows.append(_row("one run after another", singles, 1))
        if args.script:
            scripts = []
            for number in range(args.singles):
                scripts.append(_script(args, base, photos[number], place / f"script-{number}"))
                bar.update()
            rows.append(_row("Diffusers' script, run after run", scripts, 1))
        for count in args.subjects:
            found = []
            for number in range(args.repeats):
                found.append(_fleet(args, config, photos[:count], place / f"{count}-{number}"))
                bar.update()
            rows.append(_row(f"fleet of {count}", found, count, {"subjects": count}))
    notes = [f"{args.steps} steps of {args.batch} images and as many of {args.class_images} class images."]
    if args.script:
        notes.append(f"The script: {args.script.name}, unmodified, sha256 {sha256_of(args.script)[:16]}.")
    return common.result(args, "fleet", f"{args.model}-{args.device}{args.tag}", rows, *notes)


def _photos(folder: Path, count: int) -> list[Path]:
    """The photos of `count` drawn subjects, in a folder each."""
    found = []
    for number in range(count):
        found.append(mine := folder / f"subject-{number:02d}")
        mine.mkdir(parents=True)
        subject = world.drawn_subject(0, number, "choosing")
        for pose in range(PHOTOS):
            render(subject.scene(pose)).save(mine / f"{pose}.png")
    return found


def _config(args: argparse.Namespace, place: Path, base: str) -> Path:
    """What all subjects share."""
    prompts = ["a photo of {}"] if args.validate else []
    precision = "fp32" if args.model == "tiny" else "bf16"
    values: dict[str, Any] = {
        "run_dir": str(place / "run"),
        "model": {"path": base, "variant": None},
        "subject": {"token": "sks", "class_word": "mug"},
        "prepare": {
            "photos": str(place / "photos" / "subject-00"), "instance_prompt": "a photo of {}",
            "class_prompt": "a photo of a {class}", "class_images": args.class_images,
            "class_dir": str(place / "classes"), "resolution": bases.side_of(args.model),
            "sampling": {"precision": precision},
        },
        "data": {"shards": str(place / "shards")},
        "adapter": {"rank": RANK}, "optim": {"lr": RATE},
        "train": {
            "steps": args.steps, "global_batch": args.batch, "micro_batch": args.batch,
            "checkpoint_every": args.steps, "precision": precision,
        },
        "validation": {"prompts": prompts, "every": args.validate or args.steps},
        "sample": {"precision": precision},
    }  # fmt: skip
    path = place / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def _warm(args: argparse.Namespace, config: Path, photos: Sequence[Path], place: Path) -> None:
    """Fill the caches: class images, and what is compiled for one run and for each size of a fleet."""
    _single(args, config, photos[0], place / "warm", "train.steps=2")
    if any(text.startswith("train.compile=") for text in args.set):
        for count in args.subjects:
            _fleet(args, config, photos[:count], place / f"warm-{count}", "train.steps=2")


def _single(args: argparse.Namespace, config: Path, photos: Path, place: Path, *more: str) -> Spent:
    own = [f"prepare.photos={photos}", f"data.shards={place / 'shards'}"]
    return _spent(args, place, "run", str(config), f"run_dir={place / 'run'}", *own, *args.set, *more)


def _fleet(args: argparse.Namespace, config: Path, photos: Sequence[Path], place: Path, *more: str) -> Spent:
    place.mkdir()
    subjects = _list(photos, place / "subjects.csv")
    words = (str(config), str(subjects), f"run_dir={place / 'run'}", *args.set, *more, *_slots(args))
    return _spent(args, place, "fleet", *words)


def _slots(args: argparse.Namespace) -> list[str]:
    return ["--slots", str(args.slots)] if args.slots else []


def _list(photos: Sequence[Path], path: Path) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("name", "photos"), *((one.name, one) for one in photos)])
    return path


def _spent(args: argparse.Namespace, place: Path, *words: str) -> Spent:
    """A command in a process of its own: the seconds of each phase. Raises SystemExit if it fails."""
    place.mkdir(exist_ok=True)
    report = job.launch("benchmarks.verbs", {"words": words}, place)
    if report.problem:
        raise SystemExit(f"error: dbtrain {words[0]} failed: {report.problem}")
    clock = "wall_s" if args.device == "cuda" else "cpu_s"
    return {phase: spent[clock] for phase, spent in report.ranks[0].items()}


def _row(label: str, found: Sequence[Spent], count: int, config: dict[str, Any] | None = None) -> Row:
    """Rate and phases of runs of `count` subjects each."""
    totals = [sum(spent.values()) for spent in found]
    measures = {
        "subjects per hour": Measure.of("1/h", [3600 * count / total for total in totals]),
        "a subject": Measure.of("s", [total / count for total in totals]),
    }
    for phase in verbs.PHASES:
        if any(phase in spent for spent in found):
            measures[phase] = Measure.of("s", [spent.get(phase, 0.0) for spent in found])
    return Row(label=label, config=config or {}, measures=measures)


def _by_the_clock(
    args: argparse.Namespace, base: str, config: Path, photos: Sequence[Path], place: Path
) -> list[Row]:
    """Runs, the script, and fleets on each number of ranks, in turns, as a user would start them."""
    found: dict[tuple[str, int], list[Spent]] = {}

    def timed(label: str, count: int, words: Sequence[object], **env: str) -> None:
        started = time.perf_counter()
        _done(words, **env)
        found.setdefault((label, count), []).append({"all": time.perf_counter() - started})

    _warm(args, config, photos, place)
    for turn in range(args.repeats):
        here = place / f"turn-{turn}"
        here.mkdir()
        own = [
            f"prepare.photos={photos[turn % len(photos)]}",
            f"data.shards={here / 'shards'}",
            f"run_dir={here / 'run'}",
        ]
        timed("one run after another", 1, [sys.executable, "-m", "dbtrain", "run", config, *own, *args.set])
        if args.script:
            timed(
                "Diffusers' script, run after run",
                1,
                _script_line(args, base, photos[turn % len(photos)], here),
            )
        for count in args.subjects:
            subjects = _list(photos[:count], here / f"{count}.csv")
            for ranks in args.ranks:
                torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
                line = [sys.executable, *torchrun, "-m", "dbtrain", "fleet", config, subjects]
                words = [*line, f"run_dir={here / f'{count}-{ranks}'}", *args.set, *_slots(args)]
                timed(f"fleet of {count}, {ranks} rank{'s' * (ranks > 1)}", count, words, OMP_NUM_THREADS="1")
    return [_row(label, walls, count, {"subjects": count}) for (label, count), walls in found.items()]


def _script(args: argparse.Namespace, base: str, photos: Path, place: Path) -> Spent:
    """Diffusers' script on one subject."""
    line = _script_line(args, base, photos, place)
    before, started = _cpu_of_children(), time.perf_counter()
    _done(line)
    wall_s, cpu_s = time.perf_counter() - started, _cpu_of_children() - before
    return {"script": wall_s if args.device == "cuda" else cpu_s}


def _done(words: Sequence[object], **env: str) -> None:
    """Run a command to its end. Raises SystemExit if it fails."""
    line = [str(word) for word in words]
    done = subprocess.run(line, env=os.environ | env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(line)} failed:\n{done.stderr}")


def _script_line(args: argparse.Namespace, base: str, photos: Path, place: Path) -> list[object]:
    """The command line of Diffusers' script for one subject, whose class images are there."""
    classes = place / "classes"
    classes.mkdir(parents=True)
    for number in range(args.class_images):
        render(world.drawn_subject(1, number, "choosing").scene(0)).save(classes / f"{number}.png")
    values = {
        "pretrained_model_name_or_path": Base.find(Model(path=base)).folder,
        "instance_data_dir": photos, "instance_prompt": "a photo of sks mug",
        "class_data_dir": classes, "class_prompt": "a photo of a mug", "num_class_images": args.class_images,
        "resolution": bases.side_of(args.model), "train_batch_size": args.batch, "rank": RANK,
        "max_train_steps": args.steps, "learning_rate": RATE, "lr_scheduler": "constant",
        "output_dir": place / "adapter",
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in values.items()]
    return [args.python, args.script, "--with_prior_preservation", *words]


def _cpu_of_children() -> float:
    """CPU seconds of all processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def parser() -> argparse.ArgumentParser:
    words = common.parser(__doc__, "model", "set", "tag")
    words.add_argument("--subjects", type=int, nargs="+", default=[1, 4, 16, 64], help="sizes of a fleet")
    words.add_argument("--slots", type=int, help="subjects at a time (default: what dbtrain chooses)")
    words.add_argument("--singles", type=int, default=common.LEAST, help="runs of one subject that are timed")
    words.add_argument("--script", type=Path, help="Diffusers' train_dreambooth_lora.py, to be run beside")
    words.add_argument("--python", default=sys.executable, help="the interpreter that runs the script")
    words.add_argument(
        "--ranks", type=int, nargs="+", help="wall time of whole commands, fleets on so many ranks"
    )
    words.add_argument("--steps", type=int, default=100)
    words.add_argument("--batch", type=int, default=2, help="instance images a step; as many class images")
    words.add_argument("--class-images", type=int, default=32)
    words.add_argument("--validate", type=int, default=0, help="steps between validations (0: none)")
    return words


if __name__ == "__main__":
    common.main(run, parser())
