"""The folders that a run writes to: permissions and free space."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from dbtrain.data.sizes import Size
from dbtrain.data.storage import Storage
from dbtrain.doctor.base_model import adapter_bytes, diff_bytes
from dbtrain.doctor.case import Case, Finding, error, ok
from dbtrain.prepare import class_images, images, own_images, subjects
from dbtrain.runtime import files
from dbtrain.runtime.errors import os_problem

SPARE = 100 << 20  # bytes for logs and images
PNG = 2.0  # bytes per pixel, 3 before compression
MOMENTS = 2  # AdamW keeps two, each as large as the adapter


def writing(case: Case) -> Iterator[Finding]:
    """Whether each folder can be written to: try an unnamed file in it or its nearest existing parent."""
    writable = []
    for what, folder in _folders(case):
        there = nearest(folder)
        try:
            with files.naming(there), tempfile.TemporaryFile(dir=there):
                writable.append(f"{what} {folder}")
        except OSError as problem:
            yield error(f"cannot write to {what} {folder}: {os_problem(problem)}",
                        f"use another {what}, or get write permission there")  # fmt: skip
    if writable:
        yield ok(", ".join(writable))


def _folders(case: Case) -> Iterator[tuple[str, Path]]:
    cfg = case.cfg
    yield "run_dir", files.expand(cfg.run_dir)
    shards = Storage(cfg.data.shards).folder
    if cfg.prepare and shards:
        yield "data.shards", shards
        if cfg.prepare.has_class_images:
            yield "prepare.class_dir", own_images.root(cfg.prepare)
    yield "cache", files.cache()


def nearest(folder: Path) -> Path:
    """The folder itself, or its nearest existing parent."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def disk(case: Case) -> Iterator[Finding]:
    """What the run will still write, against the free space of each file system."""
    by_device: dict[int, list[tuple[str, Path, float]]] = defaultdict(list)
    for what, folder, count in _needs(case):
        there = nearest(folder)
        by_device[there.stat().st_dev].append((what, there, count))
    for needs in by_device.values():
        total, free = sum(count for _, _, count in needs), shutil.disk_usage(needs[0][1]).free
        parts = ", ".join(f"{what} {files.size_text(count)}" for what, _, count in needs)
        text = f"{needs[0][1]}: {files.size_text(free)} free, about {files.size_text(total)} needed ({parts})"
        if total > free:
            yield error(
                text, "free some space, or use another disk (run_dir, data.shards, prepare.class_dir)"
            )
        else:
            yield ok(text)
    if not case.knows("base"):
        yield Finding("", "not counted: what depends on the model, which is unknown")


def _needs(case: Case) -> Iterator[tuple[str, Path, float]]:
    """(what, folder, bytes) of everything that a run adds."""
    cfg = case.cfg
    yield "logs and images", files.expand(cfg.run_dir), SPARE
    if not case.knows("base"):
        return
    adapter = adapter_bytes(case)
    # One checkpoint more than are kept, as a new one is written before an old one is removed.
    kept = cfg.train.keep + (cfg.train.stop == "best")
    checkpoints = (kept + 1) * (1 + MOMENTS) * adapter
    export = sum(diff_bytes(case) if form == "diff" else adapter for form in cfg.export.formats or ("",))
    yield f"{kept} checkpoints and the export", files.expand(cfg.run_dir), checkpoints + export
    prepare, shards = cfg.prepare, Storage(cfg.data.shards).folder
    if prepare is None or shards is None:
        return
    # Shards.
    latent = 4 * math.prod(case.base.family.space(case.base, Size.square(prepare.side)).shape)
    classes = subjects.parts(cfg)["class"]
    count = len(classes) * prepare.class_images
    if case.manifest is None:
        crops = len(case.photos) * prepare.variants * (1 + prepare.flip) if case.knows("photos") else 0
        # Pixel-space models store uint8 instead of fp32.
        row = len(case.base.family.stored) * latent if case.base.family.vae else latent / 4
        yield "shards", shards, (crops + count) * row
    # Class images.
    if case.base.family.enlarges == 1:
        missing, shares = 0, images.of_classes(case.base, cfg) if classes else {}
        for one in (part.prepare for part in classes):
            made = class_images.there(case.base, one, cfg.train.base_linears, shares)
            missing += one.class_images - len(own_images.find_own(one)) - made
        png = prepare.side**2 * PNG
        each = latent if class_images.as_latents(case.base.family, prepare) else png
        yield "class images", own_images.root(prepare), missing * each
