"""Training speed: samples a second over batch sizes, and the time to the first step, cold and warm.

    python -m benchmarks.throughput --model sd15 --batches 1 2 4 8 16 32 --set train.compile=true

Real architecture, random weights, random latents; the loop is dbtrain's own, unaltered and watched from
outside. On a GPU, times are wall seconds between synchronised windows of steps, and a step's are
between CUDA events; on a CPU they are seconds of CPU time of one thread, in interleaved repeats.
MFU is model FLOPs (no recomputation) over the rate of large matrix products, measured in the same run.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

from benchmarks import bases, common, flops, job
from benchmarks.common import Measure, Result, Row
from dbtrain.config import Adapter
from dbtrain.models.base import Base
from dbtrain.runtime import console

WINDOW = {"tiny": 10, "sd15": 50, "sdxl": 20}  # steps
BATCHES = {"tiny": (1, 2, 4, 8), "sd15": (1, 2, 4, 8, 16, 32), "sdxl": (1, 2, 4, 8)}


def run(args: argparse.Namespace, work: Path) -> Result:
    if args.smoke:
        args.model, args.batches, args.repeats, args.window, args.windows = "tiny", [1], 1, 2, 3
    batches = args.batches or BATCHES[args.model]
    rounds = 1 if args.device == "cuda" else args.repeats
    if args.windows * rounds < common.LEAST:
        raise SystemExit(f"error: --windows is {args.windows}; use {common.LEAST} or more")
    spec = watched(args, work, batches[0])
    each = flops_of_sample(args, work)
    caches = ("cold",) if args.smoke else ("cold", "warm")
    sweep, first = "sweep" in args.parts, "first" in args.parts
    total = sweep * rounds * len(batches) + first * len(caches) * args.repeats
    rows: list[Row] = []
    with console.bar(total, f"throughput {args.model}", "run") as bar:
        if sweep:
            job.make(spec)
            specs = [replace(spec, batch=batch) for batch in batches]
            for one, reports in zip(specs, job.rounds(specs, rounds, bar), strict=True):
                rows.append(row(f"batch {one.batch}", one, reports, args.device, each))
        if first:
            rows += first_steps(spec, args.repeats, caches, bar)
    note = f"One sample is {each / 1e12:.6g} TFLOP, forward and backward ({flops.SOURCE})."
    return common.result(args, "throughput", f"{args.model}-{args.device}{args.tag}", rows, note)


def watched(args: argparse.Namespace, work: Path, batch: int) -> job.Spec:
    """A run with the arguments of a benchmark."""
    return job.Spec(
        args.model, str(work), batch, overrides=tuple(args.set), rate=True, inline=args.smoke,
        warm_up=1 if args.smoke else 3, windows=args.windows, window=args.window or WINDOW[args.model],
    )  # fmt: skip


def flops_of_sample(args: argparse.Namespace, work: Path) -> float:
    """FLOPs of one sample, forward and backward, with the adapter that is trained."""
    ranks = [int(item.partition("=")[2]) for item in args.set if item.startswith("adapter.rank=")]
    base = Base.find(bases.model(args.model, work))
    return flops.of_step(base, bases.side_of(args.model), Adapter(rank=(ranks or [8])[-1]))[1]


def row(label: str, spec: job.Spec, reports: Sequence[job.Report], device: str, each: float) -> Row:
    """A line of the table: what all rounds of a spec have seen."""
    config = {"batch": spec.batch, "set": list(spec.overrides)}
    if problems := [report.problem for report in reports if report.problem]:
        return Row(label=label, config=config, note=problems[0])
    seen = [report.ranks[0] for report in reports]
    clock, unit = ("wall_s", "1/s") if device == "cuda" else ("cpu_s", "per CPU s")
    windows = [window for report in reports for window in report.windows]
    speed = Measure.of(unit, [spec.window * spec.samples_a_step / window[clock] for window in windows])
    steps = [one["step_ms"][i : i + spec.window] for one in seen
             for i in range(0, len(one["step_ms"]), spec.window)]  # fmt: skip
    measures = {
        "samples": speed,
        "step p50": Measure.of("ms", [median(window) for window in steps]),
        "step p95": Measure.of("ms", [quantiles(window, n=20, method="inclusive")[-1] for window in steps]),
        "data wait": Measure.of("%", [100 * w["wait_s"] / w["wall_s"] for w in windows]),
    }  # fmt: skip
    peaks = ("allocated_gib", "reserved_gib") if device == "cuda" else ("resident_gib",)
    counts: dict[str, Any] = {
        f"{peak.removesuffix('_gib')}, GiB": max(one[peak] for one in seen) for peak in peaks
    }  # fmt: skip
    if rates := [one["matmul_rate"] for one in seen if "matmul_rate" in one]:
        counts["matmul, TFLOP/s"] = mean(rates) / 1e12
        counts["MFU, %"] = 100 * speed.median * each / mean(rates)
    odd = [
        name for name, value in seen[0]["counts"].items() if any(one["counts"][name] != value for one in seen)
    ]
    counts |= {name: value for name, value in seen[0]["counts"].items() if "collective" not in name}
    note = f"counts differ between repeats: {', '.join(odd)}" if odd else ""
    return Row(label=label, config=config, measures=measures, counts=counts, note=note)


def first_steps(spec: job.Spec, repeats: int, kinds: Sequence[str], bar: Any) -> list[Row]:
    """Process start to first optimizer step: with empty caches of compiled code, and again with full ones.

    The base is on disk. That its files were read before cannot be undone by a user's process.
    """
    spec = replace(spec, on_disk=True, warm_up=1, windows=1, window=1, rate=False)
    job.make(spec)
    found: dict[str, list[job.Report]] = {kind: [] for kind in kinds}
    for _ in range(repeats):
        caches = Path(tempfile.mkdtemp(prefix="caches-", dir=spec.work))
        env = {"XDG_CACHE_HOME": str(caches), "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
               "TRITON_CACHE_DIR": str(caches / "triton")}  # fmt: skip
        for reports in found.values():
            reports.append(job.run(replace(spec, env=env)))
            bar.update()
    rows = []
    for name, reports in found.items():
        config = {"batch": spec.batch, "set": list(spec.overrides), "caches": name}
        problem = next((report.problem for report in reports if report.problem), "")
        seen = [report.ranks[0] for report in reports if report.ranks]
        measures = {} if problem else {
            "imports": Measure.of("s", [one["imports_s"] for one in seen]),
            "imports, CPU": Measure.of("s", [one["imports_cpu_s"] for one in seen]),
            "load": Measure.of("s", [one["load_s"] for one in seen]),
            "first step": Measure.of("s", [one["first_step_s"] for one in seen]),
            "start to first step": Measure.of("s", [
                one["imports_s"] + one["load_s"] + one["first_step_s"] for one in seen]),
        }  # fmt: skip
        rows.append(Row(label=f"first step, {name}", config=config, measures=measures, note=problem))
    return rows


def parser() -> argparse.ArgumentParser:
    words = common.parser(__doc__, "model", "set", "windows", "window", "tag")
    words.add_argument("--batches", type=int, nargs="+", help="images of a forward pass")
    words.add_argument("--parts", nargs="+", choices=("sweep", "first"), default=["sweep", "first"])
    words.set_defaults(windows=5)
    return words


if __name__ == "__main__":
    common.main(run, parser())
