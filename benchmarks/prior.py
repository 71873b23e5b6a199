"""Class images a second, over batch sizes.

    python -m benchmarks.prior --model sd15 --batches 1 8 16

What `prepare` calls is timed twice, for one batch and for more; the difference is the drawing, without
loading the base. Wall seconds on a GPU, CPU seconds of one thread on a CPU. FLOPs of a picture are those
of the denoiser's forwards (two a step with guidance) and of the VAE's decoder.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import bases, common, flops
from benchmarks.common import Measure, Result, Row
from dbtrain.config import Model, Prepare, Sampling, Train
from dbtrain.models.base import Base
from dbtrain.prepare import class_images
from dbtrain.runtime import console, dist

BATCHES = {"tiny": (1, 4, 8), "sd15": (1, 4, 8, 16, 32), "sdxl": (1, 4, 8)}


def run(args: argparse.Namespace, work: Path) -> Result:
    if args.smoke:
        args.model, args.batches, args.repeats, args.steps, args.more = "tiny", [1], 1, 2, 12
    precision: Any = "bf16" if args.device == "cuda" else "fp32"
    model = bases.model(args.model, work, weights=True)
    base = Base.find(model)
    batches = args.batches or BATCHES[args.model]
    side = bases.side_of(args.model)
    each = flops.of_picture(base, side, args.steps, guided=True)
    rate = flops.matmul_rate(args.device, precision)
    _seconds(base, model, Sampling(steps=args.steps, precision=precision), 1, side, work)
    found: dict[int, tuple[list[float], list[float]]] = {batch: ([], []) for batch in batches}
    with console.bar(args.repeats * len(found), f"class images {args.model}", "run") as bar:
        for _ in range(args.repeats):
            for batch, (speed, start) in found.items():
                sampling = Sampling(steps=args.steps, batch=batch, precision=precision)
                seconds = [
                    _seconds(base, model, sampling, count, side, work)
                    for count in (batch, batch * (1 + args.more))
                ]
                drawing = seconds[1] - seconds[0]
                speed.append(batch * args.more / drawing)
                start.append(seconds[0])
                bar.update()
    unit = "1/s" if args.device == "cuda" else "per CPU s"
    rows = [_row(batch, speed, start, unit, each, rate) for batch, (speed, start) in found.items()]
    about = f"{args.steps} DPM-Solver++ steps with guidance, {precision}, {side} px."
    return common.result(args, "prior", f"{args.model}-{args.device}", rows, about)


def _row(batch: int, speed: list[float], start: list[float], unit: str, each: float, rate: float) -> Row:
    counts: dict[str, float | int | str | None] = {
        "TFLOP a picture": each / 1e12, "matmul TFLOP/s": rate / 1e12,
    }  # fmt: skip
    config = {"batch": batch}
    if min(speed) <= 0:
        return Row(label=f"batch {batch}", config=config, counts=counts, note="too short to time; use --more")
    counts["share of matmul rate, %"] = 100 * median(speed) * each / rate
    measures = {"class images": Measure.of(unit, speed), "first batch, with loading": Measure.of("s", start)}
    return Row(label=f"batch {batch}", config=config, measures=measures, counts=counts)


def _seconds(base: Base, model: Model, sampling: Sampling, count: int, side: int, work: Path) -> float:
    """Seconds to make this many class images in an empty folder."""
    wanted = Prepare(
        photos="none", instance_prompt="none", class_prompt="a photo of a mug", class_images=count,
        class_dir=tempfile.mkdtemp(prefix="classes-", dir=work), resolution=side, sampling=sampling,
    )  # fmt: skip
    clock = common.clock(dist.device().type)
    before = clock()
    made = class_images.ensure(base, wanted, Train())
    seconds = clock() - before
    if len(made) != count:
        raise SystemExit(f"error: {count} class images were asked for, {len(made)} came")
    return seconds


def parser() -> argparse.ArgumentParser:
    words = common.parser(__doc__, "model")
    words.add_argument("--batches", type=int, nargs="+", help="pictures drawn at once")
    words.add_argument("--steps", type=int, default=25, help="denoiser steps of a picture")
    words.add_argument("--more", type=int, default=2, help="batches that are timed, after the first")
    return words


if __name__ == "__main__":
    common.main(run, parser())
