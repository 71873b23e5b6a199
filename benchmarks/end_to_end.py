"""Photos to adapter, phase by phase: imports, class images, encoding, start of training, steps, export.

    python -m benchmarks.end_to_end --model sd15 --steps 800 --class-images 200

Cold has to generate its class images, cached finds those of the run before; all else is done anew in both.
The photos are five drawn ones unless `--photos` gives others; `sd15` and `sdxl` have random weights.
Times are wall seconds on a GPU and CPU seconds of one thread on a CPU.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import bases, common, job, phases
from benchmarks.common import Measure, Result, Row
from dbtrain.config import Model
from dbtrain.runtime import console
from dbtrain.tiny import world

CONFIG = {"tiny": "quickstart", "sd15": "sd15", "sdxl": "sdxl"}


def run(args: argparse.Namespace, work: Path) -> Result:
    if args.smoke:
        args.model, args.repeats, args.steps, args.class_images = "tiny", 1, 2, 2
        args.set = [*args.set, "prepare.sampling.steps=1", "validation.prompts=[]"]
    photos = args.photos
    if not photos:
        photos = work / "photos"
        world.main(photos)
    base = bases.model(args.model, work, weights=True)
    found: dict[str, list[dict[str, Any]]] = {"cold": []}
    if args.class_images and not args.smoke:
        found["class images cached"] = []
    with console.bar(args.repeats * len(found), f"end to end {args.model}", "run") as bar:
        for _ in range(args.repeats):
            place = Path(tempfile.mkdtemp(prefix="end-to-end-", dir=work))  # nothing in it is cached
            for name, runs in found.items():
                mine = place / name.replace(" ", "-")
                runs.append(_once(args, base, photos.absolute(), mine, place / "classes"))
                bar.update()
    clock = "wall_s" if args.device == "cuda" else "cpu_s"
    rows = []
    for name, runs in found.items():
        measures = {
            phase: Measure.of("s", [one[phase][clock] for one in runs])
            for phase in phases.PHASES if phase in runs[0]
        }  # fmt: skip
        total = [sum(phase[clock] for phase in one.values()) for one in runs]
        wall = [sum(phase["wall_s"] for phase in one.values()) for one in runs]
        measures |= {"photos to adapter": Measure.of("s", total)}
        measures |= {"wall": Measure.of("s", wall)} if args.device == "cpu" else {}
        rows.append(Row(label=name, config={"class_images": args.class_images}, measures=measures))
    unit = "wall seconds" if args.device == "cuda" else "CPU seconds of one thread"
    words = f"Phases are in {unit}; {args.steps} steps, {args.class_images} class images."
    kind = "" if args.class_images else "-no-class-images"
    return common.result(args, "end_to_end", f"{args.model}-{args.device}{kind}", rows, words)


def _once(
    args: argparse.Namespace, base: Model, photos: Path, place: Path, classes: Path
) -> dict[str, dict[str, float]]:
    """One run in a process of its own: seconds of each phase."""
    place.mkdir(parents=True)
    side = bases.side_of(args.model)
    with_class = [f"prepare.class_images={args.class_images}", f"prepare.class_dir={classes}"]
    overrides = [
        f"run_dir={place / 'run'}", f"data.shards={place / 'shards'}", f"prepare.photos={photos}",
        f"model.path={base.path}", "model.variant=null",
        f"prepare.resolution={side}", f"train.steps={args.steps}", "adapter.rank=8",
        f"train.global_batch={args.batch}", f"train.micro_batch={args.batch}",
        *(with_class if args.class_images else ["prepare.class_prompt=null"]), *args.set,
    ]  # fmt: skip
    config = str(common.ROOT / "configs" / f"{CONFIG[args.model]}.yaml")
    given = {"config": config, "overrides": overrides}
    report = job.inline(phases.run, given) if args.smoke else job.launch("benchmarks.phases", given, place)
    if report.problem:
        raise SystemExit(f"error: the run failed: {report.problem}")
    return report.ranks[0]


def parser() -> argparse.ArgumentParser:
    words = common.parser(__doc__, "model", "set")
    words.add_argument("--photos", type=Path, help="your own photos (default: five drawn ones)")
    words.add_argument("--steps", type=int, default=100)
    words.add_argument("--batch", type=int, default=2, help="instance images a step; as many class images")
    words.add_argument("--class-images", type=int, default=16, help="0: no prior preservation")
    return words


if __name__ == "__main__":
    common.main(run, parser())
