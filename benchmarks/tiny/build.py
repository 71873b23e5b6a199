"""How the embedded base model is made: `python -m benchmarks.tiny.build --work FOLDER`.

An ordinary Stable Diffusion in miniature, trained from scratch on the pictures of `world`: a
tokenizer learnt from the captions, then the VAE, then text encoder and UNet together. Seeded;
resumed by running the same command again; minutes on a GPU, hours on a CPU.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from benchmarks.tiny import judge, measure
from benchmarks.tiny.fit import Stage, drawn, spent
from benchmarks.tiny.parts import TOKENS, scheduler, text_encoder, tokenizer, unet, vae
from dbtrain import tiny
from dbtrain.config.training import Loss
from dbtrain.models.ddpm import DDPM
from dbtrain.runtime import files, rng
from dbtrain.tiny import world
from dbtrain.tiny.judge import Judge
from dbtrain.tiny.paint import KINDS, SIDE, Scene

DROP = 0.1  # share of captions left empty: classifier-free guidance


@contextmanager
def mixed(device: torch.device) -> Iterator[None]:
    """bfloat16 where it is safe. On CPUs fused attention's backward is slow in it: plain attention."""
    with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


def fit_vae(
    work: Path,
    data: np.ndarray,
    scenes: list[Scene],
    steps: tuple[int, int],
    batch: int,
    device: torch.device,
) -> Any:
    """The autoencoder, in two stages: shapes first, then the colours of the thing that is shown."""
    with rng.seeded("tiny", "vae"):
        model = vae().to(device)
    frames = torch.tensor([(scene.x, scene.y, scene.size) for scene in scenes])
    for name, count, lr, edges, squares, thing in (
        ("vae", steps[0], 1e-3, 1.0, 1.0, 1.0),
        ("vae-colours", steps[1], 5e-4, 0.25, 4.0, 4.0),
    ):
        stage = Stage(work / name, model, count, warmup=100, lr=lr, decay=0.998)

        def loss_of(
            step: int, name: str = name, edges: float = edges, squares: float = squares, thing: float = thing
        ) -> Tensor:
            source = rng.generator("tiny", name, step)
            chosen = torch.randint(len(data), (batch,), generator=source).sort().values
            images = torch.from_numpy(data[chosen.numpy()]).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
            with mixed(device):
                moments = model.encode(images).latent_dist.parameters
            posterior = DiagonalGaussianDistribution(moments.float())
            noise = torch.randn(posterior.mean.shape, generator=source).to(device)
            with mixed(device):
                seen = model.decode(posterior.mean + posterior.std * noise).sample
            error = seen.float() - images
            kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
            sharp = sum(error.diff(dim=d).abs().mean() for d in (2, 3))
            focus = torch.where(_inside(frames[chosen], device), thing, 1.0)
            focus = focus / focus.mean()
            return (focus * (error.abs() + squares * error.square())).mean() + edges * sharp + 1e-4 * kl

        stage.fit(loss_of)
    return model.eval()


def _inside(frames: Tensor, device: torch.device) -> Tensor:
    """The square around the thing at (x, y), of half the height `size`: (B, 1, SIDE, SIDE) bool."""
    x, y, size = (column[:, None, None] for column in frames.to(device).unbind(1))
    pixels = (torch.arange(SIDE, device=device) + 0.5) / SIDE
    return (((pixels[None, None, :] - x).abs() < size) & ((pixels[None, :, None] - y).abs() < size))[:, None]


@torch.no_grad()
def encoded(work: Path, data: np.ndarray, model: Any, device: torch.device) -> dict[str, Tensor]:
    """Posterior mean and deviation of every training picture, (pictures, C, h, w), kept in `work`."""
    path = work / "latents.safetensors"
    if not path.exists():
        parts: dict[str, list[Tensor]] = {"mean": [], "std": []}
        for first in tqdm(range(0, len(data), 256), "latents"):
            images = torch.from_numpy(data[first : first + 256]).to(device).permute(0, 3, 1, 2).float()
            posterior = model.encode(images / 127.5 - 1).latent_dist
            parts["mean"].append(posterior.mean.cpu())
            parts["std"].append(posterior.std.cpu())
        files.write_atomically(
            path, safetensors.torch.save({name: torch.cat(part).contiguous() for name, part in parts.items()})
        )
    return safetensors.torch.load_file(path)


class Denoiser(nn.Module):
    """Text encoder and UNet, trained as one."""

    def __init__(self, text: CLIPTextModel, denoiser: Any) -> None:
        super().__init__()
        self.text = text
        self.unet = denoiser

    def forward(self, x_t: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return self.unet(x_t, t, self.text(ids)[0], return_dict=False)[0]


def fit_denoiser(
    work: Path,
    latents: Mapping[str, Tensor],
    scale: float,
    words: CLIPTokenizer,
    texts: list[str],
    steps: int,
    batch: int,
    device: torch.device,
) -> Denoiser:
    """Text encoder and UNet on all pictures; captions dropped now and then for guidance."""
    with rng.seeded("tiny", "denoiser"):
        model = Denoiser(text_encoder(words), unet()).to(device)
    objective = DDPM.of(dict(scheduler().config), Loss(min_snr_gamma=5.0)).to(device)
    ids = words(
        texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    empty = words("", padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    mean, std, ids = latents["mean"].to(device), latents["std"].to(device), ids.to(device)
    stage = Stage(work / "denoiser", model, steps, warmup=500, lr=1e-3, decay=0.9995)

    def loss_of(step: int) -> Tensor:
        source = rng.generator("tiny", "denoiser", step)
        chosen = torch.randint(len(mean), (batch,), generator=source)
        which = torch.randint(world.CAPTIONS, (batch,), generator=source)
        u, drop = torch.rand(2, batch, generator=source)
        u = (torch.arange(batch) + u) / batch  # timesteps spread evenly: less noise in the loss
        noise, posterior = torch.randn(2, batch, *mean.shape[1:], generator=source).to(device)
        rows = chosen.to(device)
        tokens = torch.where(
            (drop < DROP).to(device)[:, None], empty.to(device), ids[(chosen * world.CAPTIONS + which)]
        )
        x0 = (mean[rows] + std[rows] * posterior) * scale
        t = objective.timesteps(u.to(device))
        with mixed(device):
            predicted = model(objective.corrupt(x0, noise, t), t, tokens)
        error = predicted.float() - objective.target(x0, noise, t)
        return (objective.weight(t) * error.square().flatten(1).mean(1)).mean()

    stage.fit(loss_of)
    return model.eval()


def about(args: argparse.Namespace, folder: Path, pipe: Any, device: torch.device) -> str:
    """The model's README: what it is, how it was made, what was measured."""
    parts = {"VAE": pipe.vae, "text encoder": pipe.text_encoder, "UNet": pipe.unet}
    sizes = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in parts.items()}
    stages = []
    for path, what, batch in (
        (args.work / "vae", "VAE, shapes", args.vae_batch),
        (args.work / "vae-colours", "VAE, colours", args.vae_batch),
        (args.work / "denoiser", "text encoder and UNet", args.unet_batch),
    ):
        steps, seconds = spent(path)
        stages.append(f"| {what} | {steps:,} | {batch} | {seconds / 60:.0f} min |")
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    judged = judge.measure(Judge.load())
    return (
        (Path(__file__).parent / "model_readme.md")
        .read_text()
        .format(
            pixels=SIDE,
            parameters=", ".join(f"{name} {size:.2f} M" for name, size in sizes.items()),
            megabytes=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6,
            kinds=", ".join(KINDS),
            places=", ".join(world.PLACE_WORDS.values()),
            torch=torch.__version__,
            hardware=gpu or f"{os.cpu_count()} CPU cores",
            pictures=args.pictures,
            captions=world.CAPTIONS,
            stages="\n".join(stages),
            tables=measure.tables(folder, measure.GUIDANCE, args.pictures, args.each),
            judge="\n".join(f"| {name} | {value:.3f} |" for name, value in judged.items()),
        )
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiny.build", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of what is resumed from")
    parser.add_argument("--out", type=Path, default=tiny.path(), help="folder of the finished model")
    parser.add_argument("--pictures", type=int, default=world.PICTURES)
    parser.add_argument("--vae-steps", type=int, nargs=2, default=(5000, 4000), help="of its two stages")
    parser.add_argument("--vae-batch", type=int, default=16)
    parser.add_argument("--unet-steps", type=int, default=16000)
    parser.add_argument("--unet-batch", type=int, default=64)
    parser.add_argument("--each", type=int, default=10, help="measured pictures of a class in a place")
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    scenes = [world.scene(number) for number in range(args.pictures)]
    data, texts = drawn(args.work / "pictures.npy", scenes), world.captions(scenes)
    words = tokenizer(texts)
    autoencoder = fit_vae(args.work, data, scenes, args.vae_steps, args.vae_batch, device)
    latents = encoded(args.work, data, autoencoder, device)
    scale = 1.0 / (latents["mean"].var() + latents["std"].square().mean()).sqrt().item()
    autoencoder.register_to_config(scaling_factor=round(scale, 5))
    model = fit_denoiser(
        args.work, latents, round(scale, 5), words, texts, args.unet_steps, args.unet_batch, device
    )
    parts: Any = (autoencoder, model.text, words, model.unet, scheduler(), None, None)
    pipe: Any = StableDiffusionPipeline(*parts, requires_safety_checker=False)

    def fill(part: Path) -> None:
        pipe.to("cpu", torch.float16).save_pretrained(part)
        if args.each:
            files.write(part / "README.md", about(args, part, pipe, device))

    files.write_folder_atomically(args.out, fill)


if __name__ == "__main__":
    main()
