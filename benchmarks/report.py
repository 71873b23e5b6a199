"""Pages and plots of all results of this suite, and what has not been measured.

    python -m benchmarks.report

Every `benchmarks/results/*.json` of the suite becomes a page beside it, most with a plot;
`performance.md` lists them, and says plainly what is missing. Other files of the folder are left alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import LEAST, SUITE, Result, Row
from dbtrain.runtime import console, files

# What a complete set of results has: script, subject, and what it says.
EXPECTED = (
    ("throughput", "tiny-cpu", "training speed of the embedded base on a CPU"),
    ("throughput", "sd15-cuda", "SD-1.5, 512 px, over batch sizes, on a GPU"),
    ("throughput", "sd15-cuda-compiled", "SD-1.5, 512 px, compiled, over batch sizes, on a GPU"),
    ("throughput", "sd15-cuda-first", "SD-1.5: time to the first step, eager"),
    ("throughput", "sd15-cuda-first-compiled", "SD-1.5: time to the first step, compiled, cold and warm"),
    ("throughput", "sdxl-cuda", "SDXL, 1024 px, over batch sizes, on a GPU"),
    ("throughput", "sdxl-cuda-compiled", "SDXL, 1024 px, compiled, over batch sizes, on a GPU"),
    ("ladder", "sd15-batch2-cuda", "what each flag is worth for SD-1.5 at batch 2, on a GPU"),
    ("ladder", "sd15-batch16-cuda", "what each flag is worth for SD-1.5 at batch 16, on a GPU"),
    ("ladder", "sdxl-batch4-cuda", "what each flag is worth for SDXL at batch 4, on a GPU"),
    ("data", "cpu", "reading shards"),
    ("scaling", "tiny-cpu", "one and two processes on a CPU"),
    ("scaling", "sd15-cuda", "one and more GPUs"),
    ("end_to_end", "tiny-cpu", "photos to adapter with the embedded base on a CPU"),
    ("end_to_end", "sd15-cuda", "photos to adapter with SD-1.5 and 200 class images, on a GPU"),
    ("end_to_end", "sd15-cuda-no-class-images", "photos to adapter with SD-1.5, without class images"),
    ("prior", "tiny-cpu", "class images of the embedded base on a CPU"),
    ("prior", "sd15-cuda", "class images of SD-1.5 on a GPU"),
    ("prior", "sdxl-cuda", "class images of SDXL on a GPU"),
    ("vs_diffusers", "step-tiny-fp32-cpu", "a step beside one of Diffusers' script, on a CPU"),
    ("vs_diffusers", "step-sd15-bf16-cuda", "a step beside one of Diffusers' script, SD-1.5 on a GPU"),
    ("vs_diffusers", "tiny-fp32-cpu", "Diffusers' unmodified script, photos to adapter, on a CPU"),
    ("vs_diffusers", "tiny-fp32-cpu-drawn", "the same with class images, which each generates itself"),
)


def read_all(folder: Path) -> list[Result]:
    """The suite's results in a folder; files of others are passed over, harmed ones of ours are not."""
    found = []
    for path in sorted(folder.glob("*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and values.get("suite") == SUITE:
            found.append(Result.read(path))
    return found


def page(result: Result, plot: str | None) -> str:
    """A result's markdown page."""
    lines = [f"# {result.name}: {result.subject}", "", result.markdown()]
    few = sorted({
        name for row in result.rows for name, one in row.measures.items() if len(one.samples) < LEAST
    })  # fmt: skip
    if few:
        lines += [f"Fewer than {LEAST} repeats: {', '.join(few)}.", ""]
    lines += ["Medians, with the least and the most in brackets; the JSON file has every sample."]
    if plot:
        lines += ["", f"![{result.name} {result.subject}]({plot})"]
    return "\n".join(lines) + "\n"


def summary(results: Sequence[Result]) -> str:
    """The list of pages, and what is missing."""
    there = {(result.name, result.subject) for result in results}
    also = [(r.name, r.subject, "") for r in results if (r.name, r.subject) not in {e[:2] for e in EXPECTED}]
    lines = ["# Performance", "", "| benchmark | what | measured on |", "|---|---|---|"]
    by_file = {(result.name, result.subject): result for result in results}
    for name, subject, what in (*EXPECTED, *also):
        if (name, subject) in by_file:
            result = by_file[name, subject]
            lines.append(f"| [{result.file}]({result.file}.md) | {what} | {result.hardware} |")
    missing = [row for row in EXPECTED if row[:2] not in there and not _parts(row, there)]
    lines += ["", "## Not measured", ""]
    lines += [f"- {name}, {subject}: {what}" for name, subject, what in missing] or ["Nothing is missing."]
    blanks = [(result, row) for result in results for row in result.rows if not row.measures and row.note]
    lines += [f"- a row of {result.file}, *{row.label}*: {row.note}" for result, row in blanks]
    if not any(result.hardware.gpu for result in results):
        lines += ["", "There are no figures of any GPU: nothing here says how fast dbtrain is on one. On a "
                  "machine with a CUDA GPU, `bash benchmarks/gpu_all.sh` makes them."]  # fmt: skip
    return "\n".join(lines) + "\n"


def _parts(row: tuple[str, str, str], there: set[tuple[str, str]]) -> bool:
    """Whether something was measured in several calls, a file each, as ladders and long compilations are."""
    name, subject, _ = row
    several = name == "ladder" or subject.endswith("-compiled")
    return several and any(one == name and its.startswith(subject) for one, its in there)


def _over_batches(axis: Any, rows: Sequence[Row], measure: str) -> None:
    rows = [row for row in rows if measure in row.measures and "batch" in row.config]
    batches = [row.config["batch"] for row in rows]
    _with_spread(axis, batches, rows, measure)
    axis.set(xlabel="batch", xscale="log", xticks=batches, xticklabels=batches, ylim=(0, None))
    axis.minorticks_off()


def _with_spread(axis: Any, places: Sequence[float], rows: Sequence[Row], measure: str) -> None:
    """Medians, joined, with bars from least to most."""
    found = [row.measures[measure] for row in rows]
    middle = [one.median for one in found]
    spread = [[one.median - one.min for one in found], [one.max - one.median for one in found]]
    axis.errorbar(places, middle, yerr=spread, marker="o", capsize=3)
    axis.set_ylabel(f"{measure}, {found[0].unit}")


def _throughput(axis: Any, rows: Sequence[Row]) -> None:
    if any("samples" in row.measures for row in rows):
        _over_batches(axis, rows, "samples")
    else:
        _stacked(axis, rows, ("imports", "load", "first step"))


def _prior(axis: Any, rows: Sequence[Row]) -> None:
    _over_batches(axis, rows, "class images")


def _scaling(axis: Any, rows: Sequence[Row]) -> None:
    rows = [row for row in rows if row.measures]
    _with_spread(axis, [row.config["processes"] for row in rows], rows, "efficiency")
    axis.axhline(100, color="grey", lw=0.8)
    axis.set(xlabel="processes", xticks=[row.config["processes"] for row in rows], ylim=(0, 115))


def _data(axis: Any, rows: Sequence[Row]) -> None:
    rows = [row for row in rows if "amplification, most" in row.counts]
    labels = [str(row.config["ranks"]) for row in rows]
    for kind, marker in (("mean", "o-"), ("most", "s--")):
        axis.plot(labels, [row.counts[f"amplification, {kind}"] for row in rows], marker, label=kind)
    axis.set(xlabel="ranks", ylabel="bytes read over the rank's share", ylim=(0, None))
    axis.legend()


def _end_to_end(axis: Any, rows: Sequence[Row]) -> None:
    skipped = ("photos to adapter", "wall")
    _stacked(axis, rows, [name for name in rows[0].measures if name not in skipped])


def _stacked(axis: Any, rows: Sequence[Row], phases: Sequence[str]) -> None:
    """A bar a row, of the medians of its phases."""
    rows = [row for row in rows if any(phase in row.measures for phase in phases)]
    left = [0.0] * len(rows)
    for phase in phases:
        widths = [row.measures[phase].median if phase in row.measures else 0.0 for row in rows]
        axis.barh([row.label for row in rows], widths, left=left, label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.set_xlabel("s")
    axis.invert_yaxis()
    axis.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.45, -0.25))


def _ladder(axis: Any, rows: Sequence[Row]) -> None:
    rows = [row for row in rows if "speed-up" in row.measures]
    names = [row.label for row in rows]
    found = [row.measures["speed-up"] for row in rows]
    spread = [[one.median - one.min for one in found], [one.max - one.median for one in found]]
    axis.barh(names, [one.median for one in found], xerr=spread, color="tab:blue", label="measured")
    for place, row in enumerate(rows):
        ends = [float(end) for end in str(row.counts["predicted"]).removesuffix("x").split(" to ")
                if end != "none"]  # fmt: skip
        if ends:
            axis.plot(ends, [place] * len(ends), "D-", color="tab:orange", label="" if place else "predicted")
    axis.axvline(1, color="grey", lw=0.8)
    axis.set_xlabel("speed-up over the first row")
    axis.invert_yaxis()
    axis.legend(fontsize=8)


PLOTS: dict[str, Callable[[Any, Sequence[Row]], None]] = {
    "throughput": _throughput, "prior": _prior, "scaling": _scaling, "data": _data,
    "end_to_end": _end_to_end, "ladder": _ladder,
}  # fmt: skip


def draw(result: Result, out: Path) -> str | None:
    """The result's plot, if its script has one; returns its file name."""
    if result.name not in PLOTS or not any(row.measures for row in result.rows):
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tall = max(3.2, 0.4 * len(result.rows)) if result.name == "ladder" else 3.2
    figure, axis = plt.subplots(figsize=(8, tall), layout="constrained")
    PLOTS[result.name](axis, result.rows)
    axis.set_title(
        f"{result.name} {result.subject} ({result.hardware.gpu or result.hardware.cpu})", fontsize=9
    )
    axis.grid(alpha=0.3)
    figure.savefig(out / f"{result.file}.png", dpi=110)
    plt.close(figure)
    return f"{result.file}.png"


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the results")
    args = words.parse_args()
    console.start()
    results = read_all(args.out)
    with console.bar(len(results), "report", "page") as bar:
        for result in results:
            files.write_atomically(args.out / f"{result.file}.md", page(result, draw(result, args.out)))
            bar.update()
    files.write_atomically(args.out / "performance.md", summary(results))
    console.say(f"{len(results)} pages, and {args.out / 'performance.md'}")


if __name__ == "__main__":
    main()
