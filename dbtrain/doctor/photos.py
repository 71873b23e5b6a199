"""The photos, their captions and the class images: what shows in them, and how much is trained on them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dbtrain.config import Prepare
from dbtrain.data import photos as images
from dbtrain.data.photo_quality import LEFT_OUT, MISSED, SHARP, PhotoQuality, alike, quality_of
from dbtrain.doctor.case import Case, Found, listed, ok, refused, ruled, warning
from dbtrain.models import sampler
from dbtrain.prepare import class_images, plan
from dbtrain.runtime import hashing
from dbtrain.runtime.errors import ConfigError

FEW, MANY = 3, 50  # photos: Ruiz et al. 2022 use 3 to 5, the field's guides up to some dozens
SEEN = (20, 2000)  # how often each photo is trained on: guides say 80 to 1000 times


def photos(case: Case) -> Iterator[Found]:
    """Every photo opened, measured, and compared with the others."""
    cfg = case.cfg.prepare
    if cfg is None:
        yield ok("no prepare section: none are read")
        return
    try:
        paths = images.of_subject(cfg)
    except ConfigError as problem:
        yield from refused(
            problem, f"put photos of the subject ({', '.join(images.SUFFIXES)}) into that folder"
        )
        return
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        opened = list(pool.map(_open, paths))
    for one in opened:
        if isinstance(one, ConfigError):
            yield from refused(one, "replace or remove it")
    case.photos = [
        (path, one) for path, one in zip(paths, opened, strict=True) if isinstance(one, PhotoQuality)
    ]
    if cfg.captions:
        for path in paths:
            yield from ruled(lambda path=path: images.caption(path),  # type: ignore[misc]
                             f"write {path.with_suffix('.txt').name} beside it")  # fmt: skip
    yield from _count(len(paths))
    yield from _single(case.photos, cfg)
    yield from _twins(case.photos)
    yield from _crops(case.photos, cfg)
    sides = [min(one.height, one.width) for _, one in case.photos]
    shortest = f", short sides {min(sides)} to {max(sides)} px" if sides else ""
    yield ok(f"{len(case.photos)} of {len(paths)} in {cfg.photos} can be read{shortest}")


def _open(path: Path) -> PhotoQuality | ConfigError:
    try:
        images.size(path)  # refuses what is too thin to crop
        return quality_of(images.load(path))
    except ConfigError as problem:
        return problem


def _count(count: int) -> Iterator[Found]:
    if count < FEW:
        yield warning(
            f"{count} photos are few: the subject is learnt with its background", f"take {FEW} to 10"
        )
    elif count > MANY:
        yield warning(
            f"{count} photos are more than a subject needs; one odd one goes unnoticed", "keep the best"
        )


def _single(looks: list[tuple[Path, PhotoQuality]], cfg: Prepare) -> Iterator[Found]:
    """Photos that are too small or blurred."""
    small = [f"{p.name} ({one.width} x {one.height})" for p, one in looks
             if min(one.height, one.width) < cfg.resolution]  # fmt: skip
    if small:
        yield warning(
            f"smaller than prepare.resolution ({cfg.resolution} px), and so enlarged: {listed(small)}",
            "use larger photos, or a smaller prepare.resolution",
        )
    blurred = [f"{p.name} ({one.sharpness:.0f})" for p, one in looks if one.sharpness < SHARP]
    if blurred:
        yield warning(
            f"blurred (sharpness below {SHARP:.0f}): {listed(blurred)}", "replace or remove what is not sharp"
        )


def _twins(looks: list[tuple[Path, PhotoQuality]]) -> Iterator[Found]:
    """Photos that stand there twice: those count double in training."""
    hashes = [hashing.sha256_of(path) for path, _ in looks]
    pairs = alike([one for _, one in looks])
    same = [f"{looks[a][0].name} = {looks[b][0].name}" for a, b in pairs if hashes[a] == hashes[b]]
    near = [f"{looks[a][0].name} ~ {looks[b][0].name}" for a, b in pairs if hashes[a] != hashes[b]]
    if same:
        yield warning(
            f"the same file twice, and so trained on twice as often: {listed(same)}", "remove one of them"
        )
    if near:
        yield warning(f"nearly the same picture: {listed(near)}", "keep one of them; other views teach more")


def _crops(looks: list[tuple[Path, PhotoQuality]], cfg: Prepare) -> Iterator[Found]:
    """Photos whose centre square leaves out much, or holds less of the details than another square."""
    if cfg.crop != "center":
        return
    cut = []
    for path, one in looks:
        if one.missed < MISSED and one.left_out < LEFT_OUT:
            continue
        tall, wide = images.resized(one.height, one.width, cfg.resolution)
        top, left = round((tall - cfg.resolution) / 2), round((wide - cfg.resolution) / 2)
        ends = ("left", "right") if wide > tall else ("top", "bottom")
        text = f"{path.name} (from {left},{top} px of {wide} x {tall}; {one.left_out:.0%} of it is left out"
        if one.missed >= MISSED:
            text += f", a square nearer its {ends[one.best > 0.5]} has {one.missed:.0%} more of its edges"
        cut.append(text + ")")
    if cut:
        yield warning(
            f"the centre crop cuts off much: {listed(cut)}",
            "see that the subject is in the middle: crop these by hand, or use prepare.crop: random",
        )


def passes(case: Case) -> Iterator[Found]:
    """How often each photo is trained on."""
    cfg, count = case.cfg, len(case.photos)
    if not count:
        yield Found("skipped", "not checked: no photo can be read")
        return
    if cfg.prepare:
        count = plan.left(cfg.prepare, "instance", count)
    each = cfg.train.steps * cfg.train.global_batch / count
    text = (
        f"{cfg.train.steps} steps of {cfg.train.global_batch} images: each of {count} photos {each:.3g} times"
    )
    low, high = SEEN
    if low <= each <= high:
        yield ok(text)
        return
    steps = max(1, round(100 * count / cfg.train.global_batch))
    effect = "too seldom to learn it" if each < low else "which overfits"
    yield warning(f"{text}, {effect}; usual are {low} to {high}", f"start from train.steps={steps}")


def of_class(case: Case) -> Iterator[Found]:
    """How many class images there are, and how many are to be drawn."""
    cfg = case.cfg.prepare
    if cfg is None or not cfg.class_prompt:
        yield ok("none asked for: no prior preservation")
        return
    own = class_images.find_own(cfg)
    for path in own:
        yield from ruled(lambda path=path: images.size(path), "replace or remove it")  # type: ignore[misc]
    count = cfg.class_images - len(own)
    if count and (found := ruled(lambda: class_images.check_draws(case.base, cfg, len(own)), "")):
        yield from found
        return
    plan.left(cfg, "class", cfg.class_images)
    kept = sum(path.exists() for path in generated(case, count))
    yield ok(f"{cfg.class_images}: {len(own)} of yours, {kept} kept, {count - kept} to generate, "
             f"in {class_images.root(cfg)}")  # fmt: skip


def drawn(case: Case) -> Iterator[Found]:
    """What is drawn while it trains, and of its result."""
    cfg = case.cfg
    looks = 1 + -(-cfg.train.steps // cfg.validation.every) if cfg.validation.prompts else 0
    count = looks * len(cfg.validation.prompts) * cfg.validation.images
    at_the_end = 2 * len(cfg.sample.prompts) * cfg.sample.images
    if count + at_the_end:
        side = cfg.prepare.resolution if cfg.prepare else None
        sampler.small_pictures(cfg.sample.low_res, case.base.family, side)
        yield ok(f"{count} in {looks} validations, {at_the_end} at the end, of {cfg.sample.steps} steps each")
    else:
        yield ok("none: validation.prompts would show whether it learns")


def generated(case: Case, count: int) -> list[Path]:
    """Where generated class images are, if any of this prompt are there: else the base need not be hashed."""
    cfg = case.cfg.prepare
    assert cfg is not None
    if not count:
        return []
    place = class_images.places(case.base.family, cfg, {}, 1)[0].parent
    if not any(place.parent.glob(f"{place.name.rpartition('-')[0]}-*")):
        return []
    about = class_images.about_of(case.base, cfg)
    return class_images.places(case.base.family, cfg, about, count)
