"""Side by side with Diffusers' own training script: the same task, one after the other, in turns.

    python -m benchmarks.vs_diffusers --script train_dreambooth_lora.py --python VENV/bin/python

The script is not part of dbtrain: give an unmodified copy of Diffusers'
examples/dreambooth/train_dreambooth_lora.py, and a Python that has accelerate. It runs under
`accelerate launch`; dbtrain as `dbtrain run`. Both get the same base, photos, class images, resolution,
batch, rank, targets, optimizer, precision and threads, and are timed from outside.

Three comparisons, which are never mixed up: *as shipped* (photos to adapter, and steps in which the
reference encodes its images), *as shipped, drawing class images* (photos to adapter when each draws its
own first), *compute-matched* (steps only, with the reference's VAE replaced by a table of what it gave
for each image). CPU time is the main figure on CPUs: wall time depends on who else uses the machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import bases, common
from benchmarks.common import Measure, Result, Row
from benchmarks.side_by_side import compare, pages, runs, witness
from benchmarks.side_by_side.runs import Reference, Run, Task
from dbtrain.runtime import console
from dbtrain.tiny import world

PARTS = ("given", "drawn")
SETTLE = 10  # first steps that no figure counts


@dataclass
class Found:
    """All runs, by what was compared: pairs in the order they were made."""

    shipped: list[Run] = field(default_factory=list)
    ours: list[Run] = field(default_factory=list)
    matched: list[Run] = field(default_factory=list)
    drawing: list[Run] = field(default_factory=list)
    ours_drawing: list[Run] = field(default_factory=list)
    floors: list[tuple[float, float]] = field(default_factory=list)
    """CPU ms of the denoiser alone, forward and backward: with the adapter, and without."""


@dataclass(frozen=True)
class Witness:
    """A run of each that was watched closely, and what the reference's first step left."""

    theirs: Run
    ours: Run
    kept: Path


def task_of(args: argparse.Namespace, work: Path) -> Task:
    """The task, with its photos made and its base at hand."""
    photos = args.photos.absolute() if args.photos else work / "photos"
    if not args.photos:
        world.main(photos)
    side = args.resolution or bases.SIDES[args.model]
    return Task(
        base=bases.folder(args.model, work), photos=photos, class_images=args.class_images, resolution=side,
        batch=args.batch, accumulation=args.accumulation, rank=args.rank, lr=args.lr, steps=args.steps,
        precision=args.precision, threads=args.threads, device=args.device,
    )  # fmt: skip


def windows(task: Task) -> tuple[int, int]:
    """First steps that are left out: as shipped, and until the table of latents is complete."""
    first = min(SETTLE, task.steps // 3)
    matched = max(first, task.epoch)
    if matched > task.steps - 2:
        raise SystemExit(
            f"--steps is {task.steps}, but the reference has seen all pictures only after {task.epoch} "
            "steps: use more steps, or fewer --class-images"
        )
    return first, matched


def measure(
    args: argparse.Namespace,
    reference: Reference,
    task: Task,
    seen: Witness | None,
    classes: Path,
    work: Path,
) -> Found:
    """All timed runs, in turns: reference, dbtrain, reference without its VAE, dbtrain, and so on."""
    found = Found()
    floor = None
    if seen and task.device == "cpu":
        floor = witness.Floor(seen.kept, seen.ours.folder / "config.yaml")
    kinds = sum({"given": 3, "drawn": 2}[part] for part in args.parts)
    with console.bar(args.repeats * kinds, "timed", "run") as bar:
        for number in range(args.repeats):
            place = work / f"repeat-{number}"
            turns = _turns(reference, task, classes, place, number, args.parts)
            if args.smoke and seen:
                turns = _few(reference, task, classes, place, seen)
            for kind, run in turns:
                getattr(found, kind).append(run)
                bar.update()
            if floor:
                found.floors.append(floor.measure(3 if args.smoke else 15))
    return found


def _turns(
    reference: Reference, task: Task, classes: Path, place: Path, seed: int, parts: Sequence[str]
) -> Iterator[tuple[str, Run]]:
    """One repeat: every kind of run once."""
    first, late = windows(task)
    if "given" in parts:
        yield "shipped", runs.run_reference(reference, task, classes, place / "shipped", seed, first=first)
        yield "ours", runs.run_ours(task, classes, place / "ours", seed, first=first)
        table = {"first": late, "stub_vae": True}
        matched = runs.run_reference(reference, task, classes, place / "matched", seed, **table)
        assert max(matched.seen["encoded_at"]) <= late, "an image was encoded in a step that is timed"
        yield "matched", matched
    if "drawn" in parts:
        empty = place / "drawing" / "classes"
        yield "drawing", runs.run_reference(reference, task, empty, place / "drawing", seed, first=first)
        yield "ours_drawing", runs.run_ours(task, place / "none", place / "ours-drawing", seed, first=first)


def _few(
    reference: Reference, task: Task, classes: Path, place: Path, seen: Witness
) -> Iterator[tuple[str, Run]]:
    """What `--smoke` has time for: the runs that were watched closely stand for timed ones."""
    yield "shipped", runs.run_reference(reference, task, classes, place, first=windows(task)[0])
    yield from (("ours", seen.ours), ("matched", seen.theirs))


def tables(task: Task, found: Found) -> list[Row]:
    """The rows of the result: comparison by comparison."""
    first, matched = windows(task)
    whole, main = compare.WHOLE, "photos → adapter, CPU" if task.device == "cpu" else "photos → adapter, wall"
    step = "step, CPU" if task.device == "cpu" else "step, wall"
    rows = []
    if found.ours:
        rows += compare.rows("as shipped", found.shipped, found.ours, whole | compare.steps(first), main)
    if found.drawing:
        rows += compare.rows(
            "as shipped, drawing class images", found.drawing, found.ours_drawing, whole, main
        )
    if found.ours:
        rows += compare.rows("compute-matched", found.matched, found.ours, compare.steps(matched), step)
    for name, values in zip(("with", "without"), zip(*found.floors, strict=True), strict=False):
        cost = {"step, CPU": Measure.of("ms", values)}
        rows.append(Row(label=f"the denoiser alone, {name} adapter, forward and backward", measures=cost))
    return rows


def watched(reference: Reference, task: Task, classes: Path, place: Path, at_once: bool) -> Witness:
    """A run of each, watched too closely to be timed: one after the other, or both `at_once`."""
    kept = place / "kept"
    kept.mkdir(parents=True, exist_ok=True)
    late = windows(task)[1]
    watch = {"first": late, "count": late, "profile": [late + 1, min(late + 10, task.steps)]}
    closely = watch | {"stub_vae": True, "witness": str(kept)}
    with ThreadPoolExecutor(2 if at_once else 1) as pool:
        theirs = pool.submit(runs.run_reference, reference, task, classes, place / "theirs", **closely)
        ours = pool.submit(runs.run_ours, task, classes, place / "ours", **watch)
        return Witness(theirs.result(), ours.result(), kept / "first_step.safetensors")


def run(args: argparse.Namespace, work: Path) -> Result:
    reference = Reference.find(args.script, args.python)
    task = task_of(args, work)
    windows(task)  # raises now, not after all the runs
    classes = work / "class-images"
    if args.smoke:
        world.main(classes, "ball")  # pictures are pictures
    elif "given" in args.parts:
        console.say("class images for both, by dbtrain")
        runs.prepare_ours(task, classes, work / "prepared")
    seen, told, shown = None, {}, []
    if "given" in args.parts:
        console.say("equal work: a run of each that is watched closely and warms the caches, not timed")
        seen = watched(reference, task, classes, work / "witness", at_once=args.smoke)
        kept = seen.kept if task.accumulation == 1 else None
        told, shown = pages.equal_work(seen.theirs, seen.ours, kept)
    found = measure(args, reference, task, seen, classes, work)
    subject = f"{args.model}-{args.precision}-{args.device}"
    if tuple(args.parts) == ("drawn",):
        subject += "-drawn"
    first, matched = windows(task)
    notes = [
        pages.about(reference),
        f"{task.steps} steps of {task.batch}+{task.batch} images{_times(task)} at {task.resolution} px, rank "
        f"{task.rank}, {len(list(task.photos.iterdir()))} photos, {task.class_images} class images, "
        f"{task.threads} thread(s). Median (least to most) of {args.repeats} runs each, made in turns; the "
        "ratio is taken from pair to pair. Where the two ranges overlap, the verdict is 'no difference'. A "
        "step is all that happens from one optimizer step to the next, over the steps after the first "
        f"{first} (compute-matched: {matched}, when the reference's table of latents is complete). As "
        "shipped, the reference draws class images in its pipeline's default 50 steps, dbtrain in 25.",
        *pages.limit([run.step(matched)["cpu"] for run in found.matched], found.floors),
        *shown,
    ]
    rows = tables(task, found) + ([Row(label="equal work (below)", config=told)] if told else [])
    return common.result(args, "vs_diffusers", subject, rows, *notes)


def _times(task: Task) -> str:
    return f" x {task.accumulation} micro-batches" if task.accumulation > 1 else ""


def words() -> argparse.ArgumentParser:
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--script", type=Path, required=True, help="Diffusers' train_dreambooth_lora.py")
    add("--python", default="python", help="Python with accelerate, for the script")
    add("--model", default="tiny", choices=[name for name in bases.MODELS if name != "sdxl"])
    add("--photos", type=Path, help="folder of photos (default: the embedded base's five of a mug)")
    add("--resolution", type=int, help="px (default: the model's own)")
    add("--class-images", type=int, default=32)
    add("--batch", type=int, default=2, help="instance images of a forward pass; as many class images")
    add("--accumulation", type=int, default=1, help="forward passes of a step")
    add("--rank", type=int, default=4)
    add("--lr", type=float, default=1e-4)
    add("--steps", type=int, default=100)
    add("--precision", default="fp32", choices=["fp32", "bf16"])
    add("--threads", type=int, default=1)
    add("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="class images given to both (and "
        "compute-matched steps), or drawn by each")  # fmt: skip
    return parser


def small(args: argparse.Namespace) -> argparse.Namespace:
    """What `--smoke` makes of the arguments."""
    given = {"steps": 6, "class_images": 5, "repeats": 1, "parts": ["given"]}
    return argparse.Namespace(**{**vars(args), **given}) if args.smoke else args


def main() -> None:
    common.main(lambda args, work: run(small(args), work), words())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
