"""Where a run writes: whether it may, and whether that fits."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from dbtrain.data.storage import Storage
from dbtrain.doctor.base_model import adapter_bytes
from dbtrain.doctor.case import Case, Found, error, ok, size
from dbtrain.doctor.photos import generated
from dbtrain.prepare import class_images
from dbtrain.runtime import files
from dbtrain.runtime.errors import os_problem

SPARE = 100 << 20  # bytes
PNG = 2.0  # bytes a pixel, of 3 before compression
MOMENTS = 2  # of AdamW, each as large as the adapter


def writing(case: Case) -> Iterator[Found]:
    """Whether each folder can be written to, by a file without a name in the nearest one that is there."""
    found = False
    for what, folder in _folders(case):
        there = nearest(folder)
        try:
            if not there.is_dir():
                raise NotADirectoryError(20, "is a file, where a folder is to be made", str(there))
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as problem:
            found = True
            if problem.filename:  # the folder's, not that of the file that could not be made
                problem.filename = str(there)
            yield error(f"{what} {folder} cannot be written: {os_problem(problem)}",
                        f"give another {what}, or the right to write there")  # fmt: skip
    if not found:
        yield ok(", ".join(f"{what} {folder}" for what, folder in _folders(case)))


def _folders(case: Case) -> Iterator[tuple[str, Path]]:
    cfg = case.cfg
    yield "run_dir", files.expand(cfg.run_dir)
    place = Storage(cfg.data.shards).folder
    if cfg.prepare and place:
        yield "data.shards", place
        if cfg.prepare.class_prompt:
            yield "prepare.class_dir", class_images.root(cfg.prepare)
    yield "cache", files.cache()


def nearest(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def disk(case: Case) -> Iterator[Found]:
    """What is still to be written, against the room on each file system."""
    wanted: dict[int, list[tuple[str, Path, float]]] = defaultdict(list)
    for what, folder, count in _needs(case):
        there = nearest(folder)
        wanted[there.stat().st_dev].append((what, there, count))
    for needs in wanted.values():
        total, free = sum(count for _, _, count in needs), shutil.disk_usage(needs[0][1]).free
        parts = ", ".join(f"{what} {size(count)}" for what, _, count in needs)
        where = files.expand(needs[0][1])
        if total > free:
            yield error(f"{where}: {size(free)} are free, needed are about {size(total)} ({parts})",
                        "make room, or give folders on another disk (run_dir, data.shards, prepare.class_dir)"
                        )  # fmt: skip
        else:
            yield ok(f"{where}: {size(free)} are free, needed are about {size(total)} ({parts})")
    if not case.knows("base"):
        yield Found("", "besides what depends on the model, which is not known")


def _needs(case: Case) -> Iterator[tuple[str, Path, float]]:
    """(what, where, bytes) of what a run adds."""
    cfg = case.cfg
    yield "logs and pictures", files.expand(cfg.run_dir), SPARE
    if not case.knows("base"):
        return
    adapter = adapter_bytes(case)
    # One more than are kept: a new checkpoint is written before an old one is removed. And the export.
    checkpoints = (cfg.train.keep + 1) * (1 + MOMENTS) * adapter + adapter
    yield f"{cfg.train.keep} checkpoints and the export", files.expand(cfg.run_dir), checkpoints
    prepare, place = cfg.prepare, Storage(cfg.data.shards).folder
    if prepare is None or place is None:
        return
    latent = 4 * math.prod(case.base.family.space(case.base, prepare.resolution).shape)
    own = class_images.find_own(prepare) if prepare.class_prompt else []
    count = prepare.class_images if prepare.class_prompt else 0
    if case.manifest is None:
        crops = len(case.photos) * prepare.variants * (1 + prepare.flip) if case.knows("photos") else 0
        # Mean and spread of the VAE's posterior; of models of pixels a byte each instead of four.
        row = 2 * latent if case.base.family.vae else latent / 4
        yield "shards", place, (crops + count) * row
    if prepare.class_prompt and case.base.family.enlarges == 1:
        missing = count - len(own) - sum(path.exists() for path in generated(case, count - len(own)))
        pictures = prepare.resolution**2 * PNG
        each = latent if class_images.as_latents(case.base.family, prepare) else pictures
        yield "class images", class_images.root(prepare), missing * each
