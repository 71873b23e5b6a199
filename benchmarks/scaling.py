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
from pathlib import Path
from typing import Any

import torch

from benchmarks import bases, common, job
from benchmarks.common import Measure, Result, Row
from dbtrain.runtime import console


def run(args: argparse.Namespace, work: Path) -> Result:
    if args.smoke:
        args.model, args.processes, args.repeats, args.window, args.windows = "tiny", [1, 2], 1, 2, 1
    rounds = args.repeats
    specs = {
        n: job.Spec(
            args.model, str(work), args.batch, global_batch=n * args.batch, overrides=tuple(args.set),
            windows=args.windows, window=args.window, inline=args.smoke, warm_up=1 if args.smoke else 3,
        ) for n in args.processes
    }  # fmt: skip
    job.make(specs[args.processes[0]])
    found: dict[int, list[job.Report]] = {n: [] for n in args.processes}
    with console.bar(rounds * len(specs), f"scaling {args.model}", "run") as bar:
        for _ in range(rounds):
            for n, spec in specs.items():
                if args.device == "cuda" and n > torch.cuda.device_count():
                    found[n] = [job.Report([], f"not on this device: {torch.cuda.device_count()} GPUs")]
                elif not (found[n] and found[n][-1].problem):
                    found[n].append(job.run(spec, n))
                bar.update()
    rows = _rows(specs, found, args.device)
    return common.result(args, "scaling", f"{args.model}-{args.device}", rows)


def _rows(specs: dict[int, job.Spec], found: dict[int, list[job.Report]], device: str) -> list[Row]:
    clock = "wall_s" if device == "cuda" else "cpu_s"
    base = next((n for n, reports in found.items() if not reports[-1].problem), None)
    rows = []
    for n, reports in found.items():
        label, config = f"{n} process{'es' if n > 1 else ''}", {"processes": n, "batch": specs[n].batch}
        if problem := reports[-1].problem:
            rows.append(Row(label=label, config=config, note=problem))
            continue
        cost = {name: _a_sample(specs[n], reports, name) for name in ("cpu_s", "wall_s")}
        alone = _a_sample(specs[base], found[base], clock) if base else []
        # CPU seconds are summed over processes; of wall seconds each process spends its own.
        efficiency = [100 * a / b / (n if clock == "wall_s" and n > 1 else 1) for a, b in
                      zip(alone, cost[clock], strict=True)]  # fmt: skip
        first = reports[0].ranks[0]["counts"]
        comm = [rank["comm"] for report in reports for rank in report.ranks]
        measures = {
            "CPU a sample": Measure.of("ms", [1000 * s for s in cost["cpu_s"]]),
            "wall a sample": Measure.of("ms", [1000 * s for s in cost["wall_s"]]),
            "efficiency": Measure.of("%", efficiency),
            "data wait": Measure.of("%", [
                100 * w["wait_s"] / w["wall_s"] for report in reports for rank in report.ranks
                for w in rank["windows"]]),
            "collectives": Measure.of("ms a step", [one["collective_ms"] for one in comm]),
            "exposed": Measure.of("ms a step", [one["exposed_ms"] for one in comm]),
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
        windows = len(report.ranks[0]["windows"])
        costs.append(seconds / (windows * spec.window * report.ranks[0]["samples_a_step"]))
    return costs


def parser() -> argparse.ArgumentParser:
    words = common.parser(__doc__)
    words.add_argument("--model", choices=bases.MODELS, default="tiny")
    words.add_argument("--batch", type=int, default=4, help="instance images of a process's step")
    words.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    words.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="over the config's")
    words.add_argument("--windows", type=int, default=3)
    words.add_argument("--window", type=int, default=10, help="steps of a window")
    return words


if __name__ == "__main__":
    common.main(run, parser())
