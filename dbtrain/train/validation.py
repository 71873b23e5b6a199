"""Images and held-out losses during training: at fixed steps, with fixed prompts, seeds, and noise.

Validation does not affect training: it leaves random streams, compiled graphs, and module modes alone.
Images are generated with the trained modules, without a training adapter; frozen text encoders and the VAE
are on the device only while they are used. Held-out losses are those that training has, with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dbtrain.adapters import tokens
from dbtrain.config import Config
from dbtrain.data.pictures import SheetRow, contact_sheet, save_png
from dbtrain.data.shards import Manifest
from dbtrain.data.sizes import Size
from dbtrain.data.storage import Storage
from dbtrain.evaluate.scoring import Scoring
from dbtrain.models import sampler
from dbtrain.models.base import Base
from dbtrain.models.precision import PRECISIONS
from dbtrain.models.pretrained import DTYPES
from dbtrain.runtime import console, dist, pace
from dbtrain.runtime.run_folder import RunFolder
from dbtrain.train import best, due, held_out_loss, parallel
from dbtrain.train.dreambooth import DreamBooth
from dbtrain.train.inputs import Inputs
from dbtrain.train.metrics import Metrics

Encoded = list[dict[str, Tensor]]


def encode(cfgs: Sequence[Config], inputs: Inputs) -> list[Encoded | None]:
    """The prompts of each run's images, as the base encodes them; None without, or if training changes that.

    Rank 0 encodes them on its device, so call this while no denoiser is there. The runs have the base and the
    settings of the first one, whose `inputs` these are.
    """
    first, base = cfgs[0], inputs.base
    trained = base.family.adaptable_text if first.adapter.text_encoder or first.adapter.token else ()
    shown = any(cfg.validation.prompts for cfg in cfgs)
    if not shown or set(trained) == base.family.text_encoders.keys():
        return [None] * len(cfgs)
    wanted = [(RunFolder(cfg.run_dir).validation, cfg.validation.prompts) for cfg in cfgs]
    found = sampler.encode_once(
        [one for one in wanted if one[1]], base, inputs.manifest.components, first.sample.guidance,
        first.train.precision, first.prepare.memory_gib if first.prepare else None,
    )  # fmt: skip
    rest = iter(found)
    return [next(rest) if prompts else None for _, prompts in wanted]


@dataclass
class Validator:
    """Validates a run. It is built once, before the first step."""

    cfg: Config
    manifest: Manifest
    model: DreamBooth
    generator: ImageGenerator | None
    held_out: list[held_out_loss.HeldOut]
    fingerprint: Mapping[str, Any]
    scoring: Scoring | None  # on rank 0, with `train.stop: best`
    stopped: bool = False  # whether the last validation ended the run; on every rank

    @classmethod
    def of(cls, cfg: Config, inputs: Inputs, model: DreamBooth, encoded: Encoded | None) -> Validator:
        """Read the held-out rows. `encoded`: see `encode`. Raises ConfigError for anything a user can fix."""
        generator, base, manifest = None, inputs.base, inputs.manifest
        with dist.agreed():
            if cfg.validation.prompts:
                generator = ImageGenerator(cfg, base, model, manifest.sizes_of("instance"), encoded)
            storage = Storage(cfg.data.shards, cfg.faults.retries)
            held_out = [
                row
                for role in due.held_out_roles(manifest)
                for row in held_out_loss.rows(manifest, storage, base.family, role, cfg.validation.timesteps)
            ]
        return cls(cfg, manifest, model, generator, held_out, inputs.fingerprint, inputs.scoring)

    def is_due(self, step: int) -> bool:
        return due.is_due(self.cfg, self.manifest, step)

    def contenders(self) -> set[int]:
        """The steps that can still turn out the best, on rank 0."""
        return best.contenders(self.cfg, self.fingerprint, self.scoring)

    def run(self, step: int, metrics: Metrics) -> None:
        """Produce what the run folder lacks after `step` steps, over all ranks; decide whether to stop."""
        state = self.cfg, self.fingerprint, self.scoring
        found = due.missing(self.cfg, self.manifest, *state[1:], step) if dist.is_main() else ()
        if wanted := dist.from_main(sorted(found)):
            self._produce(step, wanted, metrics)
        with dist.agreed():
            stops = dist.is_main() and best.decide(*state, step)
        self.stopped = dist.from_main(stops)
        if self.stopped:
            console.say(f"stops at step {step}: no validation was better for {self.cfg.train.patience}")

    def _produce(self, step: int, wanted: Sequence[str], metrics: Metrics) -> None:
        with (
            metrics.interrupted("validation"), console.timed("validation"), dist.patiently(),
            eval_mode(self.model, self.cfg),
        ):  # fmt: skip
            losses: dict[str, Any] = {}
            if "losses" in wanted and self.held_out:
                losses = held_out_loss.measure(self.model, self.held_out, self.cfg)
            sheet = self._write_images(step) if "images" in wanted else None
            with dist.agreed():
                if "losses" in wanted and dist.is_main():
                    losses |= self._scores(step)
                    losses |= {"key": due.losses_key(self.cfg, self.fingerprint, self.scoring)}
                metrics.validated(step, losses, sheet)

    def lacks_images(self, step: int) -> bool:
        """Whether images are due after `step` steps that the run folder lacks."""
        return "images" in due.missing(self.cfg, self.manifest, self.fingerprint, self.scoring, step)

    def _scores(self, step: int) -> dict[str, float]:
        """The scores of the images of a step; none if the held-out losses decide, or nothing does."""
        if not self.scoring:
            return {}
        folder = RunFolder(self.cfg.run_dir).validation_sheet(step).parent
        seeds = range(self.cfg.sample.seed, self.cfg.sample.seed + self.cfg.validation.images)
        return self.scoring.score([[folder / _name(n, seed) for seed in seeds] for n in self.scoring.prompts])

    def _write_images(self, step: int) -> Path:
        """Generate the images of all prompts and seeds, and a contact sheet; return its path."""
        assert self.generator
        sheet = RunFolder(self.cfg.run_dir).validation_sheet(step)
        prompts, seeds = self.cfg.validation.prompts, self.generator.seeds
        with self.model.left_out.in_place():
            self.generator.generate(sheet.parent, step)
        with dist.agreed():
            if dist.is_main():
                names = [[_name(number, seed) for seed in seeds] for number in range(len(prompts))]
                for path in sheet.parent.glob("??-seed*.png"):  # left by other prompts
                    if path.name not in {name for row in names for name in row}:
                        path.unlink()
                rows = []
                for number, prompt in enumerate(prompts):
                    images = [Image.open(sheet.parent / name) for name in names[number]]
                    captions = () if number else [f"seed {seed}" for seed in seeds]
                    rows.append(SheetRow(images, prompt, "" if number else f"step {step}", captions))
                save_png(sheet, contact_sheet(rows), due.images_key(self.cfg, self.fingerprint))
        return sheet


class ImageGenerator:
    """Generates validation images with a Diffusers pipeline around the trained modules."""

    def __init__(
        self, cfg: Config, base: Base, model: DreamBooth, sizes: Sequence[Size],
        encoded: list[dict[str, Tensor]] | None,
    ) -> None:  # fmt: skip
        """`sizes`: of the images, in turn. `encoded`: the prompts as the base encodes them; None if all text
        encoders are trained."""
        self.cfg, self.base, self.family, self.model = cfg, base, base.family, model
        self.seeds = range(cfg.sample.seed, cfg.sample.seed + cfg.validation.images)
        self.sizes = {size: self.seeds[k :: len(sizes)] for k, size in enumerate(sizes)}
        self.low_res = {
            size: sampler.small_pictures(cfg.sample.low_res, base.family, size) for size in self.sizes
        }
        self.encoded = encoded
        self.ahead: list[Any] = []  # the next ones, if `joint_images.generate` made them

    @property
    def jobs(self) -> list[tuple[int, int]]:
        """(prompt, seed) of each image, in the order in which they are generated."""
        prompts = range(len(self.cfg.validation.prompts))
        return [(prompt, seed) for prompt in prompts for seeds in self.sizes.values() for seed in seeds]

    @cached_property
    def pipe(self) -> Any:
        """The pipeline. It is built on first use, when the model is on its device."""
        family = self.family
        given: dict[str, Any] = dict.fromkeys(family.text_encoders) | self.model.live
        readers = tokens.readers(self.base, self.cfg.learned_words, self.cfg.adapter.token)
        given |= {family.text_encoders[name]: tokenizer for name, tokenizer in readers.items()}
        dtype = PRECISIONS[self.cfg.train.precision].dtype
        if family.vae:
            return sampler.without_vae(self.base, next(iter(self.sizes)), dtype, given)
        return sampler.build(self.base, dtype, dist.device(), given)

    def encode(self) -> list[dict[str, Tensor]]:
        """The prompts as the text encoders of this step encode them; the base, where they are frozen."""
        with PRECISIONS[self.cfg.train.precision].forward(self.pipe.device):
            return self._encoded()

    def _encoded(self) -> list[dict[str, Tensor]]:
        family, prompts = self.family, self.cfg.validation.prompts
        encoders = dict(self.model.text_encoders.items())
        if self.encoded is None:
            return sampler.encode(self.pipe, family, prompts, self.cfg.sample.guidance)
        if not encoders:
            return self.encoded
        tokenizers = {name: getattr(self.pipe, family.text_encoders[name]) for name in encoders}
        return [
            sampler.reencoded(family, encoders, tokenizers, prompt, row)
            for prompt, row in zip(prompts, self.encoded, strict=True)
        ]

    @cached_property
    def vae(self) -> nn.Module:
        assert self.family.vae
        return self.base.load(self.family.vae, DTYPES["fp32"])

    def generate(self, folder: Path, step: int) -> None:
        """Write this rank's images, in batches that do not depend on the number of ranks.

        A batch has a single prompt, so that the prompts can be split over ranks, and a single size.
        Raises ConfigError or Preempted on all ranks.
        """
        most, count = self.cfg.sample.batch, len(self.cfg.validation.prompts)
        batches = [
            (number, size, seeds[i : i + most])
            for number in range(count)
            for size, seeds in self.sizes.items()
            for i in range(0, len(seeds), most)
        ]
        sharded = parallel.is_sharded(self.model)
        mine = batches[dist.rank() :: dist.world()]
        encoded: list[dict[str, Tensor]] = []
        with dist.agreed():
            if (mine or sharded) and not self.ahead:
                encoded = self.encode()

        # Latents first, or the images themselves if the family has no VAE.
        made, self.ahead = self.ahead, []
        total = sum(len(seeds) for *_, seeds in mine)
        with console.bar(total, "images", "image", share=True, leave=False) as bar:
            for number, keep in parallel.rounds(0 if made else len(batches), sharded):
                prompt, size, seeds = batches[number]
                found = self.latents([encoded[prompt]] * len(seeds), size, seeds, bar)
                made += found if keep else []

        # Then decode them and write the files.
        with dist.agreed():
            if mine:
                self._write(folder, step, [(prompt, seeds) for prompt, _, seeds in mine], made)

    def latents(
        self, encoded: Sequence[Mapping[str, Tensor]], size: Size, seeds: Sequence[int], bar: console.Bar
    ) -> list[Any]:
        """x0 of each encoded prompt and seed, or their images if the family has no VAE."""
        settings, family = self.cfg.sample, self.family
        space = family.space(self.base, size) if family.vae else None
        offsets = [seed - settings.seed for seed in seeds]
        small = self.low_res[size]
        inputs = [small[k % len(small)] for k in offsets] if small else []
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        autocast = PRECISIONS[self.cfg.train.precision].forward(dist.device())
        with autocast, sampler.moving(self.pipe, bar, len(seeds), "validation image"):
            return sampler.generate_encoded(
                self.pipe, family, encoded, generators, settings.steps, settings.guidance, size, inputs, space
            )

    def _write(
        self, folder: Path, step: int, batches: Sequence[tuple[int, Sequence[int]]], made: Sequence[Any]
    ) -> None:
        """Decode what was generated for the batches, and write an image each."""
        settings, prompts = self.cfg.sample, self.cfg.validation.prompts
        before = pace.clock()
        images = self._decode(made) if self.family.vae else made
        pace.add("validation image decode", pace.clock() - before, len(made))
        jobs = [(number, seed) for number, seeds in batches for seed in seeds]
        for (number, seed), image in zip(jobs, images, strict=True):
            note = {"prompt": prompts[number], "seed": seed, "step": step, "model": self.cfg.model.path,
                    "steps": settings.steps, "guidance": settings.guidance}  # fmt: skip
            save_png(folder / _name(number, seed), image, json.dumps(note))

    def _decode(self, latents: Sequence[Tensor]) -> list[Image.Image]:
        """Decode one image at a time: the VAE needs more memory per image than the denoiser."""
        self.vae.to(dist.device())
        space = self.family.space(self.base, next(iter(self.sizes)))  # its scale is that of all
        images = [sampler.decode(self.vae, self.family, latent, space) for latent in latents]
        self.vae.to("cpu")
        return images


@contextmanager
def eval_mode(model: DreamBooth, cfg: Config) -> Iterator[None]:
    """Run the block without dropout and without compiled code, which is for training's shapes only."""
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


def _name(prompt: int, seed: int) -> str:
    return f"{prompt:02d}-seed{seed}.png"
