"""Pictures and losses of a run while it trains: at fixed steps, of fixed prompts, seeds and noise.

Nothing that training uses is touched: no random stream, no compiled graph, no module's mode. Pictures
are drawn with the modules that train; text encoders and the VAE are on the device only while they work.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dbtrain import dist, files, generate, held_out, log, preempt
from dbtrain.config import Config
from dbtrain.data.shards import HELD_OUT, Manifest
from dbtrain.data.storage import Storage
from dbtrain.families.base import Family
from dbtrain.keys import content_key
from dbtrain.network import DreamBooth
from dbtrain.pictures import Row, contact_sheet, note_in, save_png
from dbtrain.precision import PRECISIONS
from dbtrain.pretrained import DTYPES, Pretrained
from dbtrain.run_log import RunLog

FOLDER, LOSSES = "validation", "validation.jsonl"


def is_due(cfg: Config, manifest: Manifest, step: int) -> bool:
    """Whether a run is looked at after `step` steps: it is so before the first and after the last."""
    wanted = bool(cfg.validation.prompts or _roles(manifest))
    return wanted and (step % cfg.validation.every == 0 or step == cfg.train.steps)


def lacks(cfg: Config, manifest: Manifest, who: Mapping[str, Any], step: int) -> bool:
    """Whether a run is still to be looked at after `step` steps."""
    run_dir = files.expand(cfg.run_dir)
    drawn = not cfg.validation.prompts or note_in(sheet_of(run_dir, step)) == _key(cfg, who)
    measured = not _roles(manifest) or step in _measured(run_dir)
    return is_due(cfg, manifest, step) and not (drawn and measured)


def sheet_of(run_dir: Path, step: int) -> Path:
    """The contact sheet of a run after `step` steps."""
    return run_dir / FOLDER / f"step-{step:06d}" / "sheet.png"


def forget_after(run_dir: Path, step: int) -> None:
    """Remove pictures of steps that a resumed run takes again."""
    for path in (run_dir / FOLDER).glob("step-*"):
        if path.name.removeprefix("step-").isdecimal() and int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)


@dataclass(frozen=True)
class Validation:
    """What a run is looked at with: made once, before its first step."""

    cfg: Config
    manifest: Manifest
    model: DreamBooth
    pictures: Pictures | None
    held_out: list[held_out.HeldOut]
    who: Mapping[str, Any]

    @classmethod
    def build(
        cls, cfg: Config, base: Pretrained, family: Family, model: DreamBooth, manifest: Manifest, who: dict
    ) -> Validation:
        """Encodes the prompts, and reads what was kept back. Raises ConfigError for what a user can fix."""
        place = Storage(cfg.data.shards, cfg.faults.retries)
        kept_back = [
            row
            for role in _roles(manifest)
            for row in held_out.rows(manifest, place, family, role, cfg.validation.timesteps)
        ]
        pictures = None
        if cfg.validation.prompts:
            pictures = Pictures(cfg, base, family, model, manifest.request["resolution"])
        return cls(cfg, manifest, model, pictures, kept_back, who)

    def due(self, step: int) -> bool:
        return is_due(self.cfg, self.manifest, step)

    def lacks(self, step: int) -> bool:
        """As rank 0 sees the run folder."""
        return dist.from_main(dist.is_main() and lacks(self.cfg, self.manifest, self.who, step))

    def look(self, step: int, meters: RunLog) -> None:
        """Draw and measure the run as it is after `step` steps, over all ranks."""
        with meters.untimed(), _looking(self.model, self.cfg):
            found = held_out.measure(self.model, self.held_out, self.cfg) if self.held_out else {}
            sheet = self._draw(step) if self.pictures else None
            with dist.agreed():
                meters.validated(step, found, sheet)

    def _draw(self, step: int) -> Path:
        """The pictures of all prompts and seeds, each a file, and one sheet of them."""
        assert self.pictures
        sheet = sheet_of(files.expand(self.cfg.run_dir), step)
        prompts, seeds = self.cfg.validation.prompts, self.pictures.seeds
        with dist.agreed():
            self.pictures.draw(sheet.parent, step)
        with dist.agreed():
            if dist.is_main():
                rows = []
                for number, prompt in enumerate(prompts):
                    made = [Image.open(sheet.parent / _name(number, seed)) for seed in seeds]
                    captions = () if number else [f"seed {seed}" for seed in seeds]
                    rows.append(Row(made, prompt, "" if number else f"step {step}", captions))
                save_png(sheet, contact_sheet(rows), _key(self.cfg, self.who))
        return sheet


class Pictures:
    """Draws a model's pictures with a Diffusers pipeline around the modules that train."""

    def __init__(self, cfg: Config, base: Pretrained, family: Family, model: DreamBooth, side: int) -> None:
        self.cfg, self.base, self.family, self.model, self.side = cfg, base, family, model, side
        self.seeds = range(cfg.sample.seed, cfg.sample.seed + cfg.validation.images)
        self.small = generate.small_pictures(cfg.sample.low_res, family, side)
        given: dict[str, Any] = {**model.trained, **({family.vae: None} if family.vae else {})}
        self.pipe = generate.build(base, family, PRECISIONS[cfg.train.precision].dtype, dist.device(), given)
        if family.vae:  # what the pipeline would have read from its VAE: it guesses 8 without one
            self.pipe.vae_scale_factor = side // family.space(base, side).shape[-1]
        self.vae: nn.Module | None = None
        self.encoded: list[dict[str, Tensor]] = []
        if not model.text_encoders:  # they stay as they are, and so do the embeddings
            self.encoded = [{name: t.cpu() for name, t in one.items()} for one in self._encode()]
            for name in family.text_encoders:
                setattr(self.pipe, name, None)

    def _encode(self) -> list[dict[str, Tensor]]:
        with self._precision():
            return generate.encode(self.pipe, self.cfg.validation.prompts, self.cfg.sample.guidance)

    def _precision(self) -> AbstractContextManager[Any]:
        return PRECISIONS[self.cfg.train.precision].forward(dist.device())

    def draw(self, folder: Path, step: int) -> None:
        """This rank's part of the pictures, in batches that are the same for any number of ranks."""
        settings, prompts = self.cfg.sample, self.cfg.validation.prompts
        jobs = [(number, seed) for number in range(len(prompts)) for seed in self.seeds]
        batches = [jobs[i : i + settings.batch] for i in range(0, len(jobs), settings.batch)]
        mine = batches[dist.rank() :: dist.world()]
        encoded = self.encoded or (self._encode() if mine else [])
        with log.bar(sum(map(len, mine)), "validation", "image", share=True, leave=False) as bar:
            drawn = []
            for batch in mine:
                preempt.check()
                small = [
                    self.small[(seed - settings.seed) % len(self.small)] for _, seed in batch if self.small
                ]
                seeds = [torch.Generator().manual_seed(seed) for _, seed in batch]
                with self._precision():
                    drawn += generate.draw_encoded(
                        self.pipe, [encoded[number] for number, _ in batch], seeds, settings.steps,
                        settings.guidance, self.side, small, latents=self.family.vae is not None,
                    )  # fmt: skip
                bar.update(len(batch))
        pictures = self._decoded(drawn) if self.family.vae else drawn
        for (number, seed), picture in zip([job for batch in mine for job in batch], pictures, strict=True):
            note = {"prompt": prompts[number], "seed": seed, "step": step, "model": self.cfg.model.path,
                    "steps": settings.steps, "guidance": settings.guidance}  # fmt: skip
            save_png(folder / _name(number, seed), picture, json.dumps(note))

    def _decoded(self, latents: Sequence[Tensor]) -> list[Image.Image]:
        """One at a time: a picture takes more memory in the VAE than in the denoiser."""
        if not latents:
            return []
        assert self.family.vae
        if self.vae is None:
            self.vae = self.base.load(self.family.vae, DTYPES["fp32"])
        self.vae.to(dist.device())
        space = self.family.space(self.base, self.side)
        pictures = [generate.decode(self.vae, latent, space) for latent in latents]
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
    return [role for role, held_out in HELD_OUT.items() if held_out in manifest.roles]


def _key(cfg: Config, who: Mapping[str, Any]) -> str:
    """A name for all that a step's pictures depend on, but the step."""
    settings = cfg.sample.model_dump(mode="json", exclude={"prompts", "images", "batch", "precision"})
    return content_key([who, cfg.validation.model_dump(mode="json", exclude={"every"}), settings])


def _measured(run_dir: Path) -> set[int]:
    """Steps whose held-out losses are written down."""
    path = run_dir / LOSSES
    if not path.is_file():
        return set()
    found = set()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.add(json.loads(line)["step"])
        except (ValueError, LookupError, TypeError):  # cut short by a crash
            continue
    return found


def _name(prompt: int, seed: int) -> str:
    return f"{prompt:02d}-seed{seed}.png"
