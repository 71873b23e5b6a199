"""The shards of one config: what they have to contain, what their folder already has, and its manifest."""

from __future__ import annotations

import hashlib
import re
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dbtrain.config import Config, Prepare
from dbtrain.data import prompt_table, shards
from dbtrain.data.sizes import Size, Sized
from dbtrain.data.storage import Storage
from dbtrain.models.base import Base
from dbtrain.prepare import encode, images, originals, subjects
from dbtrain.prepare.plan import Planned, check_prompts, plan_shards, request
from dbtrain.runtime import console, dist, files, hashing
from dbtrain.runtime.errors import ConfigError

OURS = re.compile(
    r"(instance|class)(-held-out)?-\d{5}-[0-9a-f]{12}\.tar|prompts-[0-9a-f]{12}\.safetensors"
    r"|\.(manifest\.json|(instance|class|prompts)(-held-out)?-[0-9a-f-]+\.(tar|safetensors))\.\d+\.tmp"
)


@dataclass
class Task:
    """What is known so far. From `planned` on, all but `missing` and `old` is known to rank 0 alone."""

    cfg: Config
    settings: Prepare  # of the config; with several subjects, of the first
    base: Base
    storage: Storage
    folder: Path  # the same
    photos: list[list[Path]]  # of each subject
    classes: list[list[Sized]] = field(default_factory=list)  # the images of each class
    old: shards.Manifest | None = None  # the existing one; on other ranks if something is missing
    planned: dict[str, list[Planned]] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    components: dict[str, str] = field(default_factory=dict)
    sources: dict[str, dict[str, shards.Original]] = field(default_factory=dict)
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)  # of shards that are there, by name
    prompts: shards.Prompts | None = None  # the table that is there
    missing: list[Planned] = field(default_factory=list)

    @classmethod
    def of(cls, cfg: Config, base: Base, photos: list[list[Path]]) -> Task:
        """Raises ConfigError for what would only be found after hours of work."""
        assert cfg.prepare
        base.check_trains(cfg.adapter, cfg.model.training_adapter)
        storage = Storage(cfg.data.shards)
        folder = storage.folder
        if folder is None:
            raise ConfigError(
                f"data.shards is '{cfg.data.shards}', but prepare writes to a local folder only; "
                "set it to one, then copy the shards there"
            )
        images.check_sizes(base, cfg.prepare)
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"data.shards: '{cfg.data.shards}' is not a directory")
        subjects.check_class_images(cfg)
        if dist.is_main() and not (folder / shards.MANIFEST).exists():
            folder.mkdir(parents=True, exist_ok=True)
            with files.naming(folder):
                tempfile.TemporaryFile(dir=folder).close()
        return cls(cfg, cfg.prepare, base, storage, folder, photos)

    def check_photos(self) -> None:
        """Read this rank's share of the photos, if class images may have to be generated before the shards.

        Raises ConfigError for those that cannot be encoded.
        """
        if self.settings.has_class_images and not (self.folder / shards.MANIFEST).exists():
            images.check_readable(self.cfg, self.photos)

    def plan(self) -> bool:
        """Plan on rank 0, and find what is there; return whether a shard or the prompt table is missing."""
        with dist.agreed():
            if dist.is_main():
                self._plan()
        old = self.old.text() if self.old and self.missing else None
        missing = [asdict(one) for one in self.missing]
        old, missing, complete = dist.from_main([old, missing, bool(self.prompts)])
        if not dist.is_main():
            self.old = shards.Manifest.model_validate_json(old, strict=False) if old else None
            self.missing = [Planned(**one) for one in missing]
        return bool(missing) or not complete

    def _plan(self) -> None:
        try:
            self.old = shards.Manifest.read(self.storage)
        except ConfigError:
            self.old = None  # everything is written again, and the log says so
        every = {"instance": [images.of_subject(self.base, self.settings, one) for one in self.photos]}
        if self.classes:
            every["class"] = self.classes
        self.texts, self.components, plans = plan_shards(self.base, self.cfg, every)
        self.planned = {role: [Planned(**shard) for shard in every] for role, every in plans.items()}
        self.sources = originals.files_of(self.cfg)  # before hours of encoding
        everything = [shard for every in self.planned.values() for shard in every]
        self.entries = self._valid_shards(everything)
        self.missing = [shard for shard in everything if shard.file not in self.entries]
        self.prompts = self._sound_prompts()

    def _valid_shards(self, planned: list[Planned]) -> dict[str, dict[str, Any]]:
        """Manifest entries of the planned shards that exist undamaged, by file name."""
        known = {shard.file: shard for shard in self.old.shards} if self.old else {}
        valid = {}
        for plan in planned:
            path = self.folder / plan.file
            if not path.is_file():
                continue
            entry = entry_of(plan, path.read_bytes())
            # A killed prepare leaves shards, but no manifest.
            shard = known.get(plan.file) or shards.Shard(**entry)
            try:
                if [row.meta for row in self._sound_rows(shard)] == plan.metas:
                    valid[plan.file] = entry
            except ConfigError as problem:
                console.say(f"{problem}: writing it again")
        return valid

    def _sound_rows(self, shard: shards.Shard) -> list[shards.Row]:
        """The rows of an existing shard whose tensors are those of the family, of the right shape.

        Raises ConfigError if the shard cannot be read.
        """
        shape = self.base.family.space(self.base, self.size_of(shard)).shape
        expected = dict.fromkeys(self.base.family.stored, shape)
        rows = shards.read(self.storage, shard)

        def is_sound(row: shards.Row) -> bool:
            mask = {shards.MASK: (1, *shape[1:])} if "mask" in row.meta else {}
            return {name: tuple(t.shape) for name, t in row.tensors.items()} == expected | mask

        return [row for row in rows if is_sound(row)]

    def size_of(self, shard: Planned | shards.Shard) -> Size:
        return Size.parse(shard.size) if shard.size else Size.square(self.settings.side)

    def _sound_prompts(self) -> shards.Prompts | None:
        """The existing prompt table, if it is of these prompts and the base can read it."""
        if self.old is None:
            return None
        there, path = self.old.prompts, self.folder / encode.table_name(self.base, self.texts)
        if there.file != path.name or not path.exists() or hashing.sha256_of(path) != there.sha256:
            return None
        try:
            check_prompts(str(self.folder), self.base, prompt_table.read(self.storage, there))
        except ConfigError:
            return None  # it is written again
        return there

    def reusable_rows(self, keys: set[str]) -> dict[str, Any]:
        """Tensors of the rows in the old shards that have one of these content keys, by key."""
        found: dict[str, Any] = {}
        for shard in self.old.shards if self.old else ():
            if keys & set(shard.keys):
                try:
                    rows = self._sound_rows(shard)
                except ConfigError:
                    continue  # damaged: its rows are encoded again
                found |= {row.meta["key"]: row.tensors for row in rows if row.meta["key"] in keys}
        return found

    def write_prompts(self, table: bytes) -> None:
        """Write the prompt table into the folder."""
        name = encode.table_name(self.base, self.texts)
        files.write_atomically(self.folder / name, table)
        sha256 = hashlib.sha256(table).hexdigest()
        self.prompts = shards.Prompts(file=name, sha256=sha256, texts=tuple(self.texts))

    def publish(self) -> bool:
        """Write the manifest of what is there now; return whether it changed.

        Then delete what neither it nor the one before refers to: a run may be reading those shards.
        """
        manifest = self._manifest()
        if changed := self.old != manifest:
            files.write_atomically(self.folder / shards.MANIFEST, manifest.text())
            used = _files_of(manifest) | (_files_of(self.old) if self.old else set())
            for path in self.folder.iterdir():  # older files, and partial files of a killed run
                if OURS.fullmatch(path.name) and path.name not in used:
                    path.unlink()
        self.old = manifest
        return changed

    def _manifest(self) -> shards.Manifest:
        assert self.prompts
        space = self.base.family.space(self.base, Size.square(self.settings.side))
        return shards.Manifest(
            version=shards.VERSION, family=self.base.family.name, base=self.base.name,
            components=self.components, request=request(self.cfg, self.base.family),
            latent_shape=space.shape, latent_scale=space.scale, latent_shift=space.shift,
            prompts=self.prompts, sources=self.sources,
            roles={role: tuple(shards.Shard(**self.entries[plan.file]) for plan in every)
                   for role, every in self.planned.items()},
        )  # fmt: skip

    def counts(self) -> str:
        """A phrase for the crops in the manifest."""
        assert self.old
        found = []
        for role, every in self.old.roles.items():
            rows, epoch = sum(self.old.rows(role)), sum(shard.epoch for shard in every)
            found.append(f"{rows} {role} crops" + (f", {epoch} in an epoch" if epoch != rows else ""))
        return ", ".join(found)


def _files_of(manifest: shards.Manifest) -> set[str]:
    return {shard.file for shard in manifest.shards} | {manifest.prompts.file}


def entry_of(plan: Planned, data: bytes) -> dict[str, Any]:
    """What the manifest says of a shard."""
    keys = [meta["key"] for meta in plan.metas]
    sha256 = hashlib.sha256(data).hexdigest()
    about = {"part": plan.part, "size": plan.size, "repeats": plan.repeats, "weights": plan.weights}
    return {"file": plan.file, "bytes": len(data), "sha256": sha256, "keys": keys, **about}
