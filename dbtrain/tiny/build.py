"""How the embedded base model is made: `python -m dbtrain.tiny.build --work FOLDER`.

An ordinary Stable Diffusion in miniature, trained from scratch on the pictures of `world`: a
tokenizer learnt from the captions, then the VAE, then text encoder and UNet together. Seeded;
resumed by running the same command again; minutes on a GPU, hours on a CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from dbtrain import files, rng, tiny
from dbtrain.objectives import DDPM
from dbtrain.tiny import world
from dbtrain.tiny.fit import Stage, drawn
from dbtrain.tiny.paint import Scene
from dbtrain.tiny.parts import TOKENS, scheduler, text_encoder, tokenizer, unet, vae

CAPTIONS = 4  # captions of each picture, of which a step takes one
DROP = 0.1  # share of captions left empty: classifier-free guidance


def captions(scenes: list[Scene]) -> list[str]:
    """CAPTIONS captions of each scene, those of a scene side by side."""
    return [world.caption(scenes[k // CAPTIONS], k) for k in range(len(scenes) * CAPTIONS)]


def fit_vae(work: Path, data: np.ndarray, steps: int, batch: int, device: torch.device) -> Any:
    """The autoencoder: reconstruction of pixels and edges, and a slight pull towards N(0, 1)."""
    with rng.seeded("tiny", "vae"):
        model = vae().to(device)
    stage = Stage(work / "vae", model, steps, lr=1e-3, decay=0.998)

    def loss_of(step: int) -> Tensor:
        source = rng.generator("tiny", "vae", step)
        chosen = torch.randint(len(data), (batch,), generator=source).numpy()
        images = torch.from_numpy(data[np.sort(chosen)]).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior = model.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=source).to(device)
        seen = model.decode(posterior.mean + posterior.std * noise).sample
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        edges = sum(l1_loss(seen.diff(dim=d), images.diff(dim=d)) for d in (2, 3))
        return l1_loss(seen, images) + mse_loss(seen, images) + edges + 1e-4 * kl

    stage.fit(loss_of)
    return model.eval()


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
    objective = DDPM.of(dict(scheduler().config), min_snr_gamma=5.0).to(device)
    ids = words(
        texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    empty = words("", padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    mean, std, ids = latents["mean"].to(device), latents["std"].to(device), ids.to(device)
    stage = Stage(work / "denoiser", model, steps, lr=1e-3, decay=0.9995)

    def loss_of(step: int) -> Tensor:
        source = rng.generator("tiny", "denoiser", step)
        chosen = torch.randint(len(mean), (batch,), generator=source)
        which = torch.randint(CAPTIONS, (batch,), generator=source)
        u, drop = torch.rand(2, batch, generator=source)
        noise, posterior = torch.randn(2, batch, *mean.shape[1:], generator=source).to(device)
        rows = chosen.to(device)
        tokens = torch.where(
            (drop < DROP).to(device)[:, None], empty.to(device), ids[(chosen * CAPTIONS + which)]
        )
        x0 = (mean[rows] + std[rows] * posterior) * scale
        t = objective.timesteps(u.to(device))
        error = model(objective.corrupt(x0, noise, t), t, tokens) - objective.target(x0, noise, t)
        return (objective.weight(t) * error.square().flatten(1).mean(1)).mean()

    stage.fit(loss_of)
    return model.eval()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m dbtrain.tiny.build", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of what is resumed from")
    parser.add_argument("--out", type=Path, default=tiny.path(), help="folder of the finished model")
    parser.add_argument("--pictures", type=int, default=65_536)
    parser.add_argument("--vae-steps", type=int, default=6000)
    parser.add_argument("--vae-batch", type=int, default=32)
    parser.add_argument("--unet-steps", type=int, default=12000)
    parser.add_argument("--unet-batch", type=int, default=128)
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    scenes = [world.scene(number) for number in range(args.pictures)]
    data, texts = drawn(args.work / "pictures.npy", scenes), captions(scenes)
    words = tokenizer(texts)
    autoencoder = fit_vae(args.work, data, args.vae_steps, args.vae_batch, device)
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

    files.write_folder_atomically(args.out, fill)


if __name__ == "__main__":
    main()
