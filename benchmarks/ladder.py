"""One flag at a time: what each setting of the step is worth, beside what the arithmetic predicted.

    python -m benchmarks.ladder --model sd15 --batch 16 --rows eager compile

The first row, autocast to bf16 over a bf16 base, is what the others are compared with. Predictions are
of shared/PERFORMANCE.md, section 3, for an H200, at large batches; "small" ones for 1 or 2 images; those of
a CPU were measured on another UNet of 8.7 M parameters (section 4). A row that this version or this device
cannot run stays in the table, with the reason.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import bases, common, flops, job, throughput
from benchmarks.common import Measure, Result, Row
from dbtrain.config import Adapter, Model
from dbtrain.models.base import Base
from dbtrain.runtime import console

SMALL = 2  # images a step, and fewer: the host's work, not the GPU's, takes the time
Range = tuple[float, float]


@dataclass(frozen=True)
class Rung:
    """A row: its settings over the config's, and its speed as a multiple of the first row's, predicted."""

    label: str
    overrides: tuple[str, ...]
    group: str = "eager"
    predicted: Mapping[str, Range] = field(default_factory=dict)  # by model, `MODEL small` or `cpu`
    cuda: bool = False  # GPUs only


PURE, NHWC = "train.precision=pure-bf16", "train.channels_last=true"
COMPILE, CUDNN = "train.compile=true", "train.attention=cudnn"
GRAPH = "train.cuda_graph=true"
GRAPHED: Mapping[str, Range] = {"sd15": (1, 1), "sdxl": (1, 1), "sd15 small": (4, 8), "sdxl small": (2, 3)}
LADDER = (
    Rung("bf16 autocast, eager", (), predicted=dict.fromkeys(("sd15", "sdxl", "cpu"), (1.0, 1.0))),
    Rung("fp32", ("train.precision=fp32",), predicted={"cpu": (0.75, 0.75)}),
    Rung("fp16 autocast", ("train.precision=fp16",), predicted={"sd15": (1.0, 1.0), "sdxl": (1.0, 1.0)}),
    Rung("pure bf16", (PURE,), predicted={"sd15": (1.17, 1.17), "cpu": (1.02, 1.02)}),
    Rung("cuDNN attention", (CUDNN,), predicted={"sd15": (1.16, 1.16), "sdxl": (1.09, 1.09)}, cuda=True),
    Rung("flash attention", ("train.attention=flash",), cuda=True),
    Rung("channels_last, eager", (NHWC,), predicted={"sd15": (0.9, 1.0), "cpu": (0.97, 0.97)}),
    Rung("checkpointing transformer", ("train.gradient_checkpointing=transformer",), "memory",
         {"sd15": (0.85, 0.85), "sdxl": (0.78, 0.78)}),
    Rung("checkpointing blocks", ("train.gradient_checkpointing=blocks",), "memory",
         {"sd15": (0.74, 0.75), "sdxl": (0.74, 0.75)}),
    Rung("compiled, activation memory 0.5", (COMPILE, "train.activation_memory=0.5"), "budget"),
    Rung("CUDA graph, eager", (GRAPH,), "graph", GRAPHED, cuda=True),
    Rung("CUDA graph, pure bf16", (GRAPH, PURE), "graph",
         {"sd15": (1.17, 1.17), "sd15 small": (4, 8), "sdxl small": (2, 3)}, cuda=True),
    Rung("regional compilation", ("train.compile=regional",), "regional", {"cpu": (1.03, 1.03)}),
    Rung("compiled", (COMPILE,), "compile", {"sd15": (1.15, 1.3), "sdxl": (1.15, 1.3), "cpu": (1.04, 1.04)}),
    Rung("compiled, channels_last", (COMPILE, NHWC), "compile-nhwc", {"sdxl": (1.34, 1.34)}),
    Rung("compiled, pure bf16", (COMPILE, PURE), "pure", {"cpu": (1.06, 1.06)}),
    Rung("compiled, pure bf16, channels_last", (COMPILE, PURE, NHWC), "pure-nhwc",
         {"sd15": (1.35, 1.35), "cpu": (1.08, 1.08)}),
    Rung("compiled, pure bf16, channels_last, cuDNN attention", (COMPILE, PURE, NHWC, CUDNN), "all",
         {"sd15": (1.56, 1.56), "sdxl": (1.47, 1.47)}, cuda=True),
    Rung("all of that in a CUDA graph", (COMPILE, PURE, NHWC, CUDNN, GRAPH), "all-graph",
         {"sd15": (1.56, 1.56), "sdxl": (1.47, 1.47), "sd15 small": (5, 9)}, cuda=True),
)  # fmt: skip
GROUPS = tuple(dict.fromkeys(rung.group for rung in LADDER))


def run(args: argparse.Namespace, work: Path) -> Result:
    if args.smoke:
        args.model, args.rows, args.batch, args.rounds = "tiny", ["memory"], 1, 1
        args.window, args.windows, args.set = 2, 1, ["train.precision=fp32"]
    spec = job.Spec(
        args.model, str(work), args.batch, windows=args.windows, warm_up=1 if args.smoke else 3,
        rate=True, inline=args.smoke,
        window=args.window or throughput.WINDOW[args.model],
    )  # fmt: skip
    job.make(spec)
    wanted = [rung for rung in LADDER if rung.group in args.rows or rung is LADDER[0]]
    specs = {
        rung.label: replace(spec, overrides=("train.precision=bf16", *args.set, *rung.overrides))
        for rung in wanted if args.device == "cuda" or not rung.cuda
    }  # fmt: skip
    rounds = args.rounds or (1 if args.device == "cuda" else args.repeats)
    with console.bar(rounds * len(specs), f"ladder {args.model}", "run") as bar:
        found = dict(zip(specs, throughput.rounds_of(list(specs.values()), rounds, bar), strict=True))
    path = "tiny" if args.model == "tiny" else str(bases.outline(args.model, work))
    _, each = flops.of_step(Base.find(Model(path=path)), bases.SIDES[args.model], Adapter(rank=8))
    rows = [_row(rung, specs, found, args, each) for rung in wanted]
    part = "" if set(args.rows) == set(GROUPS) else "-" + "-".join(args.rows)
    subject = f"{args.model}-batch{args.batch}-{args.device}{part}"
    return common.result(args, "ladder", subject, rows)


def _row(
    rung: Rung, specs: Mapping[str, job.Spec], found: Mapping[str, Sequence[job.Report]],
    args: argparse.Namespace, each: float,
) -> Row:  # fmt: skip
    """A line: speed, and beside what was predicted for it, the ratio to the first row of the same round."""
    keys = [f"{args.model} small", args.model] if args.batch <= SMALL else [args.model]
    keys = keys if args.device == "cuda" else ["cpu"]
    guess = next((rung.predicted[key] for key in keys if key in rung.predicted), None)
    told = (
        "" if guess is None else f"{guess[0]:g}" if guess[0] == guess[1] else f"{guess[0]:g} to {guess[1]:g}"
    )
    counts: dict[str, Any] = {"predicted": f"{told}x" if told else "none"}
    if rung.label not in found:
        config = {"set": list(rung.overrides)}
        return Row(
            label=rung.label, config=config, counts=counts, note="not on this device: needs a CUDA GPU"
        )
    row = throughput.row(rung.label, specs[rung.label], found[rung.label], args.device, each)
    first = found[LADDER[0].label]
    if not row.measures or first[0].problem:
        return row.model_copy(update={"counts": counts})
    clock = "wall_s" if args.device == "cuda" else "cpu_s"
    ratios = [
        _typical(base, clock) / window[clock]
        for base, report in zip(first, found[rung.label], strict=True)
        for window in report.ranks[0]["windows"]
    ]
    measures = {"speed-up": Measure.of("x", ratios), **row.measures}
    return row.model_copy(update={"measures": measures, "counts": counts | row.counts})


def _typical(report: job.Report, clock: str) -> float:
    return median(window[clock] for window in report.ranks[0]["windows"])


def parser() -> argparse.ArgumentParser:
    words = common.parser(__doc__)
    words.add_argument("--model", choices=bases.MODELS, default="tiny")
    words.add_argument("--batch", type=int, default=4, help="images in a forward pass")
    words.add_argument("--rows", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups of rows")
    words.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="for every row")
    words.add_argument("--windows", type=int, default=3, help="timed windows of each run")
    words.add_argument("--window", type=int, help="steps of a window")
    words.add_argument("--rounds", type=int, help="processes a row (default: 1 on a GPU, else --repeats)")
    return words


if __name__ == "__main__":
    common.main(run, parser())
