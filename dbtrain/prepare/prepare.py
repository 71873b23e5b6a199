"""prepare: photos -> class images -> VAE moments and prompt table -> shards.

First a plan, a pure list of what the shards shall hold; then only what the folder lacks is done.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbtrain.config import Config, Prepare
from dbtrain.data import photos as images
from dbtrain.data import shards
from dbtrain.data.storage import Storage
from dbtrain.models.base import Base
from dbtrain.prepare import class_images, encode
from dbtrain.prepare.plan import Planned, plan_shards, request
from dbtrain.runtime import console, dist, files, lock, preemption
from dbtrain.runtime.errors import ConfigError

OURS = re.compile(
    r"(instance|class)(-held-out)?-\d{5}-[0-9a-f]{12}\.tar|prompts-[0-9a-f]{12}\.safetensors"
    r"|\.(manifest\.json|(instance|class|prompts)(-held-out)?-[0-9a-f-]+\.(tar|safetensors))\.\d+\.tmp"
)


@dataclass(frozen=True)
class Task:
    """What is asked for, of which base, and what is there already."""

    cfg: Config
    settings: Prepare
    base: Base
    folder: Path
    storage: Storage  # the same folder
    old: shards.Manifest | None


def prepare(cfg: Config) -> Path:
    """Make (or complete) the shards that `cfg` asks for, over all ranks; returns their folder.

    Does nothing, and says so, when they are there already. Raises ConfigError for what a user can fix.
    """
    if cfg.prepare is None:
        raise ConfigError("the config has no 'prepare' section; give prepare.photos and "
                          "prepare.instance_prompt")  # fmt: skip
    dist.init()
    base = Base.find(cfg.model)
    with dist.agreed():
        storage = Storage(cfg.data.shards)
        folder = storage.folder
        if folder is None:
            raise ConfigError(
                f"data.shards is '{cfg.data.shards}'; prepare writes to a folder on this machine, "
                "which can then be copied there"
            )
        base.family.space(base, cfg.prepare.resolution)  # raises now, not after all the encoding
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"data.shards is '{cfg.data.shards}', which is no folder")
        photos = images.of_subject(cfg.prepare)
    pictures = {"instance": photos}
    if cfg.prepare.class_prompt:
        pictures["class"] = class_images.ensure(base, cfg.prepare)

    with lock.held(folder, "data.shards"):
        return _fill(Task(cfg, cfg.prepare, base, folder, storage, _old_manifest(storage)), pictures)


def _fill(task: Task, pictures: dict[str, list[Path]]) -> Path:
    """Make what the folder lacks of the planned shards, and publish the manifest."""
    with dist.agreed():
        wanted = (task.base, task.settings, task.cfg.seed, pictures)
        answer = plan_shards(*wanted) if dist.is_main() else None
    texts, components, plans = dist.from_main(answer)
    planned = {role: [Planned(**shard) for shard in every] for role, every in plans.items()}
    everything = [plan for every in planned.values() for plan in every]
    with dist.agreed():
        good = _good_files(task, everything) if dist.is_main() else None
    good = dist.from_main(good)

    missing = [plan for plan in everything if plan.file not in good]
    with dist.agreed():
        made = _encode(task, missing[dist.rank() :: dist.world()])
    vouched = {name: entry for entries in dist.gather_json(made) for name, entry in entries.items()} | good
    with dist.agreed():
        if dist.is_main():
            _publish(task, _manifest(task, texts, components, planned, vouched))
    return task.folder


def _old_manifest(storage: Storage) -> shards.Manifest | None:
    """The manifest that is there, on every rank; None if there is none that can be used."""
    with dist.agreed():
        try:
            old = shards.Manifest.read(storage).text() if dist.is_main() else None
        except ConfigError:
            old = None  # missing or damaged: all is made anew, and said so at the end
    text = dist.from_main(old)
    return shards.Manifest.model_validate_json(text, strict=False) if text else None


def _good_files(task: Task, planned: list[Planned]) -> dict[str, dict[str, Any]]:
    """Planned shards that are on disk already, unharmed: file name -> manifest entry."""
    vouched = {shard.file: shard for shard in task.old.shards} if task.old else {}
    good = {}
    for plan in planned:
        path = task.folder / plan.file
        if not path.is_file():
            continue
        entry = _entry(plan, path.read_bytes())
        shard = vouched.get(plan.file) or shards.Shard(**entry)  # not vouched for: a killed prepare's
        try:
            if [row.meta for row in shards.read(task.storage, shard)] == plan.metas:
                good[plan.file] = entry
        except ConfigError as problem:
            console.say(f"{problem}: making it anew")
    return good


def _encode(task: Task, mine: list[Planned]) -> dict[str, dict[str, Any]]:
    """Write this rank's part of the missing shards; rows that an old shard holds are copied."""
    if not mine:
        return {}
    settings = task.settings
    encoder = encode.image_encoder(task.base, settings.vae_precision, settings.resolution)
    kept = _kept_rows(task, {meta["key"] for plan in mine for meta in plan.metas})
    encoded = 0
    made = {}
    with console.bar(sum(len(plan.metas) for plan in mine), "encode", "image", share=True) as bar:
        for plan in mine:
            rows = []
            for source, meta in zip(plan.sources, plan.metas, strict=True):
                preemption.check()
                tensors = kept.get(meta["key"])
                rows.append(shards.Row(tensors, meta) if tensors else encoder(source, meta))
                encoded += tensors is None and not source.endswith(class_images.SUFFIX)
                bar.update()
            data = shards.pack(rows)
            files.write_atomically(task.folder / plan.file, data)
            made[plan.file] = _entry(plan, data)
    console.say(f"encoded {encoded} images and kept {sum(len(p.metas) for p in mine) - encoded} "
            f"in {len(mine)} shards" + (" on rank 0" if dist.world() > 1 else ""))  # fmt: skip
    return made


def _kept_rows(task: Task, wanted: set[str]) -> dict[str, Any]:
    """Tensors of wanted rows that the old shards hold, by content key."""
    kept: dict[str, Any] = {}
    for shard in task.old.shards if task.old else ():
        if wanted & set(shard.keys):
            try:
                rows = shards.read(task.storage, shard)
            except ConfigError:
                continue  # harmed: `_good_files` or the encoder takes care of its rows
            kept |= {row.meta["key"]: row.tensors for row in rows if row.meta["key"] in wanted}
    return kept


def _entry(plan: Planned, data: bytes) -> dict[str, Any]:
    keys = [meta["key"] for meta in plan.metas]
    return {"file": plan.file, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "keys": keys}


def _manifest(
    task: Task,
    texts: list[str],
    components: dict[str, str],
    planned: dict[str, list[Planned]],
    vouched: dict[str, dict[str, Any]],
) -> shards.Manifest:
    old_prompts = task.old.prompts if task.old else None
    prompts = encode.prompt_table(task.base, texts, task.folder, old_prompts)
    space = task.base.family.space(task.base, task.settings.resolution)
    return shards.Manifest(
        version=shards.VERSION, family=task.base.family.name, base=task.base.name, components=components,
        request=request(task.settings, task.base.family), latent_shape=space.shape,
        latent_scale=space.scale, latent_shift=space.shift, prompts=prompts,
        roles={role: tuple(shards.Shard(**vouched[plan.file]) for plan in every)
               for role, every in planned.items()},
    )  # fmt: skip


def _publish(task: Task, manifest: shards.Manifest) -> None:
    """Put the manifest in place, then remove what it no longer mentions."""
    if task.old != manifest:
        files.write_atomically(task.folder / shards.MANIFEST, manifest.text())
    used = {shard.file for shard in manifest.shards} | {manifest.prompts.file}
    for path in task.folder.iterdir():  # replaced ones, and what a killed run left half-written
        if OURS.fullmatch(path.name) and path.name not in used:
            path.unlink()
    counts = ", ".join(f"{sum(manifest.rows(role))} {role} crops" for role in manifest.roles)
    if task.old == manifest:
        console.say(f"shards in {task.folder} are up to date ({counts}): nothing to do")
    else:
        console.say(
            f"shards in {task.folder}: {counts}, prompts: {', '.join(map(repr, manifest.prompts.texts))}"
        )
