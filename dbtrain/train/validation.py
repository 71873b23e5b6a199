"""Pictures and losses of a run while it trains: at fixed steps, of fixed prompts, seeds and noise.

Nothing that training uses is touched: no random stream, no compiled graph, no module's mode. Pictures
are drawn with the modules that train; text encoders and the VAE are on the device only while they work.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dbtrain.config import Config
from dbtrain.data.pictures import Row, contact_sheet, note_in, save_png
from dbtrain.data.shards import HELD_OUT, Manifest
from dbtrain.data.storage import Storage
from dbtrain.models import sampler
from dbtrain.models.base import Base
from dbtrain.models.precision import PRECISIONS
from dbtrain.models.pretrained import DTYPES
from dbtrain.runtime import console, dist, files, preemption
from dbtrain.runtime.hashing import content_key
from dbtrain.runtime.run_folder import SHEET, RunFolder, step_of
from dbtrain.train import held_out_loss
from dbtrain.train.dreambooth import DreamBooth
from dbtrain.train.metrics import Metrics


def is_due(cfg: Config, manifest: Manifest, step: int) -> bool:
    """Whether a run is looked at after `step` steps: it is so before the first and after the last."""
    wanted = bool(cfg.validation.prompts or _roles(manifest))
    return wanted and (step % cfg.validation.every == 0 or step == cfg.train.steps)


def lacking(cfg: Config, manifest: Manifest, fingerprint: Mapping[str, Any], step: int) -> set[str]:
    """What is still to be made of a run after `step` steps: its `pictures`, its `losses`, both or nothing."""
    if not is_due(cfg, manifest, step):
        return set()
    run, wanted = RunFolder(cfg.run_dir), set()
    if cfg.validation.prompts and note_in(run.validation_sheet(step)) != _pictures_key(cfg, fingerprint):
        wanted.add("pictures")
    lines = _lines(run.table("validation"))
    if _roles(manifest) and not any(
        (at, key) == (step, _losses_key(cfg, fingerprint)) for at, key, _ in lines
    ):
        wanted.add("losses")
    return wanted


def forget_after(cfg: Config, fingerprint: Mapping[str, Any], step: int) -> None:
    """Remove what was made of steps that are taken again from `step` on, and losses of another kind."""
    run = RunFolder(cfg.run_dir)
    losses = run.table("validation")
    for path in run.validations():
        other = step == 0 and note_in(path / SHEET) != _pictures_key(cfg, fingerprint)
        if step_of(path) > step or other:
            shutil.rmtree(path)
    if losses.is_file():
        kept = [
            text for at, key, text in _lines(losses) if at <= step and key == _losses_key(cfg, fingerprint)
        ]
        files.write_atomically(losses, "".join(kept))


@dataclass(frozen=True)
class Validator:
    """What a run is looked at with: made once, before its first step."""

    cfg: Config
    manifest: Manifest
    model: DreamBooth
    pictures: Pictures | None
    kept_back: list[held_out_loss.HeldOut]
    fingerprint: Mapping[str, Any]

    @classmethod
    def build(
        cls, cfg: Config, base: Base, model: DreamBooth, manifest: Manifest, fingerprint: Mapping[str, Any]
    ) -> Validator:
        """Reads what was kept back, and encodes the prompts, on rank 0 and before `model` is on its device.

        Raises ConfigError for what a user can fix.
        """
        pictures = None
        if cfg.validation.prompts:
            encoded = None
            if not model.text_encoders:
                encoded = sampler.encode_once(
                    RunFolder(cfg.run_dir).validation, base, manifest.components,
                    cfg.validation.prompts, cfg.sample.guidance, cfg.train.precision,
                )  # fmt: skip
            with dist.agreed():
                pictures = Pictures(cfg, base, model, manifest.request["resolution"], encoded)
        with dist.agreed():
            storage = Storage(cfg.data.shards, cfg.faults.retries)
            kept_back = [
                row
                for role in _roles(manifest)
                for row in held_out_loss.rows(manifest, storage, base.family, role, cfg.validation.timesteps)
            ]
        return cls(cfg, manifest, model, pictures, kept_back, fingerprint)

    def is_due(self, step: int) -> bool:
        return is_due(self.cfg, self.manifest, step)

    def lacking(self, step: int) -> set[str]:
        """As rank 0 sees the run folder."""
        found = lacking(self.cfg, self.manifest, self.fingerprint, step) if dist.is_main() else ()
        return set(dist.from_main(sorted(found)))

    def run(self, step: int, metrics: Metrics) -> None:
        """Make what the run folder lacks of the run as it is after `step` steps, over all ranks."""
        wanted = self.lacking(step)
        if not wanted:
            return
        with metrics.untimed(), console.timed("validation"), dist.patiently(), _looking(self.model, self.cfg):
            found = {}
            if "losses" in wanted:
                found = held_out_loss.measure(self.model, self.kept_back, self.cfg)
                found |= {"key": _losses_key(self.cfg, self.fingerprint)}
            sheet = self._draw(step) if "pictures" in wanted else None
            with dist.agreed():
                metrics.validated(step, found, sheet)

    def _draw(self, step: int) -> Path:
        """The pictures of all prompts and seeds, each a file, and one sheet of them."""
        assert self.pictures
        sheet = RunFolder(self.cfg.run_dir).validation_sheet(step)
        prompts, seeds = self.cfg.validation.prompts, self.pictures.seeds
        with dist.agreed():
            self.pictures.draw(sheet.parent, step)
        with dist.agreed():
            if dist.is_main():
                names = [[_name(number, seed) for seed in seeds] for number in range(len(prompts))]
                for path in sheet.parent.glob("??-seed*.png"):  # of other prompts
                    if path.name not in {name for row in names for name in row}:
                        path.unlink()
                rows = []
                for number, prompt in enumerate(prompts):
                    made = [Image.open(sheet.parent / name) for name in names[number]]
                    captions = () if number else [f"seed {seed}" for seed in seeds]
                    rows.append(Row(made, prompt, "" if number else f"step {step}", captions))
                save_png(sheet, contact_sheet(rows), _pictures_key(self.cfg, self.fingerprint))
        return sheet


class Pictures:
    """Draws a model's pictures with a Diffusers pipeline around the modules that train."""

    def __init__(
        self,
        cfg: Config,
        base: Base,
        model: DreamBooth,
        side: int,
        encoded: list[dict[str, Tensor]] | None,
    ) -> None:
        """`encoded`: the prompts, unless the model's own text encoders are trained."""
        self.cfg, self.base, self.family, self.model, self.side = cfg, base, base.family, model, side
        self.seeds = range(cfg.sample.seed, cfg.sample.seed + cfg.validation.images)
        self.small = sampler.small_pictures(cfg.sample.low_res, base.family, side)
        self.encoded = encoded
        self.vae: nn.Module | None = None
        self.pipe: Any = None

    def _assemble(self) -> None:
        """The pipeline, when it is first needed: the model is on its device by then."""
        family = self.family
        given: dict[str, Any] = dict.fromkeys(family.text_encoders) | self.model.trained
        if family.vae:
            given[family.vae] = None
        dtype = PRECISIONS[self.cfg.train.precision].dtype
        self.pipe = sampler.build(self.base, dtype, dist.device(), given)
        if family.vae:  # what the pipeline would have read from its VAE: it guesses 8 without one
            space = family.space(self.base, self.side)
            self.pipe.vae_scale_factor = self.side // space.shape[-1]

    def draw(self, folder: Path, step: int) -> None:
        """This rank's part of the pictures, in batches that are the same for any number of ranks.

        A batch has pictures of one prompt, so that several prompts are shared out.
        """
        settings, prompts = self.cfg.sample, self.cfg.validation.prompts
        size = settings.batch
        batches = [
            (number, self.seeds[i : i + size])
            for number in range(len(prompts))
            for i in range(0, len(self.seeds), size)
        ]
        mine = batches[dist.rank() :: dist.world()]
        if not mine:
            return
        if self.pipe is None:
            self._assemble()
        precision, drawn = PRECISIONS[self.cfg.train.precision], []
        count = sum(len(seeds) for _, seeds in mine)
        with console.bar(count, "pictures", "image", share=True, leave=False) as bar:
            with precision.forward(dist.device()):
                encoded = self.encoded or sampler.encode(self.pipe, prompts, settings.guidance)
            for number, seeds in mine:
                preemption.check()
                turns = [seed - settings.seed for seed in seeds]
                small = [self.small[turn % len(self.small)] for turn in turns] if self.small else []
                sources = [torch.Generator().manual_seed(seed) for seed in seeds]
                with precision.forward(dist.device()):
                    drawn += sampler.generate_encoded(
                        self.pipe, [encoded[number]] * len(seeds), sources, settings.steps, settings.guidance,
                        self.side, small, latents=self.family.vae is not None,
                    )  # fmt: skip
                bar.update(len(seeds))
        pictures = self._decoded(drawn) if self.family.vae else drawn
        jobs = [(number, seed) for number, seeds in mine for seed in seeds]
        for (number, seed), picture in zip(jobs, pictures, strict=True):
            note = {"prompt": prompts[number], "seed": seed, "step": step, "model": self.cfg.model.path,
                    "steps": settings.steps, "guidance": settings.guidance}  # fmt: skip
            save_png(folder / _name(number, seed), picture, json.dumps(note))

    def _decoded(self, latents: Sequence[Tensor]) -> list[Image.Image]:
        """One at a time: a picture takes more memory in the VAE than in the denoiser."""
        assert self.family.vae
        if self.vae is None:
            self.vae = self.base.load(self.family.vae, DTYPES["fp32"])
        self.vae.to(dist.device())
        space = self.family.space(self.base, self.side)
        pictures = [sampler.decode(self.vae, latent, space) for latent in latents]
        self.vae.to("cpu")
        return pictures


@contextmanager
def _looking(model: DreamBooth, cfg: Config) -> Iterator[None]:
    """The model as it draws: no dropout, no compiled code (which is for training's shapes only)."""
    modes = {module: module.training for module in model.modules()}
    with ExitStack() as stack:
        if cfg.train.compile:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        stack.enter_context(model.working_copies.in_place())
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def _roles(manifest: Manifest) -> list[str]:
    """Roles of which something was kept back."""
    return [role for role, kept_back in HELD_OUT.items() if kept_back in manifest.roles]


def _pictures_key(cfg: Config, fingerprint: Mapping[str, Any]) -> str:
    """A name for all that a step's pictures depend on, but the step."""
    settings = cfg.sample.model_dump(mode="json", exclude={"prompts", "images", "batch", "precision"})
    return content_key([fingerprint, cfg.validation.prompts, cfg.validation.images, settings])


def _losses_key(cfg: Config, fingerprint: Mapping[str, Any]) -> str:
    """A name for all that a step's held-out losses depend on, but the step."""
    return content_key([fingerprint, cfg.validation.timesteps])[:12]


def _lines(path: Path) -> list[tuple[int, str, str]]:
    """(step, key, the line itself) of what was measured."""
    found = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines(keepends=True):
        try:
            values = json.loads(line)
            found.append((int(values["step"]), str(values["key"]), line))
        except (ValueError, LookupError, TypeError):  # cut short by a crash
            continue
    return found


def _name(prompt: int, seed: int) -> str:
    return f"{prompt:02d}-seed{seed}.png"
