"""The summary at the end of a run: the time of each phase, the speed, and the output files."""

from __future__ import annotations

import time
from pathlib import Path

from dbtrain.config import Config
from dbtrain.runtime import console, dist, files, pace
from dbtrain.runtime.run_folder import SHEET, RunFolder, name_of, read_lines

# name of a phase's progress bar -> its name in the summary
PHASES = {
    "class images": "class images", "encode": "shards", "train": "training", "validation": "validation",
    "sample": "images", "upload": "upload",
}  # fmt: skip


def summary(cfg: Config) -> None:
    """Print the summary on rank 0 and append it to log.txt."""
    if dist.is_main():
        run = RunFolder(cfg.run_dir)
        best = run.read_best()
        lines = _times(run) + ([f"  {'best':<14}step {best['step']}, {best['why']}"] if best else [])
        lines += [f"  {name:<14}{path}{_programs(cfg, path)}" for name, path in _outputs(run)]
        for line in lines:
            console.say(line)
        files.append(run.log, "\n".join(lines) + "\n")


def _times(run: RunFolder) -> list[str]:
    """The total time, then one line per phase that did something."""
    spent = {phase: console.spent_s.get(phase, 0.0) for phase in PHASES}
    spent["train"] -= min(spent["train"], spent["validation"])  # it is part of training
    all_s = time.monotonic() - console.started
    lines = [f"done in {pace.human(all_s)}"]
    for phase, name in PHASES.items():
        if spent[phase] > 0.05:
            rate = _rate(run) if phase == "train" else ""
            lines.append(f"  {name:<14}{pace.human(spent[phase]):>10}{rate}")
    return [*lines, f"  {'other':<14}{pace.human(all_s - sum(spent.values())):>10}  (loading, saving)"]


def _rate(run: RunFolder) -> str:
    """The median of the logged rates."""
    rates = sorted(line["samples_per_s"] for line in read_lines(run.table("speed")))
    return f"  {rates[len(rates) // 2]:.3g} samples/s" if rates else ""


def _outputs(run: RunFolder) -> list[tuple[str, Path]]:
    """(name, path) of the adapter, the newest contact sheets, and the log."""
    adapters = [*run.export.glob("*.safetensors"), *run.export.glob("*/adapter_model.safetensors")]
    found = [("adapter", path) for path in sorted(adapters) if not path.name.startswith(".")]
    for name, folder in (("images", run.samples), ("validation", run.validation)):
        found += [(name, path) for path in sorted(folder.glob(f"*/{SHEET}"))[-1:]]
    return [*found, ("log", run.log)]


def _programs(cfg: Config, path: Path) -> str:
    """The programs that load a file of the run's export. Files of two formats have the same name."""
    from dbtrain.adapters.formats import peft_folder, registry  # slow to import

    name = name_of(cfg.run_dir)
    forms = [registry.FORMATS[form] for form in cfg.export.formats or ("diffusers", "peft")]
    known = {form.file.format(name=name) or peft_folder.WEIGHTS: form.programs for form in forms}
    return f" (for {known[path.name]})" if path.name in known else ""
