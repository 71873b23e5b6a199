"""Generate images with adapters. The base is loaded once; adapters are switched and mixed on it."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from PIL import Image

from dbtrain.adapters.formats import registry as formats
from dbtrain.config import Config
from dbtrain.data.pictures import SheetRow, contact_sheet, note_in, save_png
from dbtrain.data.sizes import Size
from dbtrain.models import denoiser, sampler
from dbtrain.models.base import Base
from dbtrain.prepare import duration
from dbtrain.runtime import console, dist, files, hashing, preemption
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.hashing import content_key
from dbtrain.runtime.run_folder import SHEET, RunFolder
from dbtrain.sample.pipeline import AdapterPipeline

MANY = 100  # encoded prompts to keep


@dataclass(frozen=True)
class Mix:
    """Adapters used together, as (run folder or file, scale); an empty mix is the base alone."""

    label: str
    parts: tuple[tuple[str, float], ...]

    @classmethod
    def parse(cls, text: str) -> Mix:
        """Parse `PATH[:SCALE]`, joined by `+` to mix several, or `none` for the base alone."""
        if text == "none":
            return NO_ADAPTER
        parts: dict[str, float] = {}
        for item in text.split("+"):
            try:
                path, strength = files.weighted(item)
            except ValueError:
                path, strength = "", 0.0
            if not path or path in parts:
                raise ConfigError(
                    f"adapter '{text}': '{item}' is not PATH or PATH:SCALE, or is repeated; "
                    "use e.g. runs/dog:0.8 or runs/dog:0.8+runs/cat:0.5",
                    shared=True,
                )
            parts[path] = strength
        label = " + ".join(f"{_short(path)}:{scale:g}" for path, scale in parts.items())
        return cls(label, tuple(parts.items()))


NO_ADAPTER = Mix("no adapter", ())


class Kept:
    """The base of the last call of `sample`, for further calls that want the same one."""

    def __init__(self) -> None:
        self._wanted: object = None
        self._pipe: AdapterPipeline | None = None

    def pipe(self, cfg: Config, base: Base, side: int | None, batch: int) -> AdapterPipeline:
        """The base without adapters; loaded if the last one was another, or for other or fewer images."""
        gib, settings = cfg.prepare.memory_gib if cfg.prepare else None, cfg.sample
        wanted = (cfg.model, cfg.train.base_linears, cfg.train.swap_blocks, gib, side,
                  settings.precision, settings.guidance)  # fmt: skip
        if self._pipe is None or wanted != self._wanted or batch > self._pipe.batch:
            self.free()  # there may be no room for both
            self._pipe = AdapterPipeline(
                base, settings.precision, train=cfg.train, memory_gib=gib, batch=batch
            )
            self._wanted = wanted
        for name in self._pipe.names():
            self._pipe.remove(name)
        if len(self._pipe.encoded) > MANY:
            self._pipe.encoded.clear()
        return self._pipe

    def free(self) -> None:
        """Free the memory of the base, which parts of it refer to in circles."""
        self._pipe = None
        gc.collect()


def sample(
    cfg: Config, prompts: Sequence[str], mixes: Sequence[Mix], out: Path | None = None,
    kept: Kept | None = None,
) -> Path:  # fmt: skip
    """Generate images of every prompt with every mix, split over ranks; return the contact sheet's path.

    `cfg.sample` sets the number of images, the seeds, and the sampler. Does nothing if the sheet exists
    and was made with the same base, adapters, and settings. Calls that are given the same `kept` load the
    base once.
    """
    dist.init()
    if not prompts:
        raise ConfigError("there is no prompt; give --prompt or set sample.prompts", shared=True)
    base = Base.find(cfg.model)
    side = cfg.prepare.side if cfg.prepare else None
    with dist.agreed():
        low_res = sampler.small_pictures(cfg.sample.low_res, base.family, Size.square(side) if side else None)
        paths = {path: formats.find(path) for mix in mixes for path, _ in mix.parts}
        request = _Request(cfg, base, prompts, mixes, paths, side)
        key = request.key() if dist.is_main() else None
    key = dist.from_main(key)
    out = out or RunFolder(cfg.run_dir).samples / f"sample-{key[:8]}"
    sheet = out / SHEET
    names = [_name(*job) for job in request.jobs()]
    if dist.from_main(note_in(sheet) == key and all((out / name).is_file() for name in names)):
        console.say(f"{sheet} is up to date: nothing to do")
        return sheet
    with dist.agreed():
        request.generate(out, low_res, key, kept or Kept())
    duration.remember(cfg, "sample")
    with dist.agreed():
        if dist.is_main():
            for path in out.glob("??-??-seed*.png"):  # left by an earlier sheet
                if path.name not in names:
                    path.unlink()
            save_png(sheet, contact_sheet(request.rows(out)), key)
            console.say(f"images and contact sheet: {sheet}")
    return sheet


def sample_run(cfg: Config) -> Path | None:
    """Sample `cfg.sample.prompts` without and with the run's adapter; None if there are no prompts."""
    if not cfg.sample.prompts:
        return None
    run = RunFolder(cfg.run_dir)
    out = run.samples_of(run.exported(cfg.train.steps))
    return sample(cfg, cfg.sample.prompts, without_and_with(cfg.run_dir), out)


def without_and_with(run_dir: str) -> list[Mix]:
    """Two mixes: the base alone, and a run's adapter."""
    return [NO_ADAPTER, Mix(_short(run_dir), ((run_dir, 1.0),))]


@dataclass(frozen=True)
class _Request:
    """Every prompt with every mix of adapters, with `cfg.sample.images` seeds each."""

    cfg: Config
    base: Base
    prompts: Sequence[str]
    mixes: Sequence[Mix]
    paths: Mapping[str, Path]  # of the adapters in the mixes
    side: int | None

    def key(self) -> str:
        """A hash of everything that the images depend on, including the weights."""
        return content_key({
            "model": [self.base.key(part) for part in self.base.family.parts],
            "prompts": list(self.prompts), "side": self.side, "sampler": sampler.name_of(self.base),
            "mixes": [
                [mix.label, [formats.content_of(self.paths[p]) for p, _ in mix.parts]] for mix in self.mixes
            ],
            **self.cfg.sample.model_dump(exclude={"prompts", "low_res"}),
            "low_res": [hashing.sha256_of(files.expand(name)) for name in self.cfg.sample.low_res],
            **denoiser.about(self.cfg.train.base_linears),
        })  # fmt: skip

    @property
    def seeds(self) -> range:
        return range(self.cfg.sample.seed, self.cfg.sample.seed + self.cfg.sample.images)

    def jobs(self) -> list[tuple[int, int, int]]:
        """(mix, prompt, seed) of every image."""
        return list(product(range(len(self.mixes)), range(len(self.prompts)), self.seeds))

    def generate(self, out: Path, low_res: Sequence[Image.Image], key: str, kept: Kept) -> None:
        """Generate this rank's images in batches that do not depend on the number of ranks.

        Images with different adapters share them. Batches whose images an interrupted call with the same
        `key` has written are skipped.
        """
        # Split the jobs into batches, and deal those to the ranks.
        settings, size, jobs = self.cfg.sample, self.cfg.sample.batch, self.jobs()
        batches = [jobs[i : i + size] for i in range(0, len(jobs), size)]
        existing = {job for job in jobs if _key_in(out / _name(*job)) == key}
        mine = [batch for batch in batches[dist.rank() :: dist.world()] if not existing.issuperset(batch)]
        if not mine:
            return

        # Load the base and all adapters.
        pipe = kept.pipe(self.cfg, self.base, self.side, max(map(len, mine)))
        pipe.encode([self.prompts[p] for batch in mine for _, p, _ in batch], settings.guidance)
        if dist.is_main():  # warns about prompts that are too long for the base
            encoders = self.base.family.text_encoders
            tokenizers = {name: getattr(pipe.pipe, part) for name, part in encoders.items()}
            self.base.family.tokenize(tokenizers, self.prompts)
        names = {path: f"adapter{number}" for number, path in enumerate(self.paths)}
        for path, name in names.items():
            pipe.add(name, self.paths[path])

        # Generate and save each batch.
        with console.bar(sum(map(len, mine)), "sample", "image", share=True) as bar:
            adapters = [{names[path]: scale for path, scale in mix.parts} for mix in self.mixes]
            parts = [[batch[i] for i in places] for batch in mine
                     for places in pipe.together([adapters[m] for m, _, _ in batch])]  # fmt: skip
            for batch in parts:
                preemption.check()
                seeds = [seed for _, _, seed in batch]
                texts = [self.prompts[p] for _, p, _ in batch]
                inputs = [low_res[(seed - settings.seed) % len(low_res)] for seed in seeds] if low_res else []
                with sampler.moving(pipe.pipe, bar, len(batch), "sample"):
                    images = pipe.generate(
                        texts, seeds, settings.steps, settings.guidance, self.side, inputs,
                        [adapters[m] for m, _, _ in batch],
                    )  # fmt: skip
                for (m, p, seed), image in zip(batch, images, strict=True):
                    note = {"prompt": self.prompts[p], "seed": seed, "adapters": self.mixes[m].label,
                            "model": self.cfg.model.path, "steps": settings.steps,
                            "guidance": settings.guidance, "key": key}  # fmt: skip
                    save_png(out / _name(m, p, seed), image, json.dumps(note))

    def rows(self, out: Path) -> list[SheetRow]:
        """The contact sheet's rows: one per prompt and mix, with one column per seed."""
        rows: list[SheetRow] = []
        for p, prompt in enumerate(self.prompts):
            for m, mix in enumerate(self.mixes):
                images = [Image.open(out / _name(m, p, seed)) for seed in self.seeds]
                captions = () if rows else [f"seed {seed}" for seed in self.seeds]
                rows.append(SheetRow(images, "" if m else prompt, mix.label, captions))
        return rows


def _name(mix: int, prompt: int, seed: int) -> str:
    return f"{mix:02d}-{prompt:02d}-seed{seed}.png"


def _key_in(path: Path) -> str:
    """The key of the call that generated an image; "" if the file is missing or damaged."""
    try:
        return json.loads(note_in(path) or "{}").get("key", "")
    except (ValueError, AttributeError):
        return ""


def _short(path: str) -> str:
    """The last two parts of a path, which label an adapter on the contact sheet."""
    return "/".join(Path(path).parts[-2:])
