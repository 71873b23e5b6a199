"""Pictures with adapters: the base is loaded once, adapters are added, switched and mixed on it."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError

from dbtrain import dist, export, families, files, generate, log
from dbtrain.config import Config, Model, Sample
from dbtrain.errors import ConfigError, reason
from dbtrain.families.base import Family
from dbtrain.keys import content_key
from dbtrain.pictures import TEXT_KEY, Row, contact_sheet, save_png
from dbtrain.pretrained import Pretrained


class AdapterPipeline:
    """A base model and any number of adapters on it.

    >>> pipe = AdapterPipeline.load(Model(path="tiny"))
    >>> pipe.add("dog", "runs/dog")
    >>> pipe.use({"dog": 0.8})
    >>> pictures = pipe.generate("a photo of sks dog", seeds=[0, 1])
    """

    def __init__(
        self, base: Pretrained, family: Family, precision: str, device: torch.device | None = None
    ) -> None:
        self.base = base
        self.pipe = generate.build(base, family, precision, device or dist.device())
        self.scales: dict[str, float] = {}  # adapters in use

    @classmethod
    def load(
        cls, model: Model, precision: str = "fp32", device: torch.device | None = None
    ) -> AdapterPipeline:
        """The base that a config's `model` section names, downloaded first if it is a Hub id."""
        base = Pretrained.find(model)
        return cls(base, families.detect(base, model), precision, device)

    def add(self, name: str, adapter: str | Path) -> None:
        """Load an adapter (a run folder or a file) under `name`; `use` puts it to work."""
        path = adapter_file(adapter)
        if name in self.names() or not name.isidentifier():
            raise ConfigError(f"adapter name '{name}' is taken already, or no plain word")
        try:
            with warnings.catch_warnings():  # PEFT finds a second adapter on a model remarkable
                warnings.simplefilter("ignore", UserWarning)
                self.pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
            if name not in self.names():
                raise ValueError("it holds no layer of this base in a form that Diffusers reads")
        except (ValueError, KeyError, RuntimeError, OSError, SafetensorError) as error:
            raise ConfigError(
                f"adapter {path} does not fit base model {self.base.name}: {reason(error)}"
            ) from error
        self.use(self.scales)

    def names(self) -> set[str]:
        """Names of the adapters that were added."""
        return {name for every in self.pipe.get_list_adapters().values() for name in every}

    def use(self, scales: Mapping[str, float]) -> None:
        """Draw with exactly these adapters, each at its scale; with none, the bare base."""
        if unknown := scales.keys() - self.names():
            raise ConfigError(f"there is no adapter '{min(unknown)}', only {sorted(self.names())}")
        self.scales = dict(scales)
        if scales:
            self.pipe.enable_lora()
            self.pipe.set_adapters(list(scales), list(scales.values()))
        elif self.names():
            self.pipe.disable_lora()

    def generate(
        self,
        prompts: str | Sequence[str],
        seeds: Sequence[int],
        steps: int = 25,
        guidance: float = 7.5,
        side: int | None = None,
    ) -> list[Image.Image]:
        """One picture a seed, of one prompt or of each its own; `side` px (None: the base's size)."""
        if isinstance(prompts, str):
            prompts = [prompts] * len(seeds)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return generate.draw(self.pipe, prompts, generators, steps, guidance, side)


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
    base = Pretrained.find(cfg.model)
    side = cfg.prepare.resolution if cfg.prepare else None
    with dist.agreed():
        paths = {path: adapter_file(path) for mix in mixes for path, _ in mix.parts}
        key = _key(cfg, base, prompts, mixes, paths, side) if dist.is_main() else None
    key = dist.from_main(key)
    out = out or files.expand(cfg.run_dir) / "samples" / f"sample-{key[:8]}"
    sheet = out / "sheet.png"
    names = [_name(*job) for job in _jobs(len(mixes), len(prompts), settings)]
    if dist.from_main(_is_made(sheet, key, names)):
        log.say(f"{sheet} is up to date: nothing to do")
        return sheet
    with dist.agreed():
        _draw(cfg, base, mixes, paths, prompts, out, side)
    with dist.agreed():
        if dist.is_main():
            for path in out.glob("??-??-seed*.png"):  # of an earlier sheet
                if path.name not in names:
                    path.unlink()
            _write_sheet(sheet, key, mixes, prompts, settings.images, settings.seed, out)
            log.say(f"pictures and contact sheet: {sheet}")
    return sheet


def _key(
    cfg: Config,
    base: Pretrained,
    prompts: Sequence[str],
    mixes: Sequence[Mix],
    paths: Mapping[str, Path],
    side: int | None,
) -> str:
    """A name for all that the pictures depend on; reads the base and the adapters whole."""
    return content_key({
        "model": [base.key(part) for part in families.detect(base, cfg.model).parts],
        "prompts": list(prompts), "side": side, "sampler": generate.SAMPLER,
        "mixes": [[mix.label, [files.sha256_of(paths[p]) for p, _ in mix.parts]] for mix in mixes],
        **cfg.sample.model_dump(exclude={"prompts"}),
    })  # fmt: skip


def sample_run(cfg: Config) -> Path | None:
    """The pictures that `cfg.sample` asks for, without and with the run's adapter; None for none."""
    if not cfg.sample.prompts:
        return None
    out = files.expand(cfg.run_dir) / "samples" / f"step-{cfg.train.steps:06d}"
    return sample(cfg, cfg.sample.prompts, without_and_with(cfg.run_dir), out)


def without_and_with(run_dir: str) -> list[Mix]:
    """The bare base, and the adapter of a run."""
    return [NO_ADAPTER, Mix(_short(run_dir), ((run_dir, 1.0),))]


def adapter_file(adapter: str | Path) -> Path:
    """The adapter file of a run folder, an export folder or a file. Raises ConfigError if none."""
    path = files.expand(adapter)
    for candidate in (path, path / "export" / export.FILE, path / export.FILE):
        if candidate.is_file():
            return candidate
    raise ConfigError(
        f"adapter '{adapter}' is neither a file nor a run folder with an export; run: dbtrain export"
    )


def _draw(
    cfg: Config,
    base: Pretrained,
    mixes: Sequence[Mix],
    paths: Mapping[str, Path],
    prompts: Sequence[str],
    out: Path,
    side: int | None,
) -> None:
    """This rank's pictures: (mix, prompt, image) jobs in fixed batches, dealt to ranks."""
    settings, size = cfg.sample, cfg.sample.batch
    jobs = _jobs(len(mixes), len(prompts), settings)
    of_mix = [[job for job in jobs if job[0] == m] for m in range(len(mixes))]
    batches = [every[i : i + size] for every in of_mix for i in range(0, len(every), size)]
    mine = batches[dist.rank() :: dist.world()]
    if not mine:
        return
    family = families.detect(base, cfg.model)
    pipe = AdapterPipeline(base, family, settings.precision)
    if dist.is_main():  # says which prompts are too long for the base
        family.tokenize(
            {name: getattr(pipe.pipe, part) for name, part in family.text_encoders.items()}, prompts
        )
    names = {path: f"adapter{number}" for number, path in enumerate(paths)}
    for path, name in names.items():
        pipe.add(name, paths[path])
    with log.bar(sum(map(len, mine)), "sample", "image", share=True) as bar:
        for batch in mine:
            mix = mixes[batch[0][0]]
            pipe.use({names[path]: scale for path, scale in mix.parts})
            seeds = [seed for _, _, seed in batch]
            texts = [prompts[p] for _, p, _ in batch]
            pictures = pipe.generate(texts, seeds, settings.steps, settings.guidance, side)
            for (m, p, seed), picture in zip(batch, pictures, strict=True):
                note = {"prompt": prompts[p], "seed": seed, "adapters": mix.label,
                        "model": cfg.model.path, "steps": settings.steps,
                        "guidance": settings.guidance}  # fmt: skip
                save_png(out / _name(m, p, seed), picture, json.dumps(note))
            bar.update(len(batch))


def _jobs(mixes: int, prompts: int, settings: Sample) -> list[tuple[int, int, int]]:
    """(mix, prompt, seed) of every picture."""
    seeds = range(settings.seed, settings.seed + settings.images)
    return [(m, p, seed) for m in range(mixes) for p in range(prompts) for seed in seeds]


def _name(mix: int, prompt: int, seed: int) -> str:
    return f"{mix:02d}-{prompt:02d}-seed{seed}.png"


def _is_made(sheet: Path, key: str, names: Sequence[str]) -> bool:
    """Whether the sheet with this key and all its pictures are there."""
    if not all(path.is_file() for path in (sheet, *(sheet.parent / name for name in names))):
        return False
    try:
        with Image.open(sheet) as picture:
            return getattr(picture, "text", {}).get(TEXT_KEY) == key
    except OSError:
        return False  # a damaged picture is drawn again


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
