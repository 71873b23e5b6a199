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
from dbtrain.config import Adapter, Model
from dbtrain.models.base import Base
from dbtrain.runtime import console

WINDOW = {"tiny": 10, "sd15": 50, "sdxl": 20}  # steps
BATCHES = {"tiny": (1, 2, 4, 8), "sd15": (1, 2, 4, 8, 16, 32), "sdxl": (1, 2, 4, 8)}


def run(args: argparse.Namespace, work: Path) -> Result:
    if args.smoke:
        args.model, args.batches, args.repeats, args.window, args.windows = "tiny", [1], 1, 2, 3
    spec = job.Spec(
        args.model, str(work), 1, prior=args.prior, overrides=tuple(args.set), rate=True,
        warm_up=1 if args.smoke else 3, windows=args.windows, inline=args.smoke,
        window=args.window or WINDOW[args.model],
    )  # fmt: skip
    batches = args.batches or BATCHES[args.model]
    rounds = args.rounds or (1 if args.device == "cuda" else args.repeats)
    if args.device == "cuda" and spec.windows * rounds < common.LEAST and not args.smoke:
        raise SystemExit(
            f"error: --windows x --rounds is {spec.windows * rounds}; use {common.LEAST} or more"
        )
    path = "tiny" if args.model == "tiny" else str(bases.outline(args.model, work))
    _, each = flops.of_step(Base.find(Model(path=path)), bases.SIDES[args.model], _adapter(args.set))
    sweep = "sweep" in args.parts
    first = "first" in args.parts
    caches = ("cold",) if args.smoke else ("cold", "warm")
    rows: list[Row] = []
    with console.bar(
        sweep * rounds * len(batches) + first * len(caches) * args.repeats, f"throughput {args.model}", "run"
    ) as bar:
        if sweep:
            job.make(spec)
            specs = [replace(spec, batch=batch) for batch in batches]
            found = rounds_of(specs, rounds, bar)
            rows += [
                row(f"batch {s.batch}", s, r, args.device, each) for s, r in zip(specs, found, strict=True)
            ]
        if first:
            rows += first_steps(replace(spec, batch=batches[0]), args.repeats, caches, bar)
    note = f"One sample is {each / 1e12:.6g} TFLOP, forward and backward ({flops.SOURCE})."
    return common.result(args, "throughput", f"{args.model}-{args.device}{args.tag}", rows, note)


def rounds_of(specs: Sequence[job.Spec], rounds: int, bar: Any) -> list[list[job.Report]]:
    """Reports of each spec, run in turns: what slows the machine for a while slows all of them."""
    found: list[list[job.Report]] = [[] for _ in specs]
    for _ in range(rounds):
        for spec, reports in zip(specs, found, strict=True):
            if not (reports and reports[-1].problem):  # what cannot run is tried once
                reports.append(job.run(spec))
            bar.update()
    return found


def row(label: str, spec: job.Spec, reports: Sequence[job.Report], device: str, each: float) -> Row:
    """A line of the table: what all rounds of a spec have seen."""
    config = {"batch": spec.batch, "prior": spec.prior, "set": list(spec.overrides)}
    if problems := [report.problem for report in reports if report.problem]:
        return Row(label=label, config=config, note=problems[0])
    seen = [report.ranks[0] for report in reports]
    clock, unit = ("wall_s", "1/s") if device == "cuda" else ("cpu_s", "per CPU s")
    windows = [window for one in seen for window in one["windows"]]
    samples = [spec.window * one["samples_a_step"] for one in seen for _ in one["windows"]]
    speed = Measure.of(unit, [n / w[clock] for n, w in zip(samples, windows, strict=True)])
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
    spec = replace(spec, on_disk=True, warm_up=1, windows=1, window=1, rate=False, inline=False)
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


def _adapter(overrides: Sequence[str]) -> Adapter:
    """The adapter whose FLOPs count."""
    ranks = [int(item.partition("=")[2]) for item in overrides if item.startswith("adapter.rank=")]
    return Adapter(rank=(ranks or [8])[-1])


def parser() -> argparse.ArgumentParser:
    words = common.parser(__doc__)
    words.add_argument("--model", choices=bases.MODELS, default="tiny")
    words.add_argument("--batches", type=int, nargs="+", help="instance images in a forward pass")
    words.add_argument("--prior", action="store_true", help="as many class images ride along")
    words.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="over the config's")
    words.add_argument("--windows", type=int, default=5, help="timed windows of each run")
    words.add_argument("--window", type=int, help="steps of a window")
    words.add_argument("--rounds", type=int, help="processes a batch (default: 1 on a GPU, else --repeats)")
    words.add_argument("--parts", nargs="+", choices=("sweep", "first"), default=["sweep", "first"])
    words.add_argument("--tag", default="", help="added to the name of the result file, e.g. -compiled")
    return words


if __name__ == "__main__":
    common.main(run, parser())
