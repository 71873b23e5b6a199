"""Pictures with adapters: the base is loaded once, adapters are added, switched and mixed on it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dbtrain.adapters.formats import registry as formats
from dbtrain.config import Config, Sample
from dbtrain.data.pictures import Row, contact_sheet, note_in, save_png
from dbtrain.models import sampler
from dbtrain.models.base import Base
from dbtrain.runtime import console, dist, files, hashing, preemption
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.hashing import content_key
from dbtrain.runtime.run_folder import SHEET, RunFolder
from dbtrain.sample.pipeline import AdapterPipeline


@dataclass(frozen=True)
class Mix:
    """Adapters used together: (run folder or file, scale) each; none is the bare base."""

    label: str
    parts: tuple[tuple[str, float], ...]

    @classmethod
    def parse(cls, text: str) -> Mix:
        """`PATH[:SCALE]`, joined by `+` to mix several; `none` is the bare base."""
        if text == "none":
            return NO_ADAPTER
        parts: dict[str, float] = {}
        for item in text.split("+"):
            path, colon, scale = item.rpartition(":")
            if not colon or "/" in scale or Path(item).exists():  # the colon belongs to the path
                path, scale = item, "1"
            try:
                strength = float(scale)
            except ValueError:
                strength = math.nan
            if not math.isfinite(strength) or not path or path in parts:
                raise ConfigError(
                    f"adapter '{text}': '{item}' is not PATH or PATH:SCALE, or stands twice; "
                    "give e.g. runs/dog:0.8 or runs/dog:0.8+runs/cat:0.5",
                    shared=True,
                )
            parts[path] = strength
        label = " + ".join(f"{_short(path)}:{scale:g}" for path, scale in parts.items())
        return cls(label, tuple(parts.items()))


NO_ADAPTER = Mix("no adapter", ())


def sample(cfg: Config, prompts: Sequence[str], mixes: Sequence[Mix], out: Path | None = None) -> Path:
    """Draw every prompt with every mix of adapters, split over ranks; the labelled contact sheet's path.

    `cfg.sample` says how many pictures, from which seed, and how. Does nothing if the sheet was made
    from the very same base, adapters and settings.
    """
    dist.init()
    settings = cfg.sample
    if not prompts:
        raise ConfigError("there is no prompt to draw; give --prompt or sample.prompts", shared=True)
    base = Base.find(cfg.model)
    side = cfg.prepare.resolution if cfg.prepare else None
    with dist.agreed():
        small = sampler.small_pictures(cfg.sample.low_res, base.family, side)
        paths = {path: formats.find(path) for mix in mixes for path, _ in mix.parts}
        key = _key(cfg, base, prompts, mixes, paths, side) if dist.is_main() else None
    key = dist.from_main(key)
    out = out or RunFolder(cfg.run_dir).samples / f"sample-{key[:8]}"
    sheet = out / SHEET
    names = [_name(*job) for job in _jobs(len(mixes), len(prompts), settings)]
    if dist.from_main(_is_made(sheet, key, names)):
        console.say(f"{sheet} is up to date: nothing to do")
        return sheet
    with dist.agreed():
        _draw(cfg, base, mixes, paths, prompts, out, side, small, key)
    with dist.agreed():
        if dist.is_main():
            for path in out.glob("??-??-seed*.png"):  # of an earlier sheet
                if path.name not in names:
                    path.unlink()
            _write_sheet(sheet, key, mixes, prompts, settings.images, settings.seed, out)
            console.say(f"pictures and contact sheet: {sheet}")
    return sheet


def _key(
    cfg: Config,
    base: Base,
    prompts: Sequence[str],
    mixes: Sequence[Mix],
    paths: Mapping[str, Path],
    side: int | None,
) -> str:
    """A name for all that the pictures depend on; reads the base and the adapters whole."""
    return content_key({
        "model": [base.key(part) for part in base.family.parts],
        "prompts": list(prompts), "side": side, "sampler": sampler.SAMPLER,
        "mixes": [[mix.label, [formats.content_of(paths[p]) for p, _ in mix.parts]] for mix in mixes],
        **cfg.sample.model_dump(exclude={"prompts", "low_res"}),
        "low_res": [hashing.sha256_of(files.expand(name)) for name in cfg.sample.low_res],
    })  # fmt: skip


def sample_run(cfg: Config) -> Path | None:
    """The pictures that `cfg.sample` asks for, without and with the run's adapter; None for none."""
    if not cfg.sample.prompts:
        return None
    out = RunFolder(cfg.run_dir).samples_of(cfg.train.steps)
    return sample(cfg, cfg.sample.prompts, without_and_with(cfg.run_dir), out)


def without_and_with(run_dir: str) -> list[Mix]:
    """The bare base, and the adapter of a run."""
    return [NO_ADAPTER, Mix(_short(run_dir), ((run_dir, 1.0),))]


def _draw(
    cfg: Config,
    base: Base,
    mixes: Sequence[Mix],
    paths: Mapping[str, Path],
    prompts: Sequence[str],
    out: Path,
    side: int | None,
    small: Sequence[Image.Image],
    key: str,
) -> None:
    """This rank's pictures: (mix, prompt, image) jobs in fixed batches, dealt to ranks.

    Those that an interrupted call with the same `key` made are kept.
    """
    settings, size = cfg.sample, cfg.sample.batch
    jobs = _jobs(len(mixes), len(prompts), settings)
    of_mix = [[job for job in jobs if job[0] == m] for m in range(len(mixes))]
    batches = [every[i : i + size] for every in of_mix for i in range(0, len(every), size)]
    kept = {job for job in jobs if _key_in(out / _name(*job)) == key}
    mine = [batch for batch in batches[dist.rank() :: dist.world()] if not kept.issuperset(batch)]
    if not mine:
        return
    pipe = AdapterPipeline(base, settings.precision)
    if dist.is_main():  # says which prompts are too long for the base
        base.family.tokenize(
            {name: getattr(pipe.pipe, part) for name, part in base.family.text_encoders.items()}, prompts
        )
    names = {path: f"adapter{number}" for number, path in enumerate(paths)}
    for path, name in names.items():
        pipe.add(name, paths[path])
    with console.bar(sum(map(len, mine)), "sample", "image", share=True) as bar:
        for batch in mine:
            preemption.check()
            mix = mixes[batch[0][0]]
            pipe.use({names[path]: scale for path, scale in mix.parts})
            seeds = [seed for _, _, seed in batch]
            texts = [prompts[p] for _, p, _ in batch]
            enlarged = [small[(seed - settings.seed) % len(small)] for seed in seeds] if small else []
            pictures = pipe.generate(texts, seeds, settings.steps, settings.guidance, side, enlarged)
            for (m, p, seed), picture in zip(batch, pictures, strict=True):
                note = {"prompt": prompts[p], "seed": seed, "adapters": mix.label,
                        "model": cfg.model.path, "steps": settings.steps,
                        "guidance": settings.guidance, "key": key}  # fmt: skip
                save_png(out / _name(m, p, seed), picture, json.dumps(note))
            bar.update(len(batch))


def _jobs(mixes: int, prompts: int, settings: Sample) -> list[tuple[int, int, int]]:
    """(mix, prompt, seed) of every picture."""
    seeds = range(settings.seed, settings.seed + settings.images)
    return [(m, p, seed) for m in range(mixes) for p in range(prompts) for seed in seeds]


def _name(mix: int, prompt: int, seed: int) -> str:
    return f"{mix:02d}-{prompt:02d}-seed{seed}.png"


def _key_in(path: Path) -> str:
    """The key of the call that drew a picture; none if it is not there, or damaged."""
    try:
        return json.loads(note_in(path) or "{}").get("key", "")
    except (ValueError, AttributeError):
        return ""


def _is_made(sheet: Path, key: str, names: Sequence[str]) -> bool:
    """Whether the sheet with this key and all its pictures are there."""
    return all((sheet.parent / name).is_file() for name in names) and note_in(sheet) == key


def _write_sheet(
    path: Path, key: str, mixes: Sequence[Mix], prompts: Sequence[str], images: int, seed: int, out: Path
) -> None:
    """One row for each prompt and mix under its label, one column a seed."""
    rows: list[Row] = []
    for p, prompt in enumerate(prompts):
        for m, mix in enumerate(mixes):
            pictures = [Image.open(out / _name(m, p, seed + k)) for k in range(images)]
            captions = () if rows else [f"seed {seed + k}" for k in range(images)]
            rows.append(Row(pictures, "" if m else prompt, mix.label, captions))
    save_png(path, contact_sheet(rows), key)


def _short(path: str) -> str:
    """The last two names of a path: enough to tell adapters apart on a sheet."""
    return "/".join(Path(path).parts[-2:])
