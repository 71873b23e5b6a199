"""Pages and plots of all results of this suite, and what has not been measured.

    python -m benchmarks.report

Every `benchmarks/results/*.json` of the suite becomes a page beside it, most with a plot;
`performance.md` lists them, and says plainly what is missing. Other files of the folder are left alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import LEAST, SUITE, Measure, Result, Row
from dbtrain.runtime import console, files

# What a complete set of results has: script, subject, and what it says.
EXPECTED = (
    ("cards", "predicted", "which GPU holds which model, predicted"),
    ("choose_settings", "proving", "the quickstart's recipe on eight subjects that it was not chosen on"),
    ("choose_settings", "proving-prior_by_prediction", "the same without class images, on eight others"),
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
    ("memory", "tiny-256-cpu", "memory of the embedded base's steps, predicted and measured on a CPU"),
    ("memory", "flux1-small-256-cpu", "memory of a small FLUX.1's steps, with blocks swapped too, on a CPU"),
    ("memory", "flux1-small-256-cpu-2-ranks", "the same, sharded over two ranks"),
    ("loading", "cpu", "host memory that loading a denoiser of 3 GB takes, whole and sharded"),
    ("text_encoders", "t5-cpu", "a T5 of 1.7 GiB whole and layer by layer, on a CPU"),
    ("data", "cpu", "reading shards"),
    ("scaling", "tiny-cpu", "one and two processes on a CPU"),
    ("scaling", "sd15-cuda", "one and more GPUs"),
    ("end_to_end", "tiny-cpu", "photos to adapter with the embedded base on a CPU"),
    ("end_to_end", "sd15-cuda", "photos to adapter with SD-1.5 and 200 class images, on a GPU"),
    ("end_to_end", "sd15-cuda-no-class-images", "photos to adapter with SD-1.5, without class images"),
    ("fleet", "tiny-cpu", "subjects an hour with the embedded base, together and one by one, on a CPU"),
    ("fleet", "tiny-cpu-16-on-2-ranks", "the same by the clock, 16 subjects, beside Diffusers' script"),
    ("fleet", "tiny-cpu-64-on-2-ranks", "the same by the clock, 64 subjects"),
    ("fleet", "sd15-cuda", "subjects an hour with SD-1.5, on a GPU"),
    ("fleet", "sdxl-cuda", "subjects an hour with SDXL, on a GPU"),
    ("prior", "tiny-cpu", "class images of the embedded base on a CPU"),
    ("prior_step", "cpu", "what a step costs by the kind of prior preservation"),
    ("prior", "sd15-cuda", "class images of SD-1.5 on a GPU"),
    ("prior", "sdxl-cuda", "class images of SDXL on a GPU"),
    ("stopping", "tiny-cpu", "where a run stops that looks for its best step, on the embedded base"),
    ("masks", "tiny", "what masks are worth where another thing is beside the subject in the photos"),
    ("quantization", "cpu", "errors of quantized base linears"),
    ("quantization", "cuda", "errors and speed of quantized base linears, on a GPU"),
    ("vs_diffusers", "step-tiny-fp32-cpu", "a step beside one of Diffusers' script, on a CPU"),
    ("vs_diffusers", "step-sd15-bf16-cuda", "a step beside one of Diffusers' script, SD-1.5 on a GPU"),
    ("vs_diffusers", "tiny-fp32-cpu", "Diffusers' unmodified script, photos to adapter, on a CPU"),
    ("vs_diffusers", "tiny-fp32-cpu-drawn", "the same with class images, which each generates itself"),
)


def read_all(folder: Path) -> list[Result]:
    """The suite's results in a folder; files of others are passed over, broken ones of ours are not."""
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


# What a script's plot shows: the parts of a time, stacked, or one figure.
PLOTS: dict[str, tuple[str, ...]] = {
    "throughput": ("samples",), "prior": ("class images",), "scaling": ("efficiency",),
    "data": ("amplification, most",), "ladder": ("speed-up",), "choose_settings": ("closed",),
    "stopping": ("gained",),
    "fleet": ("subjects per hour",),
    "end_to_end": ("imports", "class images", "encode", "train start", "steps", "export"),
}  # fmt: skip
FIRST_STEP = ("imports", "load", "first step")  # of throughput's results without a sweep


def _bars(axis: Any, rows: Sequence[Row], names: Sequence[str]) -> None:
    """A bar a row, of the medians of its parts; of a single figure with its spread."""
    rows = [row for row in rows if any(name in row.measures or name in row.counts for name in names)]
    left, unit = [0.0] * len(rows), ""
    for name in names:
        found = [row.measures.get(name) or Measure.of("", [float(row.counts.get(name) or 0)]) for row in rows]
        spread = [[one.median - one.min for one in found], [one.max - one.median for one in found]]
        error = {"xerr": spread, "capsize": 3} if len(names) == 1 else {}
        axis.barh([row.label for row in rows], [one.median for one in found], left=left, label=name, **error)
        left = [a + one.median for a, one in zip(left, found, strict=True)]
        unit = unit or found[0].unit
    axis.set_xlabel(unit if len(names) > 1 else ", ".join(filter(None, [names[0], unit])))
    axis.invert_yaxis()
    if len(names) > 1:
        axis.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.45, -0.25))


def draw(result: Result, out: Path) -> str | None:
    """The result's plot, if its script has one; returns its file name."""
    if result.name not in PLOTS or not any(row.measures for row in result.rows):
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = PLOTS[result.name]
    if not any(name in row.measures or name in row.counts for row in result.rows for name in names):
        names = FIRST_STEP
    figure, axis = plt.subplots(figsize=(8, max(3.2, 0.4 * len(result.rows))), layout="constrained")
    _bars(axis, result.rows, names)
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
