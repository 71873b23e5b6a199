"""One flag at a time: what each setting of the step is worth.

    python -m benchmarks.ladder --model sd15 --batch 16 --rows eager compile

The first row, autocast to bf16 over a bf16 base, is what the others are compared with. A row that this
version or this device cannot run stays in the table, with the reason.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from benchmarks import common, job, throughput
from benchmarks.common import Measure, Result, Row
from dbtrain.runtime import console


@dataclass(frozen=True)
class Rung:
    """A row: its settings over the config's."""

    label: str
    overrides: tuple[str, ...] = ()
    group: str = "eager"
    cuda: bool = False  # GPUs only


PURE, NHWC = "train.precision=pure-bf16", "train.channels_last=true"
COMPILE, CUDNN, GRAPH = "train.compile=true", "train.attention=cudnn", "train.cuda_graph=true"
LADDER = (
    Rung("bf16 autocast, eager"),
    Rung("fp32", ("train.precision=fp32",)),
    Rung("fp16 autocast", ("train.precision=fp16",)),
    Rung("pure bf16", (PURE,)),
    Rung("cuDNN attention", (CUDNN,), cuda=True),
    Rung("flash attention", ("train.attention=flash",), cuda=True),
    Rung("channels_last, eager", (NHWC,)),
    Rung("checkpointing transformer", ("train.gradient_checkpointing=transformer",), "memory"),
    Rung("checkpointing blocks", ("train.gradient_checkpointing=blocks",), "memory"),
    Rung("compiled, activation memory 0.5", (COMPILE, "train.activation_memory=0.5"), "budget"),
    Rung("CUDA graph, eager", (GRAPH,), "graph", cuda=True),
    Rung("CUDA graph, pure bf16", (GRAPH, PURE), "graph", cuda=True),
    Rung("regional compilation", ("train.compile=regional",), "regional"),
    Rung("compiled", (COMPILE,), "compile"),
    Rung("compiled, channels_last", (COMPILE, NHWC), "compile-nhwc"),
    Rung("compiled, pure bf16", (COMPILE, PURE), "pure"),
    Rung("compiled, pure bf16, channels_last", (COMPILE, PURE, NHWC), "pure-nhwc"),
    Rung("compiled, pure bf16, channels_last, cuDNN", (COMPILE, PURE, NHWC, CUDNN), "all", cuda=True),
    Rung("all of that in a CUDA graph", (COMPILE, PURE, NHWC, CUDNN, GRAPH), "all-graph", cuda=True),
)
NO_GPU = "not on this device: needs a CUDA GPU"
GROUPS = tuple(dict.fromkeys(rung.group for rung in LADDER))


def run(args: argparse.Namespace, work: Path) -> Result:
    if args.smoke:
        args.model, args.rows, args.batch, args.repeats = "tiny", ["memory"], 1, 1
        args.window, args.windows, args.set = 2, 1, ["train.precision=fp32"]
    spec = throughput.watched(args, work, args.batch)
    job.make(spec)
    wanted = [rung for rung in LADDER if rung.group in args.rows or rung is LADDER[0]]
    specs = {
        rung.label: replace(spec, overrides=("train.precision=bf16", *args.set, *rung.overrides))
        for rung in wanted if args.device == "cuda" or not rung.cuda
    }  # fmt: skip
    rounds = 1 if args.device == "cuda" else args.repeats
    with console.bar(rounds * len(specs), f"ladder {args.model}", "run") as bar:
        found = dict(zip(specs, job.rounds(list(specs.values()), rounds, bar), strict=True))
    each, first = throughput.flops_of_sample(args, work), found[LADDER[0].label]
    rows = []
    for rung in wanted:
        if rung.label in found:
            row = throughput.row(rung.label, specs[rung.label], found[rung.label], args.device, each)
            rows.append(_beside(row, found[rung.label], first, args.device))
        else:
            rows.append(Row(label=rung.label, config={"set": list(rung.overrides)}, note=NO_GPU))
    part = "" if set(args.rows) == set(GROUPS) else "-" + "-".join(args.rows)
    return common.result(args, "ladder", f"{args.model}-batch{args.batch}-{args.device}{part}", rows)


def _beside(row: Row, reports: Sequence[job.Report], first: Sequence[job.Report], device: str) -> Row:
    """The row with its speed as a multiple of the first row's, in the same round."""
    if not row.measures or first[0].problem:
        return row
    clock = "wall_s" if device == "cuda" else "cpu_s"
    ratios = [
        median(one[clock] for one in base.windows) / window[clock]
        for base, report in zip(first, reports, strict=True)
        for window in report.windows
    ]
    return row.model_copy(update={"measures": {"speed-up": Measure.of("x", ratios), **row.measures}})


def parser() -> argparse.ArgumentParser:
    words = common.parser(__doc__, "model", "set", "windows", "window")
    words.add_argument("--batch", type=int, default=4, help="images in a forward pass")
    words.add_argument("--rows", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups of rows")
    return words


if __name__ == "__main__":
    common.main(run, parser())
