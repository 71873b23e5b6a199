"""What the result says besides its table: equal work, where the time goes, and how far it could go."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.side_by_side import compare, witness
from benchmarks.side_by_side.runs import Reference, Run

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")


def equal_work(theirs: Run, ours: Run, kept: Path | None) -> tuple[dict[str, Any], list[str]]:
    """What two closely watched runs show: (JSON-able facts, markdown).

    `kept`: what the reference's first step left; None where it was several micro-batches.
    """
    facts: dict[str, tuple[Any, Any]] = {}
    a, b = theirs.seen, ours.seen
    for name in a["optimizer"]:
        facts[f"optimizer: {name}"] = (a["optimizer"][name], b["optimizer"].get(name))
    facts["threads"] = (a["threads"], b["threads"])
    file = compare.files(theirs.folder / "run", ours.folder / "run" / "export")
    for name in ("tensors", "parameters", "norm of the down projections", "norm of the up projections"):
        facts[f"LoRA file: {name}"] = file[name]
    facts |= compare.losses(theirs, ours)
    counted = [sum(seen["operators"].values()) for seen in (a, b)]
    facts["operators dispatched in a step, compute-matched"] = (counted[0], counted[1])
    facts["values read back by the host in a step"] = tuple(  # type: ignore[assignment]
        seen["operators"].get("aten._local_scalar_dense.default", 0) for seen in (a, b)
    )
    gradients: dict[str, Any] = {"note": "one step of several micro-batches: not compared"}
    if kept:
        gradients = witness.agreement(kept, ours.folder / "config.yaml")
    kinds = [compare.grouped(seen["kernels"]) for seen in (a, b)]
    spent = {name: (kinds[0][name], kinds[1][name]) for name in kinds[0]}
    spent["all"] = (sum(kinds[0].values()), sum(kinds[1].values()))
    told = {
        "facts": {name: list(pair) for name, pair in facts.items()}, "gradients": gradients,
        "same tensors in both LoRA files": file["same names and shapes"],
        "kernels_ms": {name: list(pair) for name, pair in spent.items()},
        "operators": {"reference": a["operators"], "dbtrain": b["operators"]},
    }  # fmt: skip
    return told, _pages(facts, gradients, file, spent)


def _pages(facts: Any, gradients: Any, file: Any, spent: Any) -> list[str]:
    agreed = "; ".join(f"{k} {v if isinstance(v, str) else f'{v:.7g}'}" for k, v in gradients.items())
    same = "the same names and shapes" if file["same names and shapes"] else "DIFFERENT names or shapes"
    odd = differences(facts)
    return [
        "**Equal work.** The reference's first step (its latents, noise, timesteps and adapter) taken again "
        f"by dbtrain's `train_step`: {agreed}. Both LoRA files hold {same}. What differs: the images' order, "
        "noise and timesteps are drawn by each program's own generators, so that the losses below are of "
        f"other draws; {odd or 'of the optimizer and the threads, nothing'}.",
        compare.two_columns("", facts),
        "**Where a compute-matched step's time goes** (torch's profiler over up to ten steps of one run; the "
        "profiler itself slows both, operator by operator, so that shares count and sums do not):",
        compare.two_columns("CPU ms a step", spent),
    ]


def differences(facts: Mapping[str, tuple[Any, Any]]) -> str:
    """Settings that are not the same in both, said in words: nothing is equal work by our word alone."""
    settings = {name: pair for name, pair in facts.items() if name == "threads" or "optimizer" in name}
    return "; ".join(f"{name}: {a} against dbtrain's {b}" for name, (a, b) in settings.items() if a != b)


def about(reference: Reference) -> str:
    """Which script and which packages the reference was, and what stood in for what."""
    digest = hashlib.sha256(reference.script.read_bytes()).hexdigest()
    names = ", ".join(repr(name) for name in PACKAGES)
    line = (
        f"from importlib.metadata import version; print(*(n + ' ' + version(n) for n in ({names})), sep=', ')"
    )
    done = subprocess.run([reference.python, "-c", line], check=True, capture_output=True, text=True)
    text = (
        f"The reference: `{reference.script.name}`, unmodified, sha256 {digest[:16]}; {done.stdout.strip()}."
    )
    if not reference.torchvision:
        text += (
            " Its Python cannot import torchvision: a stand-in with the same transforms took its place, "
            "which is quicker to import (in the reference's favour)."
        )
    return text


def limit(matched_ms: Sequence[float], floors: Sequence[tuple[float, float]]) -> list[str]:
    """What both share, which no trainer saves without other kernels, and so how much faster one can be."""
    if not floors:
        return []
    step = median(matched_ms)
    adapted, bare = (median(values) for values in zip(*floors, strict=True))
    return [
        "**The limit.** The denoiser's own forward and backward pass, which both run with the same kernels "
        f"of torch, takes {adapted:.0f} ms with the adapter and {bare:.0f} ms without one. A trainer that "
        f"spent nothing on all the rest would be {step / adapted:.2f} times as fast as the reference's "
        f"compute-matched step, and {step / bare:.2f} times if its adapter cost nothing either."
    ]
