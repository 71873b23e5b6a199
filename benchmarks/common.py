"""What all benchmarks share: arguments, the result file, and what machine and versions it tells of.

Every script is run from a checkout, as `python -m benchmarks.NAME`. It writes one JSON file, checked by
the schema below, and prints its table; `python -m benchmarks.report` makes pages and plots of all of them.
Bases with random weights are made by `benchmarks/bases.py`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator

from benchmarks.architectures import published
from dbtrain.config.base import Names, Section
from dbtrain.runtime import console, dist, files

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LEAST = 3  # repeats of everything that is timed
SUITE: Literal["dbtrain benchmarks 1"] = "dbtrain benchmarks 1"

Floats = Annotated[
    tuple[float, ...], BeforeValidator(lambda v: tuple(map(float, v)) if isinstance(v, list) else v)
]


class Measure(Section):
    """Something measured several times: every sample, and what sums them up."""

    unit: str
    samples: Floats = Field(min_length=1)
    median: float
    min: float
    max: float

    @classmethod
    def of(cls, unit: str, samples: Sequence[float]) -> Measure:
        """The measure of these samples, in this unit."""
        values = tuple(float(sample) for sample in samples)
        return cls(unit=unit, samples=values, median=median(values), min=min(values), max=max(values))

    @model_validator(mode="after")
    def _sums_up(self) -> Measure:
        told = (self.median, self.min, self.max)
        if told != (median(self.samples), min(self.samples), max(self.samples)):
            raise ValueError("median, min and max are not those of the samples")
        return self

    def __str__(self) -> str:
        if self.min == self.max:
            return f"{number(self.median)} {self.unit}".strip()
        return f"{number(self.median)} ({number(self.min)} to {number(self.max)}) {self.unit}".strip()


class Row(Section):
    """One line of a benchmark's table: what was run, what was measured, what was counted."""

    label: str
    config: dict[str, Any] = Field({}, description="what sets this row apart")
    measures: dict[str, Measure] = Field({}, description="timed, with every sample")
    counts: dict[str, float | int | str | None] = Field({}, description="counted or computed: exact")
    note: str = Field("", description="why there are no figures, if there are none")

    def added_to(self, old: Row) -> Row:
        """This row with the samples of an earlier one before its own."""
        if not (old.measures and self.measures):
            return self if self.measures else old
        measures = {
            name: Measure.of(one.unit, (*old.measures[name].samples, *one.samples))
            for name, one in self.measures.items() if name in old.measures
        }  # fmt: skip
        return self.model_copy(update={"measures": measures})


class Hardware(Section):
    cpu: str
    cores: int
    memory_gib: float
    gpu: str | None = None
    gpu_memory_gib: float | None = None
    driver: str | None = None

    @classmethod
    def here(cls) -> Hardware:
        """This machine."""
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        found: dict[str, Any] = {
            "cpu": _cpu(), "cores": len(os.sched_getaffinity(0)), "memory_gib": round(pages, 1),
        }  # fmt: skip
        if torch.cuda.is_available():
            about = torch.cuda.get_device_properties(0)
            found |= {"gpu": about.name, "gpu_memory_gib": round(about.total_memory / 2**30, 1)}
            found |= {"driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")}
        return cls(**found)

    def __str__(self) -> str:
        gpu = f"{self.gpu} ({self.gpu_memory_gib:g} GiB, driver {self.driver}); " if self.gpu else ""
        return f"{gpu}{self.cpu}, {self.cores} cores, {self.memory_gib:g} GiB"


class Result(Section):
    """One run of one benchmark."""

    suite: Literal["dbtrain benchmarks 1"] = SUITE
    name: str = Field(description="the script")
    subject: str = Field(description="model and device, or what else tells runs of a script apart")
    command: str
    smoke: bool
    config: dict[str, Any] = Field(description="arguments and settings, resolved")
    hardware: Hardware
    versions: dict[str, str | None]
    rows: Annotated[tuple[Row, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]
    notes: Names = ()

    @property
    def file(self) -> str:
        return f"{self.name}-{self.subject}"

    @classmethod
    def read(cls, path: Path) -> Result:
        """The result in a file. Raises pydantic's ValidationError if it is none."""
        return cls.model_validate_json(path.read_text(encoding="utf-8"), strict=False)

    def added_to(self, old: Result) -> Result:
        """Both together. Raises SystemExit unless they are runs of the same thing on the same machine."""
        if (old.hardware, old.versions, old.config) != (self.hardware, self.versions, self.config):
            raise SystemExit(f"error: {self.file}.json is of another machine, version or setting: remove it")
        rows = {row.label: row for row in old.rows}
        joined = [row.added_to(rows[row.label]) if row.label in rows else row for row in self.rows]
        kept = [row for row in old.rows if row.label not in {row.label for row in self.rows}]
        return self.model_copy(update={"rows": (*kept, *joined)})

    def write(self, out: Path) -> Path:
        """Write it into the folder `out`, and print its table."""
        path = out / f"{self.file}.json"
        text = self.model_dump_json(indent=1) + "\n"
        Result.model_validate_json(text, strict=False)  # what is read again is what was written
        files.write_atomically(path, text)
        print(self.markdown())
        console.say(f"results: {path}")
        return path

    def markdown(self) -> str:
        """The table, with the command, machine and versions above it."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items() if version)
        lines = [f"`{self.command}`", "", f"{self.hardware}; {versions}.", "", *table(self.rows)]
        return "\n".join([*lines, *[part for note in self.notes for part in ("", note)]]) + "\n"


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of markdown tables: a column for every measure and count; rows that share none, apart."""
    groups: list[tuple[list[str], list[Row]]] = []
    for row in rows:
        mine = [*row.measures, *row.counts]
        for columns, members in groups:
            if not mine or set(mine) & set(columns):
                columns += [name for name in mine if name not in columns]
                members.append(row)
                break
        else:
            groups.append((mine, [row]))
    lines: list[str] = []
    for columns, members in groups:
        lines += [""] * bool(lines)
        lines += [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for row in members:
            found = {**row.counts, **row.measures}
            cells = [_cell(found.get(name)) for name in columns]
            lines.append(f"| {' | '.join([row.label + (f': {row.note}' if row.note else ''), *cells])} |")
    return lines


def number(value: float) -> str:
    """Three digits that matter, and no exponents."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _cell(value: Measure | float | int | str | None) -> str:
    if value is None:
        return ""
    return number(value) if isinstance(value, (int, float)) else str(value)


OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"choices": ("tiny", *published()), "default": "tiny"},
    "set": {"nargs": "*", "default": [], "metavar": "KEY=VALUE", "help": "put over the config's settings"},
    "tag": {"default": "", "help": "added to the name of the result file, e.g. -compiled"},
    "windows": {"type": int, "default": 3, "help": "timed windows of each run"},
    "window": {"type": int, "help": "steps of a window"},
}  # what several benchmarks have


def parser(doc: str | None, *options: str) -> argparse.ArgumentParser:
    """The arguments that every benchmark has, and those of `OPTIONS` that are named."""
    words = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--out", type=Path, help="folder of the JSON (default: benchmarks/results; of "
                       "--smoke: runs/smoke)")  # fmt: skip
    words.add_argument("--work", type=Path, help="folder of bases and runs, kept (default: a temporary one)")
    words.add_argument("--repeats", type=int, default=LEAST, help="how often each timing is taken")
    words.add_argument("--append", action="store_true", help="add the repeats to those of an earlier call "
                       "with the same settings, on the same machine and versions")  # fmt: skip
    words.add_argument("--smoke", action="store_true", help="small, on the embedded base: does it run?")
    for name in options:
        words.add_argument(f"--{name}", **OPTIONS[name])
    return words


def main(run: Callable[[argparse.Namespace, Path], Result], words: argparse.ArgumentParser) -> None:
    """Run a benchmark with the arguments of this process, in a work folder; write what it gives."""
    args = words.parse_args()
    console.start()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cpu":
        torch.set_num_threads(1)
    out = args.out or (ROOT / "runs" / "smoke" if args.smoke else RESULTS)
    with tempfile.TemporaryDirectory(prefix="dbtrain-benchmark-") as temporary:
        work = (args.work or Path(temporary)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        found = run(args, work)
        path = out / f"{found.file}.json"
        if dist.is_main():
            (found.added_to(Result.read(path)) if args.append and path.exists() else found).write(out)
    dist.finish(0)


def clock(device: str) -> Callable[[], float]:
    """Seconds that other programs do not lengthen: wall on a GPU, once it is idle; CPU time on a CPU."""

    def wall_s() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return wall_s if device == "cuda" else time.process_time


def result(args: argparse.Namespace, name: str, subject: str, rows: Sequence[Row], *notes: str) -> Result:
    """The result of a run of this process, with all that it must tell of itself."""
    config = {k: v for k, v in vars(args).items() if k not in ("out", "work", "smoke", "append")}
    return Result(
        name=name, subject=subject, command=command(name), smoke=args.smoke, config=_plain(config),
        hardware=Hardware.here(), versions=versions(), rows=tuple(rows), notes=notes,
    )  # fmt: skip


def command(name: str) -> str:
    """What was typed, without the folders of this machine."""
    words: list[str] = []
    skip = False
    for word in sys.argv[1:]:
        if not (skip or word.partition("=")[0] in ("--out", "--work")):
            key, sign, value = word.rpartition("=")
            words.append(key + sign + Path(value).name if value.startswith("/") else word)
        skip = word in ("--out", "--work")
    return f"python -m benchmarks.{name} {shlex.join(words)}".rstrip()


def versions() -> dict[str, str | None]:
    """Of Python, the libraries, and, in a git checkout, the last commit that changed dbtrain."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers", "peft"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # on the path without being installed
            found[name] = str(__import__(name).__version__)
    found["cuda"] = torch.version.cuda
    commit = _said("git", "-C", str(ROOT), "log", "-1", "--format=%h", "--abbrev=12", "--", "dbtrain")
    changed = commit and _said("git", "-C", str(ROOT), "status", "--porcelain", "-uno", "--", "dbtrain")
    found["dbtrain"] = f"{commit} with changes" if changed else commit
    return found


def _said(*words: str) -> str | None:
    """First line that a command says; None if there is no such command, or it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return None
    lines = done.stdout.strip().splitlines() if done.returncode == 0 else []
    return lines[0].strip() if lines else None


def _cpu() -> str:
    about = Path("/proc/cpuinfo")
    text = about.read_text() if about.exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON has them, without the folders of this machine."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path) or (isinstance(value, str) and value.startswith("/")):
            return Path(value).name
        return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value

    return {name: plain(value) for name, value in values.items()}
