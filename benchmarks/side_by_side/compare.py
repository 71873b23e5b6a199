"""From runs to figures: windows, ratios, whether they say anything, and what shows that the work is equal."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import safetensors.torch

from benchmarks.common import Measure, Row, number
from benchmarks.side_by_side.runs import LORA, Run

WHOLE: dict[str, tuple[str, Callable[[Run], float]]] = {
    "photos → adapter, CPU": ("s", lambda run: run.cpu_s),
    "photos → adapter, wall": ("s", lambda run: run.wall_s),
    "up to the first step, CPU": ("s", lambda run: run.start_cpu_s),
    "after the last step, CPU": ("s", lambda run: run.after_cpu_s),
    "peak memory": ("GiB", lambda run: run.seen.get("peak_gpu_gib") or run.seen["peak_rss_gib"]),
}


def steps(first: int) -> dict[str, tuple[str, Callable[[Run], float]]]:
    """The figures of a step, by column."""
    return {
        "step, CPU": ("ms", lambda run: run.step(first)["cpu"]),
        "step, wall": ("ms", lambda run: run.step(first)["wall"]),
    }


def rows(
    name: str,
    theirs: Sequence[Run],
    ours: Sequence[Run],
    columns: Mapping[str, tuple[str, Callable[[Run], float]]],
    main: str,
) -> list[Row]:
    """Three rows: the reference, dbtrain, and how many times faster it is, from pair to pair.

    `main`: the column that the verdict is about.
    """
    sides = {"reference": theirs, "dbtrain": ours}
    found = {
        side: {column: Measure.of(unit, [figure(run) for run in runs])
               for column, (unit, figure) in columns.items()}
        for side, runs in sides.items()
    }  # fmt: skip
    ratios = {
        column: Measure.of("x", [a / b for a, b in zip(
            found["reference"][column].samples, found["dbtrain"][column].samples, strict=True)])
        for column in columns
    }  # fmt: skip
    said = verdict(found["reference"][main], found["dbtrain"][main])
    return [
        *[Row(label=f"{name}: {side}", measures=measures) for side, measures in found.items()],
        Row(label=f"{name}: reference / dbtrain", measures=ratios, counts={"verdict": f"{main}: {said}"}),
    ]


def verdict(theirs: Measure, ours: Measure) -> str:
    """Whether the figures differ by more than they spread: else there is no difference to speak of."""
    if max(theirs.min, ours.min) <= min(theirs.max, ours.max):
        return "no difference"
    return "dbtrain is faster" if ours.max < theirs.min else "the reference is faster"


def files(theirs: Path, ours: Path) -> dict[str, Any]:
    """The two LoRA files: do they hold the same tensors, and how large did they become?"""
    a, b = (safetensors.torch.load_file(folder / LORA) for folder in (theirs, ours))
    a, b = ({_plain(name): tensor for name, tensor in each.items()} for each in (a, b))
    shapes = [{name: tuple(tensor.shape) for name, tensor in each.items()} for each in (a, b)]
    return {
        "tensors": (len(a), len(b)), "same names and shapes": shapes[0] == shapes[1],
        "only in the reference's": sorted(shapes[0].keys() - shapes[1].keys())[:3],
        "only in dbtrain's": sorted(shapes[1].keys() - shapes[0].keys())[:3],
        "parameters": tuple(sum(t.numel() for t in each.values()) for each in (a, b)),
        "norm of the up projections": tuple(_norm(each, ("lora_B", "lora.up")) for each in (a, b)),
        "norm of the down projections": tuple(_norm(each, ("lora_A", "lora.down")) for each in (a, b)),
    }  # fmt: skip


def _plain(name: str) -> str:
    """A tensor's name in one spelling: Diffusers knows an older and a newer one."""
    return name.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B.")


def _norm(tensors: Mapping[str, Any], marks: tuple[str, ...]) -> float:
    squares = [
        t.double().square().sum() for name, t in tensors.items() if any(mark in name for mark in marks)
    ]
    return float(sum(squares)) ** 0.5


def losses(theirs: Run, ours: Run) -> dict[str, tuple[Any, Any]]:
    """The two loss curves: mean and standard error of each quarter, as noise and timesteps differ."""
    lines = (ours.folder / "run" / "metrics.jsonl").read_text().splitlines()
    curves = [theirs.seen["losses"], [json.loads(line)["loss"] for line in lines]]
    part = max(2, len(curves[1]) // 4)
    found = {}
    for start in range(0, len(curves[1]) - part + 1, part):
        a, b = (_mean([*curve[start : start + part]]) for curve in curves)
        found[f"loss, mean of steps {start + 1} to {start + part}"] = (a, b)
    return found


def _mean(values: Sequence[float]) -> str:
    return f"{mean(values):.4f} ± {stdev(values) / len(values) ** 0.5:.4f}"


# Kernels by what they are for; the first group whose mark is in the name has it.
GROUPS = {
    "convolutions": ("convolution", "conv2d", "col2im", "im2col", "thnn_conv"),
    "attention": ("scaled_dot_product",),
    "matrix products": ("addmm", "aten::mm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul"),
    "norms": ("group_norm", "layer_norm", "GroupNorm", "LayerNorm"),
    "optimizer": ("Optimizer", "_adam", "lerp", "addcmul", "addcdiv", "_foreach", "clip_grad"),
    "reading data": ("DataLoader",),
    "copies and casts": ("copy_", "_to_copy", "aten::to", "clone", "contiguous"),
    "pointwise": (
        "silu",
        "gelu",
        "aten::mul",
        "aten::add",
        "aten::div",
        "aten::sub",
        "aten::cat",
        "aten::sum",
    ),
    "autograd": ("autograd", "Backward"),
}


def grouped(kernels: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """CPU time a step in the profiler's kernels, by group, ms."""
    found = dict.fromkeys([*GROUPS, "views and all else"], 0.0)
    for name, (_, ms) in kernels.items():
        group = next((g for g, marks in GROUPS.items() if any(mark in name for mark in marks)), None)
        found[group or "views and all else"] += ms
    return found


def two_columns(title: str, facts: Mapping[str, tuple[Any, Any]]) -> str:
    """A markdown table: a fact a line, the reference's beside dbtrain's."""
    lines = [f"| {title} | reference | dbtrain |", "|---|---|---|"]
    lines += [f"| {name} | {_cell(a)} | {_cell(b)} |" for name, (a, b) in facts.items()]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return number(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
