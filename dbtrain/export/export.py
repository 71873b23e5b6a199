"""Export a run's adapter to files that other software loads, with a model card."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dbtrain.adapters.formats import kohya_file, peft_folder, word_file
from dbtrain.adapters.formats import registry as formats
from dbtrain.adapters.formats.common import CONFIGS, States
from dbtrain.adapters.tokens import Words
from dbtrain.config import Config
from dbtrain.export.model_card import card
from dbtrain.models.base import Base
from dbtrain.models.families.family import Family
from dbtrain.runtime import console, dist, files, hashing, lock
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.run_folder import PREVIEW, SAMPLES, RunFolder, adapter_in, name_of, read_state, step_of
from dbtrain.train import checkpoint

CARD = "README.md"
DATE = "SOURCE_DATE_EPOCH"  # environment variable


def export(
    cfg: Config, step: int | None = None, out: Path | None = None, adapter: Path | None = None
) -> Path:
    """Export a checkpoint into `out`; return the path of the first format.

    It is that of `step`; by default the best one of a run that looks for it, or else the newest.

    `adapter` is a file or folder to convert instead. `out` defaults to the run's `export/`. Only the format
    `diff` loads the base's weights.
    """
    dist.init()
    run = RunFolder(cfg.run_dir)
    base = Base.find(cfg.model)
    if adapter is not None:
        if out is None:
            raise ConfigError("--adapter needs a folder for the converted files; give --out", shared=True)
        with dist.agreed():
            path = formats.find(adapter)
            states = formats.read(path, base.family, base.skeleton)
            words = word_file.read(path, base.family, base.skeleton)
        return save(cfg, base, states, words, {}, out, name_of(adapter), path)
    states, words, state = _trained(cfg, run, base, step)
    return save(cfg, base, states, words, state, out or run.export, name_of(run.path))


def _trained(
    cfg: Config, run: RunFolder, base: Base, step: int | None
) -> tuple[States, Words, dict[str, Any]]:
    """The adapter in the checkpoint of `step` or the default, its learned word, and the checkpoint's state.

    The same on every rank.
    """
    with dist.agreed():
        path = _checkpoint(run, step) if dist.is_main() else None
    path = Path(dist.from_main(str(path)))
    with dist.agreed():
        state = read_state(path)
        folder = adapter_in(path, cfg.export.ema)
        names = [name for name in base.family.adaptable if (folder / name / peft_folder.CONFIG).is_file()]
        states = {name: peft_folder.read(folder / name) for name in names}
        return states, word_file.read(folder, base.family, base.skeleton), state


def save(
    cfg: Config, base: Base, states: States, words: Words, state: Mapping[str, Any], folder: Path, name: str,
    source: Path | None = None,
) -> Path:  # fmt: skip
    """Write the adapter in every requested format and the model card, on rank 0; return the first path.

    `state` is the checkpoint's; empty for an adapter that is converted. `name` is the adapter's. Raises
    ConfigError if that would replace `source`, which is converted, or a file that no export wrote.
    """
    forms = cfg.export.formats or formats.natural(base.family, states)
    own = bool(state) and folder.resolve() == RunFolder(cfg.run_dir).export.resolve()
    with dist.agreed():
        for form in forms:
            formats.check(form, base.family, states)  # check every format before writing any
        if dist.is_main():
            if not own:
                _check_free(folder, states, words, forms, name, source)
            about = _about(cfg, base, state.get("step"), name)
            for form in forms:
                path = formats.write(
                    form, folder, base.family, states, base.module_names, about, name, base.load, words
                )
                what = f"exported step {state['step']}" if state else "converted"
                console.say(f"{what} to {path} ({form}, for {formats.FORMATS[form].programs})")
                if caveat := formats.caveat(form, states, forms):
                    console.say(f"warning: {caveat}")
            paths = [formats.FORMATS[form].path(folder, name) for form in forms]
            word_file.write(folder, base.family, words, paths)
            if own and _step_in_card(folder) != state["step"]:
                _remove_others(folder, base.family, states, forms, name)
            _write_card(cfg, base, states, words, state, folder, name)
    return formats.FORMATS[forms[0]].path(folder, name)


def _check_free(
    folder: Path, states: States, words: Words, forms: Sequence[str], name: str, source: Path | None
) -> None:  # fmt: skip
    """Raise ConfigError if an export would replace its source, or a file that no export wrote."""
    paths = [folder / CARD, *(folder / word_file.FOLDER / f"{word.text}.safetensors" for word in words)]
    for form in forms:
        path = formats.FORMATS[form].path(folder, name)
        paths += (
            [path] if formats.FORMATS[form].file else [path / part / peft_folder.WEIGHTS for part in states]
        )
    kept = {path.resolve() for path in (source, *source.rglob(peft_folder.WEIGHTS))} if source else set()
    for path in filter(Path.exists, paths):
        if path.resolve() in kept:
            raise ConfigError(f"the export would replace the adapter itself, {path}; give another --out")
        if not _is_ours(path):
            raise ConfigError(
                f"{path} is there, and no export of this version wrote it; remove it, or give another --out"
            )


def _is_ours(path: Path) -> bool:
    """Whether an export wrote a file."""
    if path.name == CARD:
        return "\n- dbtrain\n" in path.read_text(encoding="utf-8", errors="replace")
    try:
        with safe_open(path, "pt") as file:
            return CONFIGS in (file.metadata() or {})
    except SafetensorError:
        return False


def _step_in_card(folder: Path) -> int | None:
    """The step of what is in a run's export; None without a card that says it."""
    text = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else ""
    found = re.search(r"^\| steps \| (\d+) of ", text, re.MULTILINE)
    return int(found[1]) if found else None


def _remove_others(folder: Path, family: Family, states: States, forms: Sequence[str], name: str) -> None:
    """Remove what an export of another step wrote and this one does not."""
    written = {formats.FORMATS[form].path(folder, name) for form in forms}
    named = [form.path(folder, each) for form in formats.FORMATS.values() if form.file
             for each in (name, formats.OLD_NAME)]  # fmt: skip
    unwritten = set(family.adaptable) - (states.keys() if "peft" in forms else set())
    named += [folder / part / peft_folder.WEIGHTS for part in unwritten]
    for path in {path for path in named if path.is_file() and _is_ours(path)} - written:
        path.unlink()
        if path.name == peft_folder.WEIGHTS:
            (path.parent / peft_folder.CONFIG).unlink(missing_ok=True)
            if not any(path.parent.iterdir()):
                path.parent.rmdir()


def _write_card(
    cfg: Config, base: Base, states: States, words: Words, state: Mapping[str, Any], folder: Path, name: str
) -> None:  # fmt: skip
    forms = cfg.export.formats or formats.natural(base.family, states)
    images = [SAMPLES] if (folder / SAMPLES).is_file() else []
    files.write_atomically(folder / CARD, card(cfg, base, states, words, state, name, forms, images))


def _about(cfg: Config, base: Base, step: int | None, name: str) -> dict[str, str]:
    """The entries of kohya's header by which programs list, sort and describe an adapter.

    A converted file (`step` is None) is not of this run, so only its base is named.
    """
    found = {**base.family.header(base), "modelspec.sai_model_spec": "1.0.0"}
    if step is None:
        return found
    side = cfg.prepare.resolution if cfg.prepare else None
    prompts = [one.prepare.instance_prompt for one in cfg.each_subject() if one.prepare]
    found |= {
        "ss_output_name": name, "modelspec.title": name, "ss_sd_model_name": Path(base.name).name,
        "ss_steps": str(step), "ss_max_train_steps": str(cfg.train.steps), "ss_seed": str(cfg.seed),
        "ss_total_batch_size": str(cfg.train.global_batch), "ss_optimizer": cfg.optim.name,
        "modelspec.implementation": "diffusers",
    }  # fmt: skip
    if side:
        found |= {"ss_resolution": f"({side}, {side})", "modelspec.resolution": f"{side}x{side}"}
    if cfg.hub.license:
        found["modelspec.license"] = cfg.hub.license
    times = cfg.loss.timesteps
    if (times.low, times.high) != (0, 1):
        found["modelspec.timestep_range"] = f"{times.low * 1000:.0f},{times.high * 1000:.0f}"
    if prompts:  # triggers for lists of tags, which count them by folder
        found |= {
            "modelspec.trigger_phrase": ", ".join(prompts),
            "ss_tag_frequency": json.dumps({name: dict.fromkeys(prompts, 1)}, ensure_ascii=False),
        }
    return found | _date()


def _date() -> dict[str, str]:
    """The date that the user gives the file. The clock's would make the exports of equal runs differ.

    https://reproducible-builds.org/specs/source-date-epoch/
    """
    seconds = os.environ.get(DATE)
    if seconds and not re.fullmatch(r"[0-9]{1,11}", seconds):
        raise ConfigError(f"{DATE} is '{seconds}', not seconds since 1970; unset it, or use e.g. 1767225600")
    if not seconds:
        return {}
    date = datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return {"ss_training_started_at": seconds, "modelspec.date": date}


def finish(cfg: Config, held: bool = False) -> None:
    """Export a trained run and write DONE, which batch scripts wait for, unless that has been done.

    `held`: this process holds the run's lock already.
    """
    run = RunFolder(cfg.run_dir)
    with nullcontext() if held else lock.held(run.path, "run_dir"):
        if dist.from_main(
            dist.is_main() and run.done.is_file() and run.done.read_bytes() == _done(cfg).encode()
        ):
            return
        with dist.agreed():
            if dist.is_main():
                files.remove_parts(run.export)  # of an export that was killed
        export(cfg)
        with dist.agreed():
            if dist.is_main():
                files.write_atomically(run.done, _done(cfg))


def show(cfg: Config, sheet: Path | None) -> None:
    """Copy a contact sheet into the run's export and show it in the model card.

    Beside a file that is named like the run, put an image where programs look for a preview.
    """
    changed, run = False, RunFolder(cfg.run_dir)
    with dist.agreed():
        copy = run.export / SAMPLES
        if dist.is_main() and sheet is not None:
            changed = not copy.is_file() or copy.read_bytes() != sheet.read_bytes()
            if changed:
                files.write_atomically(copy, sheet.read_bytes())
        if dist.is_main():
            _write_preview(cfg, run, sheet)
    if dist.from_main(changed):
        base = Base.find(cfg.model)
        states, words, state = _trained(cfg, run, base, None)
        with dist.agreed():
            if dist.is_main():
                _write_card(cfg, base, states, words, state, run.export, name_of(run.path))


def _write_preview(cfg: Config, run: RunFolder, sheet: Path | None) -> None:
    """Copy the first sample with the adapter, or without samples the first image of its validation."""
    name, validated = name_of(run.path), run.validation_sheet(run.exported(cfg.train.steps)).parent
    made = sorted(sheet.parent.glob("01-00-seed*.png") if sheet else validated.glob("00-seed*.png"))
    if made and (run.export / kohya_file.FILE.format(name=name)).is_file():
        files.write_atomically(run.export / PREVIEW.format(name=name), made[0].read_bytes())


def _done(cfg: Config) -> str:
    """Content of DONE: the step, the formats, and the hashes of the exported weights."""
    run = RunFolder(cfg.run_dir)
    weights = sorted(path for path in run.export.rglob("*.safetensors") if not path.name.startswith("."))
    lines = [f"export {path.relative_to(run.export)} {hashing.sha256_of(path)}" for path in weights]
    names = ", ".join(cfg.export.formats) or "natural"
    names += " of the moving average" if cfg.export.ema else ""
    return "\n".join([f"step {run.exported(cfg.train.steps)}", f"formats {names}", *lines]) + "\n"


def _checkpoint(run: RunFolder, step: int | None) -> Path:
    found = {step_of(path): path for path in run.checkpoints()}
    if step is None and (best := run.read_best()):
        step = best["step"]
    if not found:
        raise ConfigError(f"{run.path} has no checkpoint to export; run dbtrain train first")
    if step is None:
        newest = checkpoint.latest(run)
        if newest is None:
            raise ConfigError(f"every checkpoint in {run.path} is damaged; run dbtrain train again")
        return newest[0]
    if step not in found:
        raise ConfigError(f"{run.path} has no checkpoint of step {step}; choose from {sorted(found)}")
    return found[step]
