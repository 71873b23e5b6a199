"""What does a step cost by the kind of prior preservation: class images, or the base's own predictions?

    python -m benchmarks.prior_step

FLOPs are those of every operator of a step, forward and backward, counted on the real architectures without
weights. The embedded base is timed too: its steps take turns, A B C A B C, so that all kinds meet the same
load of the machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from benchmarks import bases, common, trainer
from benchmarks.common import Measure, Result, Row
from dbtrain.config import Config
from dbtrain.models.base import Base
from dbtrain.runtime import console, dist
from dbtrain.train import memory

KINDS = ("images", "distillation", "prediction", "none")
COUNTED = ("tiny", "sd15", "sdxl", "flux1")
WARM_UP = 1  # pairs of steps


def run(args: argparse.Namespace, work: Path) -> Result:
    if args.smoke:
        args.models, args.repeats, args.batch = ["tiny"], 1, 1
    seconds = timed(args, work)
    rows = []
    with console.bar(len(args.models) * len(KINDS), "FLOPs", "step") as bar:
        for model in args.models:
            taken = {}
            for kind in KINDS:
                cfg = settings(args, work, model, kind)
                taken[kind] = memory.predict(cfg, Base.find(cfg.model), "cuda").flops
                bar.update()
            measured = seconds if model == "tiny" else {}
            rows += [row(model, kind, taken, measured) for kind in KINDS]
    return common.result(
        args, "prior_step", args.device, rows,
        f"LoRA of rank 8 on the attention layers; {args.batch} photos a step, and as many class rows.",
    )  # fmt: skip


def settings(args: argparse.Namespace, work: Path, model: str, kind: str) -> Config:
    """A config that trains with this kind of prior preservation, whose shards need not be there."""
    side = bases.side_of(model)
    return Config.from_dict({
        "run_dir": str(work / "run"), "model": {"path": bases.model(model, work).path},
        "prepare": {"photos": "none", "instance_prompt": "a photo of sks mug", "resolution": side,
                    "class_prompt": "a photo of a mug"},
        "data": {"shards": str(work / "shards")}, "adapter": {"rank": 8}, "loss": {"prior": kind},
        "train": {"global_batch": args.batch, "micro_batch": args.batch,
                  "precision": "fp32" if model == "tiny" else "bf16"},
    })  # fmt: skip


def timed(args: argparse.Namespace, work: Path) -> Mapping[str, list[float]]:
    """Seconds of each of the embedded base's steps, by kind."""
    base = Base.find(bases.model("tiny", work))
    bases.write_shards(work / "shards", "tiny", base, 32, ("instance", "class"))
    clock, found = common.clock(dist.device().type), {kind: list[float]() for kind in KINDS}
    with ExitStack() as stack:
        jobs = {
            kind: stack.enter_context(trainer.steps(settings(args, work, "tiny", kind))) for kind in KINDS
        }
        for step in range(WARM_UP + args.repeats):
            for kind, job in jobs.items():
                before = clock()
                for number in (2 * step, 2 * step + 1):  # by turns, steps are of two kinds
                    job.take(number)
                if step >= WARM_UP:
                    found[kind].append((clock() - before) / 2)
    return found


def row(model: str, kind: str, flops: Mapping[str, int], seconds: Mapping[str, list[float]]) -> Row:
    counts: dict[str, float | int | str | None] = {
        "TFLOP a step": flops[kind] / 1e12, "FLOPs, of those with images": flops[kind] / flops["images"],
    }  # fmt: skip
    measures = {}
    if seconds:
        measures["step"] = Measure.of("ms", [1000 * value for value in seconds[kind]])
        ratios = [mine / theirs for mine, theirs in zip(seconds[kind], seconds["images"], strict=True)]
        measures["time, of that with images"] = Measure.of("", ratios)
    return Row(label=f"{model}, {kind}", config={"prior": kind}, measures=measures, counts=counts)


def parser() -> argparse.ArgumentParser:
    words = common.parser(__doc__)
    words.add_argument("--models", nargs="+", default=list(COUNTED), help="whose FLOPs are counted")
    words.add_argument("--batch", type=int, default=2, help="photos a step")
    return words


if __name__ == "__main__":
    common.main(run, parser())
