"""The photos and the class images: their number and quality."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from dbtrain.config import Prepare
from dbtrain.data import masks, sizes
from dbtrain.data import photos as images
from dbtrain.data.captions import file_of
from dbtrain.data.photo_files import is_left_out, listing, name_in, subfolders
from dbtrain.data.photo_quality import LEFT_OUT, MISSED, SHARP, PhotoQuality, alike, quality_of
from dbtrain.data.sizes import Size
from dbtrain.data.sources import Source, folder_of
from dbtrain.doctor.case import Case, Finding, findings_of, listed, ok, problems_of, warning
from dbtrain.models import sampler
from dbtrain.prepare import class_images, own_images, subjects
from dbtrain.prepare.images import left, of_classes
from dbtrain.runtime import hashing
from dbtrain.runtime.errors import ConfigError

SYSTEM = ("Thumbs.db", "desktop.ini")  # files of file managers
SOME = 0.001  # least share of a photo that is subject, or that is not
FEW, MANY = 3, 50  # photos: Ruiz et al. 2022 use 3 to 5, guides up to a few dozen
# Limits of prepare.augment above which there is a warning.
STRONG = {"rotate": 15.0, "hue": 10.0, "brightness": 0.3, "contrast": 0.3, "saturation": 0.3}


def photos(case: Case) -> Iterator[Finding]:
    """Open and measure every photo, and compare it with the others."""
    cfg = case.cfg.prepare
    if cfg is None:
        yield ok("no prepare section: no photos to check")
        return
    try:
        source = Source.of(cfg.photos)
        if source and source.is_remote and not source.folder().is_dir():
            yield Finding("skipped", f"not checked: prepare will fetch {cfg.photos}")
            return
        if source:
            source.ensure()
        if (folder := folder_of(cfg.photos)).is_dir():
            yield from _unused(folder, cfg)
        paths = images.of_subject(cfg)
    except ConfigError as problem:
        yield from findings_of(problem, "put photos of the subject into that folder")
        return
    # Open all photos, and keep those that can be read.
    told: list[str] = []
    with ThreadPoolExecutor(_workers(paths)) as pool:
        opened = list(pool.map(partial(_open, told=told.append), paths))
    for one in opened:
        if isinstance(one, ConfigError):
            yield from findings_of(one, "replace or remove it")
    yield from (warning(line, "export it again, with the profile sRGB") for line in sorted(told))
    mine = [(path, one) for path, one in zip(paths, opened, strict=True) if isinstance(one, PhotoQuality)]
    case.photos = [*vars(case).get("photos", ()), *mine]
    # Number and quality.
    yield from _count(len(paths))
    yield from _quality(mine, cfg)
    yield from _augmented(cfg)
    yield from _shapes(case, mine, cfg)
    yield from _masks([path for path, _ in mine], cfg)
    sides = [min(one.height, one.width) for _, one in mine]
    shortest = f", short sides {min(sides)} to {max(sides)} px" if sides else ""
    yield ok(f"{len(mine)} of {len(paths)} in {cfg.photos} can be read{shortest}")


def _unused(folder: Path, cfg: Prepare) -> Iterator[Finding]:
    """Files and folders beside the photos that are not read."""
    found, name = listing(folder, cfg.subfolders), partial(name_in, folder)
    seen = [path for path in found.others if not path.name.startswith(".") and path.name not in SYSTEM]
    captions = {file_of(photo) for photo in found.photos}
    texts = [name(path) for path in seen if path in captions]
    others = [name(path) for path in seen if path not in captions]
    if texts and not cfg.captions:
        yield warning(f"captions are not read: {listed(texts)}", "use prepare.captions=true, or remove them")
    if others:
        yield warning(f"skipped, neither photos nor their captions: {listed(others)}",
                      "export photos among them as JPEG or PNG, or remove them")  # fmt: skip
    if found.masks and not cfg.mask:
        yield warning(f"masks are not read: {listed([*map(name, found.masks)])}",
                      "use prepare.mask=true, or remove them")  # fmt: skip
    for inner, count in subfolders(folder).items() if found.photos else ():
        left_out = is_left_out(inner)
        if (cfg.mask and inner.name == masks.FOLDER) or (cfg.subfolders and not left_out):
            continue
        if inner.resolve() != own_images.root(cfg).resolve():
            yield warning(
                f"the folder '{inner.name}' with {count} photos is not read",
                "rename it, or remove it" if left_out else
                "use prepare.subfolders=true, move them up, or remove it",
            )  # fmt: skip


def _shapes(case: Case, photos: list[tuple[Path, PhotoQuality]], cfg: Prepare) -> Iterator[Finding]:
    """The sizes at which photos are stored, if they are not all squares of one resolution."""
    if not (case.knows("base") and (cfg.buckets or len(cfg.resolutions) > 1)):
        return
    grids, counts, least = case.base.family.grids(case.base), Counter[Size](), 1.0
    for _, one in photos:
        for size in sizes.for_photo(one.height, one.width, cfg, grids):
            counts[size] += 1
            least = min(least, sizes.kept(one.height, one.width, size))
    yield ok(f"stored at {listed([f'{size} ({count})' for size, count in counts.most_common()], 8)}: "
             f"{least:.0%} of each photo or more is kept")  # fmt: skip


def _masks(paths: list[Path], cfg: Prepare) -> Iterator[Finding]:
    """How much of the photos is subject, and photos whose mask is missing, or shows nothing."""
    shares: dict[str, float] = {}
    names = images.named(cfg, paths)
    for path in paths if cfg.mask else ():
        if cfg.mask == "auto" and not masks.is_there(path):
            continue  # prepare makes it
        try:
            shares[names[path]] = float(np.asarray(masks.load(path)).mean()) / 255
        except ConfigError as problem:
            yield from findings_of(problem)
    empty = [name for name, share in shares.items() if share < SOME]
    if empty:
        yield warning(f"masks that are black: {listed(empty)}", "paint the subject white")
    if full := [name for name, share in shares.items() if share > 1 - SOME]:
        yield warning(f"masks that are white all over: {listed(full)}", "paint what is not the subject black")
    if cfg.mask == "auto" and (count := len(paths) - len(shares)):
        yield ok(f"{count} masks to make, in the folder '{masks.FOLDER}' beside the photos")
    if shares:
        yield ok(f"masks over {min(shares.values()):.0%} to {max(shares.values()):.0%} of the photos")


def _workers(paths: list[Path]) -> int:
    """How many photos to open at a time: one, if each of them is as large as a photo may be."""
    largest = 1
    for path in paths:
        with suppress(ConfigError):  # it is reported when the photo is opened
            largest = max(largest, math.prod(images.size(path)))
    return max(1, min(8, os.cpu_count() or 1, images.MOST_PIXELS // largest))


def _open(path: Path, told: Callable[[str], object]) -> PhotoQuality | ConfigError:
    try:
        images.size(path)  # raises for what is too thin to crop
        return quality_of(images.load(path, told))
    except ConfigError as problem:
        return problem


def _count(count: int) -> Iterator[Finding]:
    if count < FEW:
        yield warning(
            f"{count} photos are few: the background may be learned with the subject", f"use {FEW} to 10"
        )
    elif count > MANY:
        yield warning(
            f"{count} photos are more than a subject needs, and a bad one goes unnoticed", "keep the best"
        )


def _quality(photos: list[tuple[Path, PhotoQuality]], cfg: Prepare) -> Iterator[Finding]:
    """Photos that are small, blurred, there twice, or badly cropped."""
    # Each photo by itself.
    called = images.named(cfg, [path for path, _ in photos])
    small = [f"{called[p]} ({one.width} x {one.height})" for p, one in photos
             if min(one.height, one.width) < cfg.resolutions[0]]  # fmt: skip
    blurred = [f"{called[p]} ({one.sharpness:.0f})" for p, one in photos if one.sharpness < SHARP]
    # Pairs of photos.
    hashes = [hashing.sha256_of(path) for path, _ in photos]
    pairs = alike([one for _, one in photos])
    order = list(called.values())
    same = [f"{order[a]} = {order[b]}" for a, b in pairs if hashes[a] == hashes[b]]
    near = [f"{order[a]} ~ {order[b]}" for a, b in pairs if hashes[a] != hashes[b]]
    # One warning for each problem.
    for names, problem, cure in (
        (small, f"smaller than prepare.resolution ({cfg.resolutions[0]} px), so they are upscaled",
         "use larger photos, or a smaller prepare.resolution"),
        (blurred, f"blurred (sharpness below {SHARP:.0f})", "replace or remove them"),
        (same, "duplicate files, trained on twice as often", "keep one of each"),
        (near, "near duplicates", "keep one of each; other views teach more"),
        (_cut_off(photos, cfg), "the center crop cuts off a lot",
         "keep whole photos with prepare.buckets=true; or check that the subject is in the center"),
    ):  # fmt: skip
        if names:
            yield warning(f"{problem}: {listed(names)}", cure)


def _augmented(cfg: Prepare) -> Iterator[Finding]:
    """Whether variants differ so much from their photos that the subject would not be itself."""
    limits = cfg.augment.model_dump() if cfg.augment else {}
    strong = [f"{name} {limit:g}" for name, limit in limits.items() if limit > STRONG[name]]
    if strong:
        usual = ", ".join(f"{name} {limit:g}" for name, limit in STRONG.items())
        yield warning(f"prepare.augment is strong: {', '.join(strong)}; the adapter learns that too",
                      f"use at most {usual}")  # fmt: skip
    if cfg.augment and cfg.variants == 1:
        yield warning("prepare.augment makes one variant of each photo, as prepare.variants is 1",
                      "use prepare.variants=8")  # fmt: skip


def _cut_off(photos: list[tuple[Path, PhotoQuality]], cfg: Prepare) -> list[str]:
    """Photos whose center crop cuts off a lot, or has less detail than another square."""
    cut: list[str] = []
    names = images.named(cfg, [path for path, _ in photos])
    for path, one in photos if cfg.crop == "center" and not cfg.buckets else ():
        if one.missed < MISSED and one.left_out < LEFT_OUT:
            continue
        tall, wide = images.resized(one.height, one.width, Size.square(cfg.side))
        top, left = round((tall - cfg.side) / 2), round((wide - cfg.side) / 2)
        ends = ("left", "right") if wide > tall else ("top", "bottom")
        text = f"{names[path]} (at {left},{top} of {wide} x {tall} px; {one.left_out:.0%} is cut off"
        if one.missed >= MISSED:
            text += f", a square closer to the {ends[one.best > 0.5]} has {one.missed:.0%} more of the edges"
        cut.append(text + ")")
    return cut


def of_class(case: Case) -> Iterator[Finding]:
    """How many class images there are, and how many have to be generated."""
    classes = subjects.parts(case.cfg)["class"]
    if not classes:
        prompt = case.cfg.prepare and case.cfg.prepare.class_prompt
        why = f"none needed: loss.prior is {case.cfg.loss.prior}"
        yield ok(why if prompt else "no prepare.class_prompt: no prior preservation")
        return
    subjects.check_class_images(case.cfg)
    for part in classes:
        about = f"'{part.prepare.class_prompt}': " if len(classes) > 1 else ""
        yield from (replace(found, what=f"{about}{found.what}") for found in _of_class(case, part.prepare))


def _of_class(case: Case, cfg: Prepare) -> Iterator[Finding]:
    own = own_images.find_own(cfg)
    yield from findings_of(ConfigError(*own_images.unused(cfg)), level="warning")
    for path in own:
        yield from problems_of(lambda path=path: images.size(path), "replace or remove it")  # type: ignore[misc]
    count = cfg.class_images - len(own)
    if count and (found := problems_of(lambda: class_images.check_draws(case.base, cfg, len(own)), "")):
        yield from found
        return
    left(cfg, "class", cfg.class_images)
    kept = class_images.there(case.base, cfg, case.cfg.train.base_linears, of_classes(case.base, case.cfg))
    yield ok(f"{cfg.class_images}: {len(own)} of your own, {kept} already generated, "
             f"{count - kept} to generate, in {own_images.root(cfg)}")  # fmt: skip


def generated_images(case: Case) -> Iterator[Finding]:
    """How many images are generated during and after training."""
    cfg = case.cfg
    validations = 1 + -(-cfg.train.steps // cfg.validation.every) if cfg.validation.prompts else 0
    count = validations * len(cfg.validation.prompts) * cfg.validation.images
    after = 2 * len(cfg.sample.prompts) * cfg.sample.images
    if count + after:
        side = Size.square(cfg.prepare.side) if cfg.prepare else None
        sampler.small_pictures(cfg.sample.low_res, case.base.family, side)
        yield ok(
            f"{count} in {validations} validations, {after} after training; {cfg.sample.steps} steps each"
        )
    else:
        yield ok("none; set validation.prompts to see whether it learns")
