"""prepare: photos -> class images -> VAE moments and prompt table -> shards.

It first plans what the shards will contain, then encodes only what the folder lacks.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbtrain.config import Config, Prepare
from dbtrain.data import photos, shards
from dbtrain.data.storage import Storage
from dbtrain.models.base import Base
from dbtrain.prepare import class_images, duration, encode, subjects
from dbtrain.prepare.plan import Planned, check_prompts, plan_shards, request, sources_of
from dbtrain.runtime import console, dist, files, lock, pace, preemption
from dbtrain.runtime.errors import ConfigError

OURS = re.compile(
    r"(instance|class)(-held-out)?-\d{5}-[0-9a-f]{12}\.tar|prompts-[0-9a-f]{12}\.safetensors"
    r"|\.(manifest\.json|(instance|class|prompts)(-held-out)?-[0-9a-f-]+\.(tar|safetensors))\.\d+\.tmp"
)


@dataclass(frozen=True)
class Task:
    """The request, the base model, and the existing shards."""

    cfg: Config
    settings: Prepare  # of the config; with several subjects, of the first
    base: Base
    folder: Path
    storage: Storage  # of the same folder
    old: shards.Manifest | None


def prepare(cfg: Config) -> Path:
    """Create or complete the shards for `cfg` on all ranks; return their folder.

    Does nothing if they are up to date. Raises ConfigError for anything a user can fix.
    """
    if cfg.prepare is None:
        raise ConfigError("there is no prepare section; set prepare.photos and prepare.instance_prompt")
    dist.init()
    of_role = subjects.parts(cfg)
    with dist.agreed():
        images = {"instance": [photos.of_subject(part.prepare) for part in of_role["instance"]]}
    base = Base.find(cfg.model)
    with dist.agreed():
        base.check_trains(cfg.adapter, cfg.model.training_adapter)
        storage = Storage(cfg.data.shards)
        folder = storage.folder
        if folder is None:
            raise ConfigError(
                f"data.shards is '{cfg.data.shards}', but prepare writes to a local folder only; "
                "set it to one, then copy the shards there"
            )
        base.family.space(base, cfg.prepare.resolution)  # fail now, not after encoding
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"data.shards: '{cfg.data.shards}' is not a directory")
        subjects.check_class_images(cfg)
    if classes := of_role["class"]:
        images["class"] = [class_images.ensure(base, part.prepare, cfg.train) for part in classes]

    with lock.held(folder, "data.shards"):
        _fill(Task(cfg, cfg.prepare, base, folder, storage, _old_manifest(storage)), images)
    duration.remember(cfg, "prepare")
    return folder


def _fill(task: Task, images: dict[str, list[list[Path]]]) -> None:
    """Encode the planned shards that the folder lacks, and publish the manifest."""
    # Rank 0 plans, and finds the shards that are already valid.
    with dist.agreed():
        plan = plan_shards(task.base, task.cfg, images) if dist.is_main() else None
        sources = sources_of(task.cfg) if dist.is_main() else {}  # before hours of encoding
    texts, components, plans = dist.from_main(plan)
    planned = {role: [Planned(**shard) for shard in every] for role, every in plans.items()}
    everything = [shard for every in planned.values() for shard in every]
    with dist.agreed():
        valid = _valid_shards(task, everything) if dist.is_main() else None
    entries = dist.from_main(valid)

    # All ranks encode the missing ones; rank 0 publishes.
    missing = [shard for shard in everything if shard.file not in entries]
    with dist.agreed():
        written = _encode(task, missing[dist.rank() :: dist.world()])
    for part in dist.gather_json(written):
        entries |= part
    with dist.agreed():
        if dist.is_main():
            _publish(task, _manifest(task, texts, components, planned, entries, sources))


def _old_manifest(storage: Storage) -> shards.Manifest | None:
    """The existing manifest, on every rank; None if it is missing or unreadable."""
    with dist.agreed():
        try:
            old = shards.Manifest.read(storage).text() if dist.is_main() else None
        except ConfigError:
            old = None  # everything is written again, and the log says so
    text = dist.from_main(old)
    return shards.Manifest.model_validate_json(text, strict=False) if text else None


def _valid_shards(task: Task, planned: list[Planned]) -> dict[str, dict[str, Any]]:
    """Manifest entries of the planned shards that exist undamaged, by file name."""
    known = {shard.file: shard for shard in task.old.shards} if task.old else {}
    valid = {}
    for plan in planned:
        path = task.folder / plan.file
        if not path.is_file():
            continue
        entry = _entry(plan, path.read_bytes())
        shard = known.get(plan.file) or shards.Shard(**entry)  # a killed prepare leaves shards, no manifest
        try:
            if [row.meta for row in _sound_rows(task, shard)] == plan.metas:
                valid[plan.file] = entry
        except ConfigError as problem:
            console.say(f"{problem}: writing it again")
    return valid


def _sound_rows(task: Task, shard: shards.Shard) -> list[shards.Row]:
    """The rows of an existing shard whose tensors are those of the family, of the right shape.

    Raises ConfigError if the shard cannot be read.
    """
    shape = task.base.family.space(task.base, task.settings.resolution).shape
    expected = dict.fromkeys(task.base.family.stored, shape)
    rows = shards.read(task.storage, shard)
    return [row for row in rows if {name: tuple(t.shape) for name, t in row.tensors.items()} == expected]


def _sound_prompts(task: Task) -> shards.Prompts | None:
    """The existing prompt table, if the base can read it."""
    if task.old is None:
        return None
    try:
        check_prompts(str(task.folder), task.base, shards.read_prompts(task.storage, task.old.prompts))
    except ConfigError:
        return None  # it is written again
    return task.old.prompts


def _encode(task: Task, mine: list[Planned]) -> dict[str, dict[str, Any]]:
    """Write this rank's missing shards and return their manifest entries; reuse rows of old shards."""
    if not mine:
        return {}
    settings = task.settings
    encoder = encode.image_encoder(task.base, settings.vae_precision, settings.resolution)
    old_rows = _reusable_rows(task, {meta["key"] for plan in mine for meta in plan.metas})
    encoded = 0
    entries = {}
    total = sum(len(plan.metas) for plan in mine)
    with console.bar(total, "encode", "image", share=True) as bar:
        for plan in mine:
            rows = []
            for source, meta in zip(plan.sources, plan.metas, strict=True):
                preemption.check()
                tensors, before = old_rows.get(meta["key"]), pace.clock()
                rows.append(shards.Row(tensors, meta) if tensors else encoder(source, meta))
                if tensors is None and not source.endswith(class_images.SUFFIX):
                    encoded += 1
                    pace.add("encode", pace.clock() - before)
                bar.update()
            data = shards.pack(rows, f"{plan.file.removesuffix('.tar')}-")
            files.write_atomically(task.folder / plan.file, data)
            entries[plan.file] = _entry(plan, data)
    where = " on rank 0" if dist.world() > 1 else ""
    console.say(f"encoded {encoded} images and reused {total - encoded} in {len(mine)} shards{where}")
    return entries


def _reusable_rows(task: Task, keys: set[str]) -> dict[str, Any]:
    """Tensors of the rows in the old shards that have one of these content keys, by key."""
    found: dict[str, Any] = {}
    for shard in task.old.shards if task.old else ():
        if keys & set(shard.keys):
            try:
                rows = _sound_rows(task, shard)
            except ConfigError:
                continue  # damaged: its rows are encoded again
            found |= {row.meta["key"]: row.tensors for row in rows if row.meta["key"] in keys}
    return found


def _entry(plan: Planned, data: bytes) -> dict[str, Any]:
    keys = [meta["key"] for meta in plan.metas]
    sha256 = hashlib.sha256(data).hexdigest()
    return {"file": plan.file, "bytes": len(data), "sha256": sha256, "keys": keys, "part": plan.part}


def _manifest(
    task: Task,
    texts: list[str],
    components: dict[str, str],
    planned: dict[str, list[Planned]],
    entries: dict[str, dict[str, Any]],
    sources: dict[str, dict[str, shards.Source]],
) -> shards.Manifest:
    prompts = encode.prompt_table(
        task.base, texts, task.folder, _sound_prompts(task), task.settings.memory_gib
    )
    space = task.base.family.space(task.base, task.settings.resolution)
    return shards.Manifest(
        version=shards.VERSION, family=task.base.family.name, base=task.base.name, components=components,
        request=request(task.cfg, task.base.family), latent_shape=space.shape,
        latent_scale=space.scale, latent_shift=space.shift, prompts=prompts, sources=sources,
        roles={role: tuple(shards.Shard(**entries[plan.file]) for plan in every)
               for role, every in planned.items()},
    )  # fmt: skip


def _publish(task: Task, manifest: shards.Manifest) -> None:
    """Write the manifest, then delete the files that it no longer refers to."""
    if task.old != manifest:
        files.write_atomically(task.folder / shards.MANIFEST, manifest.text())
    used = {shard.file for shard in manifest.shards} | {manifest.prompts.file}
    for path in task.folder.iterdir():  # replaced files, and partial files of a killed run
        if OURS.fullmatch(path.name) and path.name not in used:
            path.unlink()
    counts = ", ".join(f"{sum(manifest.rows(role))} {role} crops" for role in manifest.roles)
    if task.old == manifest:
        console.say(f"shards in {task.folder} are up to date ({counts}): nothing to do")
    else:
        console.say(
            f"shards in {task.folder}: {counts}, prompts: {', '.join(map(repr, manifest.prompts.texts))}"
        )
