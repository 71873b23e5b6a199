"""A run's adapter as files that others load, and a card that says what they are."""

from __future__ import annotations

from pathlib import Path

from dbtrain.adapters.formats import peft_folder
from dbtrain.adapters.formats import registry as formats
from dbtrain.adapters.formats.common import States
from dbtrain.config import Config
from dbtrain.export.model_card import card
from dbtrain.models.base import Base
from dbtrain.runtime import console, dist, files, hashing, lock
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.run_folder import SAMPLES, RunFolder, read_state, step_of
from dbtrain.train import checkpoint


def export(
    cfg: Config, step: int | None = None, out: Path | None = None, adapter: Path | None = None
) -> Path:
    """Export a checkpoint (the newest, or that of `step`) into `out`; the path of the first format.

    `adapter` is a file or folder to convert instead of a checkpoint. `out` is the run's `export/` by
    default. No base weights are loaded.
    """
    dist.init()
    run = RunFolder(cfg.run_dir)
    base = Base.find(cfg.model)
    if adapter is not None:
        if out is None:
            raise ConfigError("a converted adapter needs a folder of its own: give --out", shared=True)
        with dist.agreed():
            states = formats.read(formats.find(adapter), base.family, base.module_names)
        return save(cfg, base, states, None, out)
    with dist.agreed():
        path = _checkpoint(run, step) if dist.is_main() else None
    path = Path(dist.from_main(str(path)))
    with dist.agreed():
        state = read_state(path)
        components = [name for name in base.family.adaptable if (path / name / peft_folder.CONFIG).is_file()]
        states = {name: peft_folder.read(path / name) for name in components}
    return save(cfg, base, states, state["step"], out or run.export)


def save(cfg: Config, base: Base, states: States, step: int | None, folder: Path) -> Path:
    """Write an export folder on rank 0: the adapter in every format asked for, and the model card."""
    names = cfg.export.formats or formats.natural(base.family, states)
    with dist.agreed():
        for name in names:
            formats.check(name, base.family, states)  # all of them, before any is written
        if dist.is_main():
            for name in names:
                path = formats.write(name, folder, base.family, states)
                what = "converted" if step is None else f"exported step {step}"
                console.say(f"{what} to {path} ({name})")
            pictures = [SAMPLES] if (folder / SAMPLES).is_file() else []
            text = card(cfg, base, states, step, names, pictures)
            files.write_atomically(folder / "README.md", text)
    return folder / formats.FORMATS[names[0]].main


def finish(cfg: Config) -> None:
    """Export a trained run and mark it as done; nothing if it is."""
    with lock.held(RunFolder(cfg.run_dir).path, "run_dir"):
        if not dist.from_main(is_done(cfg)):
            export(cfg)
            mark_done(cfg)


def show(cfg: Config, sheet: Path | None) -> None:
    """Put a contact sheet beside the run's export, and into its card."""
    with dist.agreed():
        folder = RunFolder(cfg.run_dir).export
        changed = dist.is_main() and sheet is not None and _differs(sheet, folder / SAMPLES)
        if changed and sheet is not None:
            files.write_atomically(folder / SAMPLES, sheet.read_bytes())
    if dist.from_main(changed):
        export(cfg)


def _differs(one: Path, other: Path) -> bool:
    return not other.is_file() or hashing.sha256_of(one) != hashing.sha256_of(other)


def is_done(cfg: Config) -> bool:
    """Whether the run has trained to `train.steps` and exported the result."""
    marker = RunFolder(cfg.run_dir).done
    try:
        return marker.read_bytes() == _done(cfg).encode()
    except FileNotFoundError:
        return False


def mark_done(cfg: Config) -> None:
    """Leave the file DONE in the run folder: what batch scripts wait for."""
    with dist.agreed():
        if dist.is_main():
            files.write_atomically(RunFolder(cfg.run_dir).done, _done(cfg))


def _done(cfg: Config) -> str:
    """What DONE says: the step, the formats, and the exported weights."""
    exported = RunFolder(cfg.run_dir).export
    weights = sorted(path for path in exported.rglob("*.safetensors") if not path.name.startswith("."))
    lines = [f"export {path.relative_to(exported)} {hashing.sha256_of(path)}" for path in weights]
    asked = ", ".join(cfg.export.formats) or "natural"
    return "\n".join([f"step {cfg.train.steps}", f"formats {asked}", *lines]) + "\n"


def _checkpoint(run: RunFolder, step: int | None) -> Path:
    found = {step_of(path): path for path in run.checkpoints()}
    if not found:
        raise ConfigError(f"{run.path} has no checkpoint to export; run: dbtrain train")
    if step is None:
        newest = checkpoint.latest(run)
        if newest is None:
            raise ConfigError(f"every checkpoint in {run.path} is damaged; run: dbtrain train")
        return newest[0]
    if step not in found:
        raise ConfigError(f"{run.path} has no checkpoint of step {step}, only of {sorted(found)}")
    return found[step]
