"""A run's adapter as files that others load, and a card that says what they are."""

from __future__ import annotations

from pathlib import Path

from dbtrain.adapters.formats import peft_folder
from dbtrain.adapters.formats import registry as formats
from dbtrain.adapters.formats.common import States
from dbtrain.config import Config
from dbtrain.export.model_card import card
from dbtrain.models.families import registry as families
from dbtrain.models.families.family import Family
from dbtrain.models.pretrained import Pretrained
from dbtrain.runtime import console, dist, files
from dbtrain.runtime.errors import ConfigError
from dbtrain.train import checkpoint, fingerprint

PICTURES = "samples.png"  # contact sheet beside the card


def export(
    cfg: Config, step: int | None = None, out: Path | None = None, adapter: Path | None = None
) -> Path:
    """Export a checkpoint (the newest, or that of `step`) into `out`; the path of the first format.

    `adapter` is a file or folder to convert instead of a checkpoint. `out` is the run's `export/` by
    default. No base weights are loaded.
    """
    dist.init()
    run_dir = files.expand(cfg.run_dir)
    base = Pretrained.find(cfg.model)
    if adapter is not None:
        if out is None:
            raise ConfigError("a converted adapter needs a folder of its own: give --out", shared=True)
        with dist.agreed():
            family = families.detect(base, cfg.model)
            states = formats.read(formats.find(adapter), family, base.module_names)
        return save(cfg, base, family, states, None, out)
    with dist.agreed():
        path = _checkpoint(run_dir, step) if dist.is_main() else None
    path = Path(dist.from_main(str(path)))
    with dist.agreed():
        family = families.detect(base, cfg.model)
        state = fingerprint.read_state(path)
        components = [entry.parent.name for entry in sorted(path.glob(f"*/{peft_folder.CONFIG}"))]
        states = {name: peft_folder.read(path / name) for name in components}
    return save(cfg, base, family, states, state["step"], out or run_dir / "export")


def save(
    cfg: Config, base: Pretrained, family: Family, states: States, step: int | None, folder: Path
) -> Path:
    """Write an export folder on rank 0: the adapter in every format asked for, and the model card."""
    names = cfg.export.formats or formats.natural(family, states)
    with dist.agreed():
        for name in names:
            formats.check(name, family, states)  # all of them, before any is written
        if dist.is_main():
            for name in names:
                path = formats.write(name, folder, family, states)
                what = "converted" if step is None else f"exported step {step}"
                console.say(f"{what} to {path} ({name})")
            pictures = [PICTURES] if (folder / PICTURES).is_file() else []
            text = card(cfg, base, family, states, step, names, pictures)
            files.write_atomically(folder / "README.md", text)
    return folder / formats.FORMATS[names[0]].main


def show(cfg: Config, sheet: Path | None) -> None:
    """Put a contact sheet beside the run's export, and into its card."""
    with dist.agreed():
        folder = files.expand(cfg.run_dir) / "export"
        changed = dist.is_main() and sheet is not None and _differs(sheet, folder / PICTURES)
        if changed and sheet is not None:
            files.write_atomically(folder / PICTURES, sheet.read_bytes())
    if dist.from_main(changed):
        export(cfg)


def _differs(one: Path, other: Path) -> bool:
    return not other.is_file() or files.sha256_of(one) != files.sha256_of(other)


def is_done(cfg: Config) -> bool:
    """Whether the run has trained to `train.steps` and exported the result."""
    marker = files.expand(cfg.run_dir) / "DONE"
    try:
        return marker.read_bytes() == _done(cfg).encode()
    except FileNotFoundError:
        return False


def mark_done(cfg: Config) -> None:
    """Leave the file DONE in the run folder: what batch scripts wait for."""
    with dist.agreed():
        if dist.is_main():
            files.write_atomically(files.expand(cfg.run_dir) / "DONE", _done(cfg))


def _done(cfg: Config) -> str:
    """What DONE says: the step, the formats, and the exported weights."""
    exported = files.expand(cfg.run_dir) / "export"
    weights = sorted(path for path in exported.rglob("*.safetensors") if not path.name.startswith("."))
    lines = [f"export {path.relative_to(exported)} {files.sha256_of(path)}" for path in weights]
    asked = ", ".join(cfg.export.formats) or "natural"
    return "\n".join([f"step {cfg.train.steps}", f"formats {asked}", *lines]) + "\n"


def _checkpoint(run_dir: Path, step: int | None) -> Path:
    found = {int(path.name[5:]): path for path in fingerprint.folders(run_dir)}
    if not found:
        raise ConfigError(f"{run_dir} has no checkpoint to export; run: dbtrain train")
    if step is None:
        newest = checkpoint.latest(run_dir)
        if newest is None:
            raise ConfigError(f"every checkpoint in {run_dir} is damaged; run: dbtrain train")
        return newest[0]
    if step not in found:
        raise ConfigError(f"{run_dir} has no checkpoint of step {step}, only of {sorted(found)}")
    return found[step]
