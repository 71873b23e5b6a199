"""How good the embedded base is, on prompts and seeds that its build never saw.

`python -m benchmarks.tiny.measure` prints the tables of `dbtrain/tiny/model/README.md`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from benchmarks.tiny.judge import labels
from dbtrain import tiny
from dbtrain.config import Model
from dbtrain.models.ddpm import DDPM
from dbtrain.sample.pipeline import AdapterPipeline
from dbtrain.tiny import world
from dbtrain.tiny.judge import Judge, as_tensor
from dbtrain.tiny.paint import KINDS, Scene, render

Table = dict[str, float]
STEPS = 25  # of the sampler
GUIDANCE = 3.0  # classifier-free
BATCH = 16


def through_the_vae(vae: Any, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1], encoded (the posterior's mean) and decoded."""
    with torch.no_grad():
        return vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)


def measure_vae(folder: Path, count: int = 256) -> Table:
    """What fresh renders lose on their way through the VAE."""
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32)
    judge = Judge.load()
    scenes = [world.scene(number, split="test") for number in range(count)]
    images = as_tensor([render(scene) for scene in scenes])
    seen = torch.cat([through_the_vae(vae, part) for part in images.split(32)])
    found, truth = judge(seen), labels(scenes)
    error = (seen - images).div(2).square().mean(dim=(1, 2, 3))
    table = {"PSNR, dB": (-10 * error.log10()).mean().item()}
    for name in truth:
        table[f"{name} still recognized"] = (found[name].argmax(1) == truth[name]).float().mean().item()
    likeness = []
    for name in world.SUBJECTS:
        fresh = as_tensor([render(world.subject_scene(name, number)) for number in range(100, 116)])
        pixels = through_the_vae(vae, fresh).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
        pictures = [Image.fromarray(picture) for picture in pixels]
        likeness.append(judge.likeness(pictures, world.photos(name)).mean())
    return table | {"likeness of subjects": torch.stack(likeness).mean().item()}


def unseen(pictures: int, count: int) -> list[tuple[str, Scene]]:
    """Captions of fresh scenes that the captions of the build's pictures do not contain."""
    seen = set(world.captions([world.scene(number) for number in range(pictures)]))
    found: list[tuple[str, Scene]] = []
    number = 0
    while len(found) < count:
        scene = world.scene(number, split="test")
        text = world.caption(scene, -1 - number)
        if text not in seen:
            found.append((text, scene))
        number += 1
    return found


def measure_pictures(folder: Path, guidance: float, pictures: int, each: int) -> Table:
    """How often the base draws what it is asked for: simple prompts, and captions it never saw."""
    base, judge = AdapterPipeline.load(Model(path=str(folder))), Judge.load()

    def drawn(texts: list[str], first_seed: int, what: str) -> list[Image.Image]:
        found = []
        for k in tqdm(range(0, len(texts), BATCH), what):
            some = texts[k : k + BATCH]
            seeds = range(first_seed + k, first_seed + k + len(some))
            found += base.generate(some, seeds, STEPS, guidance)
        return found

    asked = [(kind, place) for kind, place in product(KINDS, world.PLACES) for _ in range(each)]
    texts = [f"a photo of a {kind} {world.PLACE_WORDS[place]}" for kind, place in asked]
    read = judge.read(drawn(texts, 10_000, "class and place"))
    table = {
        "class": _share(a == b for (a, _), b in zip(asked, read.kinds, strict=True)),
        "place": _share(a == b for (_, a), b in zip(asked, read.places, strict=True)),
    }
    new = unseen(pictures, count=len(texts) // 2)
    read = judge.read(drawn([text for text, _ in new], 20_000, "unseen captions"))
    rows = [(text, scene, i) for i, (text, scene) in enumerate(new)]
    placed = [(scene, i) for text, scene, i in rows if world.PLACE_WORDS[scene.place] in text]
    coloured = [(scene, i) for text, scene, i in rows if f"{scene.upper.first} {scene.kind}" in text]
    patterned = [
        (scene, i) for text, scene, i in rows if f"{scene.upper.second} {scene.upper.pattern}" in text
    ]
    return table | {
        "class, unseen captions": _share(scene.kind == read.kinds[i] for _, scene, i in rows),
        "place, unseen captions": _share(scene.place == read.places[i] for scene, i in placed),
        "colour, unseen captions": _share(scene.upper.first == read.colours[i] for scene, i in coloured),
        "pattern, unseen captions": _share(scene.upper.pattern == read.patterns[i] for scene, i in patterned),
    }


def _share(hits: Iterable[bool]) -> float:
    values = list(hits)
    return sum(values) / len(values)


def tables(folder: Path, guidance: float, pictures: int, each: int) -> str:
    """Both tables, as markdown."""
    how = f"{STEPS} steps of {DDPM.SAMPLER}, guidance {guidance:g}"
    measured = {
        "New renders through the VAE": measure_vae(folder),
        f"Images that show what the prompt says ({how})": measure_pictures(folder, guidance, pictures, each),
    }
    lines = []
    for head, table in measured.items():
        lines += [f"| {head} | |", "|---|---|"]
        lines += [f"| {name} | {value:.3g} |" for name, value in table.items()] + [""]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiny.measure", description=__doc__)
    parser.add_argument("--model", type=Path, default=tiny.path())
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--pictures", type=int, default=world.PICTURES, help="pictures that the build saw")
    parser.add_argument("--each", type=int, default=10, help="pictures of each class in each place")
    args = parser.parse_args(arguments)
    print(tables(args.model, args.guidance, args.pictures, args.each))


if __name__ == "__main__":
    main()
