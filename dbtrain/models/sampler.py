"""Generating images with a base model: one sampler for class images and samples, one seed per image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from dbtrain.data import photos
from dbtrain.data.sizes import Size
from dbtrain.models import text_encoders
from dbtrain.models.base import Base
from dbtrain.models.families.family import Family
from dbtrain.models.families.space import LatentSpace
from dbtrain.models.precision import PRECISIONS
from dbtrain.runtime import console, dist, files, pace
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.hashing import content_key
from dbtrain.runtime.imports import importing


def build(
    base: Base,
    dtype: torch.dtype,
    device: torch.device,
    given: Mapping[str, Any] | None = None,
) -> Any:
    """The base's Diffusers pipeline on `device`, without safety checker and progress bar.

    `given`: loaded components to use, or None for components to leave out.
    """
    given = given or {}
    with importing():  # not at the top, because most calls of `prepare` generate nothing
        import diffusers

    if loaded := [part for part in base.family.models if part not in given]:
        console.say(f"loading {', '.join(loaded)} of {base.name}")
    parts = {part: given[part] if part in given else base.load(part, dtype) for part in base.family.parts}
    with importing():
        kind = getattr(diffusers, base.family.pipeline)
    # `from_pretrained` loads none of these: the rest of the base's components are optional, or it lacks them.
    unused = dict.fromkeys(kind._optional_components)
    unused |= dict.fromkeys(name for name, entry in base.index.items() if entry == [None, None])
    pipe = kind.from_pretrained(base.folder, trust_remote_code=False, **unused | parts)
    if base.family.objective.SAMPLER:
        pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
            pipe.scheduler.config, algorithm_type="dpmsolver++", solver_order=2, **base.family.sampler
        )
    pipe.set_progress_bar_config(disable=True)
    if vae := getattr(pipe, "vae", None):
        vae.enable_slicing()  # one image at a time: each takes more memory than in the denoiser
    pipe.maybe_convert_prompt = lambda prompt, tokenizer: prompt  # tokenizers know what words stand for
    return pipe.to(device)


def default_size(pipe: Any, denoiser: Any) -> Size:
    """The size of the images that a pipeline generates by default."""
    cells = getattr(pipe, "default_sample_size", None) or getattr(denoiser.config, "sample_size", None)
    return Size.square(cells * getattr(pipe, "vae_scale_factor", 1) if cells else 1024)


def name_of(base: Base) -> str:
    """The name of the sampler that generates a base's images."""
    return base.family.objective.SAMPLER or str(base.index["scheduler"][1])


def without_vae(base: Base, size: Size, dtype: torch.dtype, given: Mapping[str, Any] | None = None) -> Any:
    """Like `build`, for latents only: without the VAE, unless the pipeline reads something in it.

    `size`: any that the base can have.
    """
    family, given = base.family, given or {}
    if family.needs_vae:
        return build(base, dtype, dist.device(), given)
    pipe = build(base, dtype, dist.device(), {**given, str(family.vae): None})
    # Without a VAE the pipeline would assume a factor of 8.
    pipe.vae_scale_factor = size.width // family.space(base, size).shape[-1]
    return pipe


@contextmanager
def moving(pipe: Any, bar: console.Bar, images: int, kind: str) -> Iterator[None]:
    """While the block generates `images` images with `pipe`, `bar` moves at each denoising step.

    Adds the time of these steps to the pace of `kind`, as "`kind` step", and that of decoding as `kind`.
    """
    moments: list[_Moment] = []
    end = bar.n + images

    def stepped(steps: int) -> None:
        moments.append(_Moment.now(pipe.device))
        bar.update(images / (steps + 1))  # decoding counts as one more

    pipe.progress_bar = lambda total: _Steps(total, stepped)
    try:
        yield
    finally:
        del pipe.progress_bar  # which refers to the pipeline in turn, and would keep it in memory
    bar.update(end - bar.n)
    if len(moments) > 1:
        pace.add(f"{kind} step", moments[-1].since(moments[0]), images * (len(moments) - 1))
        pace.add(kind, _Moment.now(pipe.device).since(moments[-1]), images)


@dataclass(frozen=True)
class _Steps:
    """Takes the place of the pipeline's own progress bar."""

    total: int
    stepped: Callable[[int], None]  # called with `total` after each denoising step

    def __enter__(self) -> _Steps:
        return self

    def __exit__(self, *problem: object) -> None:
        pass

    def update(self) -> None:
        self.stepped(self.total)


@dataclass(frozen=True)
class _Moment:
    """A moment on the device, whose kernels run later than they are launched."""

    seconds: float
    event: torch.cuda.Event | None = None

    @classmethod
    def now(cls, device: torch.device) -> _Moment:
        if device.type != "cuda":
            return cls(pace.clock())
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return cls(0.0, event)

    def since(self, earlier: _Moment) -> float:
        """Seconds. Waits for the device."""
        if self.event is None or earlier.event is None:
            return self.seconds - earlier.seconds
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1000


@torch.no_grad()
def encode(pipe: Any, family: Family, prompts: Sequence[str], guidance: float) -> list[dict[str, Tensor]]:
    """The encoded prompts as arguments of the pipeline's call, (1, ...) each."""
    return [family.encode_prompt(pipe, prompt, guidance > 1) for prompt in prompts]


def encode_alone(
    base: Base, prompts: Sequence[str], guidance: float, dtype: torch.dtype, gib: float | None = None
) -> list[dict[str, Tensor]]:
    """Like `encode`, by text encoders that are loaded for it, before the denoiser takes its memory.

    `gib`: memory for their weights.
    """
    unused = dict.fromkeys(name for name in (base.family.denoiser, base.family.vae) if name)

    def use(encoders: Mapping[str, nn.Module]) -> Callable[[], list[dict[str, Tensor]]]:
        pipe = build(base, dtype, dist.device(), unused | dict(encoders))
        return lambda: encode(pipe, base.family, prompts, guidance)

    return text_encoders.encoded(base, dtype, gib, use)


def encode_once(
    wanted: Sequence[tuple[Path, Sequence[str]]],
    base: Base,
    components: Mapping[str, str],
    guidance: float,
    precision: str,
    gib: float | None = None,
) -> list[list[dict[str, Tensor]]]:
    """Prompts as `encode` returns them, encoded by the base's own text encoders, on the CPU.

    `wanted`: (folder, its prompts). Rank 0 encodes those that are not there once, and saves them in the
    folders for the other ranks and later starts. `components`: the hashes of the base's components. `gib`:
    memory for the weights of the text encoders.
    """
    # The files are named by everything that their tensors depend on.
    parts = [components[name] for name in (*base.family.text_encoders, *base.family.text_encoders.values())]
    paths = []
    for folder, prompts in wanted:
        key = content_key([parts, list(prompts), guidance > 1, precision])
        paths.append(folder / f"prompts-{key[:12]}.safetensors")
    # Rank 0 writes them.
    with dist.agreed():
        pairs = zip(paths, wanted, strict=True)
        missing = {path: prompts for path, (_, prompts) in pairs if not path.is_file()}
        if dist.is_main() and missing:
            texts = list(dict.fromkeys(text for prompts in missing.values() for text in prompts))
            tokenizers = {encoder: base.load(name) for encoder, name in base.family.text_encoders.items()}
            base.family.tokenize(tokenizers, texts)  # reports prompts that are too long
            every = encode_alone(base, texts, guidance, PRECISIONS[precision].dtype, gib)
            found = dict(zip(texts, every, strict=True))
            for path, prompts in missing.items():
                tensors = {
                    f"{number}.{name}": tensor.cpu().contiguous()
                    for number, text in enumerate(prompts)
                    for name, tensor in found[text].items()
                }
                files.write_atomically(path, safetensors.torch.save(tensors))
    # Every rank reads them.
    with dist.agreed():
        return [_encoded(path, len(prompts)) for path, (_, prompts) in zip(paths, wanted, strict=True)]


def _encoded(path: Path, count: int) -> list[dict[str, Tensor]]:
    """What is stored of so many prompts."""
    encoded: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, tensor in safetensors.torch.load_file(path).items():
        number, _, argument = name.partition(".")
        encoded[int(number)][argument] = tensor
    return encoded


@torch.no_grad()
def reencoded(
    family: Family,
    encoders: Mapping[str, nn.Module],
    tokenizers: Mapping[str, Any],
    prompt: str,
    row: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """A prompt as `encode` returned it, `row`, with what these encoders make of it now."""
    found = dict(row)
    device = next(next(iter(encoders.values())).parameters()).device
    for start, text in (("", prompt), ("negative_", "")):
        old = {name.removeprefix(start): value.to(device) for name, value in row.items()
               if name.startswith("negative_") == bool(start)}  # fmt: skip
        if old:
            ids = {name: tokens.to(device) for name, tokens in family.tokenize(tokenizers, [text]).items()}
            found |= {f"{start}{name}": new for name, new in family.embed(encoders, old | ids).items()}
    return found


@torch.no_grad()
def generate_encoded(
    pipe: Any,
    family: Family,
    encoded: Sequence[Mapping[str, Tensor]],
    generators: Sequence[torch.Generator],
    steps: int,
    guidance: float,
    size: Size | None,
    images: Sequence[Image.Image] = (),
    space: LatentSpace | None = None,
) -> list[Any]:
    """One image per encoded prompt, of `size` (None: the base's default).

    Each starts from noise of its own CPU generator, which depends on neither the batch nor the device.
    `images`: input images of an upscaler, one per prompt.
    `space`: return x0 in the denoiser's scale, (C, h, w) each, instead of images, without a VAE.
    """
    rows = [{name: tensor.to(pipe.device) for name, tensor in one.items()} for one in encoded]
    more: dict[str, Any] = {"image": list(images)} if images else {}
    if space:
        more["output_type"] = "latent"
    made = pipe(
        generator=list(generators), num_inference_steps=steps,
        height=size and size.height, width=size and size.width, **family.arguments(rows, guidance), **more,
    ).images  # fmt: skip
    return list(family.generated(made, space) if space else made)


@torch.no_grad()
def decode(vae: nn.Module, family: Family, latent: Tensor, space: LatentSpace) -> Image.Image:
    """The image of one x0, (C, h, w), decoded as in the family's pipeline."""
    parameter = next(vae.parameters())
    unscaled = space.unscaled(latent.float().cpu())[None].to(parameter.device, parameter.dtype)
    pixels = family.decode(vae, unscaled)[0]  # (3, H, W) in [-1, 1]
    values = (pixels.float().cpu() / 2 + 0.5).clamp(0, 1).permute(1, 2, 0)
    return Image.fromarray((values * 255).round().to(torch.uint8).numpy())


def small_pictures(names: Sequence[str], family: Family, size: Size | None) -> list[Image.Image]:
    """The images in `sample.low_res`, resized to the input size of an upscaler.

    Raises ConfigError if an upscaler has no input images, or if another model has some.
    """
    if (family.enlarges > 1) != bool(names):
        need = "enlarges images; add some" if family.enlarges > 1 else "enlarges none; remove them"
        raise ConfigError(f"sample.low_res has {len(names)} images, but a {family.name} model {need}")
    height, width = (side // family.enlarges for side in size or Size.square(256))
    small = (width, height)
    return [photos.load(files.expand(name)).resize(small, Image.Resampling.LANCZOS) for name in names]
