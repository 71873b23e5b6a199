"""From one process to several: CPU time and wall a sample, efficiency, collectives, exposed communication.

    python -m benchmarks.scaling --processes 1 2

Each process has the same batch (weak scaling), under torchrun, over gloo on CPUs and NCCL on GPUs. Times of
CPUs are CPU seconds of all processes together: other jobs do not count. Collectives and their bytes are
counted in one step as they are dispatched; *exposed* is the time of a step's collectives while this
process computed nothing, from a profile.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, job, throughput
from benchmarks.common import Measure, Result, Row
from dbtrain.runtime import console


def run(args: argparse.Namespace, work: Path) -> Result:
    if args.smoke:
        args.model, args.processes, args.repeats, args.window, args.windows = "tiny", [1, 2], 1, 2, 1
    most = torch.cuda.device_count() if args.device == "cuda" else max(args.processes)
    one = throughput.watched(args, work, args.batch)
    specs = [replace(one, processes=n, rate=False) for n in args.processes if n <= most]
    job.make(one)
    with console.bar(args.repeats * len(specs), f"scaling {args.model}", "run") as bar:
        found = job.rounds(specs, args.repeats, bar)
    rows = _rows(specs, found, args.device)
    rows += [Row(label=f"{n} processes", note=f"not on this device: {most} GPUs")
             for n in args.processes if n > most]  # fmt: skip
    return common.result(args, "scaling", f"{args.model}-{args.device}", rows)


def _rows(specs: Sequence[job.Spec], found: Sequence[Sequence[job.Report]], device: str) -> list[Row]:
    """A row a number of processes; efficiency is that over the first that ran."""
    clock = "wall_s" if device == "cuda" else "cpu_s"
    alone: list[float] = []
    rows = []
    for spec, reports in zip(specs, found, strict=True):
        n = spec.processes
        label, config = f"{n} process{'es' if n > 1 else ''}", {"processes": n, "batch": spec.batch}
        if problem := reports[-1].problem:
            rows.append(Row(label=label, config=config, note=problem))
            continue
        cost = {name: _a_sample(spec, reports, name) for name in ("cpu_s", "wall_s")}
        # CPU seconds are summed over processes; wall seconds are those of one of them.
        each = [seconds * (n if clock == "wall_s" else 1) for seconds in cost[clock]]
        alone = alone or each
        first = reports[0].ranks[0]["counts"]
        ranks = [rank for report in reports for rank in report.ranks]
        measures = {
            "CPU a sample": Measure.of("ms", [1000 * s for s in cost["cpu_s"]]),
            "wall a sample": Measure.of("ms", [1000 * s for s in cost["wall_s"]]),
            "efficiency": Measure.of("%", [100 * a / b for a, b in zip(alone, each, strict=True)]),
            "data wait": Measure.of("%", [
                100 * w["wait_s"] / w["wall_s"] for rank in ranks for w in rank["windows"]]),
            "collectives": Measure.of("ms a step", [rank["comm"]["collective_ms"] for rank in ranks]),
            "exposed": Measure.of("ms a step", [rank["comm"]["exposed_ms"] for rank in ranks]),
        }  # fmt: skip
        counts: dict[str, Any] = {
            "collectives a step": first.get("collectives"), "bytes a step": first.get("collective bytes"),
            "host reads": first["host reads"],
        }  # fmt: skip
        rows.append(Row(label=label, config=config, measures=measures, counts=counts))
    return rows


def _a_sample(spec: job.Spec, reports: Sequence[job.Report], clock: str) -> list[float]:
    """Seconds a sample, of each round: CPU seconds of all ranks, wall seconds of the first."""
    costs = []
    for report in reports:
        ranks = report.ranks if clock == "cpu_s" else report.ranks[:1]
        seconds = sum(window[clock] for rank in ranks for window in rank["windows"])
        costs.append(seconds / (len(report.windows) * spec.window * spec.samples_a_step))
    return costs


def parser() -> argparse.ArgumentParser:
    words = common.parser(__doc__, "model", "set", "windows", "window")
    words.add_argument("--batch", type=int, default=4, help="images of a process's step")
    words.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    words.set_defaults(window=10)
    return words


if __name__ == "__main__":
    common.main(run, parser())
