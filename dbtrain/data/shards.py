"""Shards: WebDataset tars of encoded images, a prompt table, and a manifest with their checksums.

Each image is `<number>.safetensors` (the output of the family's `encode_images`) and `<number>.json` (its
source and prompt), which any WebDataset reader can open. Files are named by their content, so two
manifests never share a file name for different content.
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import safetensors.torch
import webdataset as wds
from pydantic import BeforeValidator, Field, ValidationError, field_validator
from safetensors import SafetensorError
from torch import Tensor

from dbtrain.config.base import Names, Section, listed
from dbtrain.data.storage import Storage
from dbtrain.runtime.errors import ConfigError, reason

VERSION: Literal[2] = 2  # 1: the colors of photos were read as sRGB, whatever their profile
MANIFEST = "manifest.json"
CURE = "rerun: dbtrain prepare"
HELD_OUT = {"instance": "instance-held-out", "class": "class-held-out"}  # roles that are not trained on

Numbers = Annotated[tuple[int, ...], BeforeValidator(listed)]
Floats = Annotated[tuple[float, ...], BeforeValidator(listed)]
File = Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")]  # no path, so that it cannot leave the folder


class Shard(Section):
    """One tar and the content key of each of its rows."""

    file: File
    bytes: int
    sha256: str
    keys: Names


class Prompts(Section):
    """The prompt table: a file with token ids and embeddings of each prompt in `texts`, in order."""

    file: File
    sha256: str
    texts: Names


class Source(Section):
    """A file of the user's that an image comes from, and its caption if it has one."""

    sha256: str
    caption: str | None = None


class Manifest(Section):
    """The content of a shard folder and what it was made from. Written last, atomically."""

    version: Literal[2]
    family: str
    base: str
    components: dict[str, str]  # sha256 of each component of the base that the content depends on
    request: dict[str, Any]  # the settings that the content was made with
    latent_shape: Numbers  # (C, H, W)
    latent_scale: Floats  # one, or one per channel
    latent_shift: Floats
    prompts: Prompts
    sources: dict[str, dict[str, Source]] = Field(default={})  # by role and name; empty if unknown
    roles: dict[str, Annotated[tuple[Shard, ...], BeforeValidator(tuple)]]

    @field_validator("roles")
    @classmethod
    def _has_images(cls, roles: dict[str, tuple[Shard, ...]]) -> dict[str, tuple[Shard, ...]]:
        known = {*HELD_OUT, *HELD_OUT.values()}
        if not {"instance"} <= roles.keys() <= known or not all(roles.values()):
            raise ValueError("no images")
        return roles

    @classmethod
    def read(cls, storage: Storage) -> Manifest:
        """The manifest in a storage. Raises ConfigError if it is missing, damaged or of another version."""
        try:
            return cls.model_validate_json(storage.read(MANIFEST), strict=False)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise ConfigError(f"data.shards: '{storage.location}' has no {MANIFEST}; {CURE}") from error
        except ValidationError as error:
            raise ConfigError(
                f"{storage.where(MANIFEST)} is damaged or of another version; {CURE}"
            ) from error

    def text(self) -> str:
        return self.model_dump_json(indent=1) + "\n"

    @property
    def shards(self) -> list[Shard]:
        """The shards of all roles."""
        return [shard for every in self.roles.values() for shard in every]

    def rows(self, role: str) -> tuple[int, ...]:
        """The number of rows of each shard of a role."""
        return tuple(len(shard.keys) for shard in self.roles[role])

    def check_files(self, storage: Storage) -> None:
        """Raise a ConfigError that lists all files that are missing or have the wrong size.

        Remote files are checked when they are read.
        """
        problems = [problem for shard in self.shards if (problem := _size_problem(storage, shard))]
        if not storage.has(self.prompts.file):
            problems.append(f"prompt table {storage.where(self.prompts.file)} is missing; {CURE}")
        if problems:
            raise ConfigError(*problems)


@dataclass(frozen=True)
class Row:
    """An encoded image: the stored tensors, (C, H, W) each, and its description."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def pack(rows: list[Row], shard: str = "") -> bytes:
    """A tar of these rows, the same bytes for the same rows. Their keys begin with `shard`."""
    buffer = io.BytesIO()
    with wds.TarWriter(buffer, mtime=0, user="", group="") as tar:
        for number, row in enumerate(rows):
            tar.write({
                "__key__": f"{shard}{number:06d}",
                "safetensors": safetensors.torch.save(row.tensors),
                "json": row.meta,
            })  # fmt: skip
    return buffer.getvalue()


def read(storage: Storage, shard: Shard) -> list[Row]:
    """All rows of a shard, in order.

    Raises ConfigError if the file is missing, truncated or does not match the manifest. Decodes only the
    two kinds of members that `pack` writes; webdataset's own decoder would unpickle others.
    """
    if problem := _size_problem(storage, shard):
        raise ConfigError(problem)
    path = storage.where(shard.file)
    opened = [{"url": path, "stream": io.BytesIO(_checked(storage, "shard", shard.file, shard.sha256))}]
    try:
        samples = wds.tariterators.group_by_keys(wds.tariterators.tar_file_expander(opened))
        rows = [
            Row(
                dict(sorted(safetensors.torch.load(sample["safetensors"]).items())),
                json.loads(sample["json"]),
            )
            for sample in samples
        ]
    except (tarfile.TarError, SafetensorError, ValueError, LookupError) as error:
        raise ConfigError(f"shard {path} cannot be read: {reason(error)}; {CURE}") from error
    if [row.meta.get("key") for row in rows] != list(shard.keys):
        raise ConfigError(f"shard {path} does not match the rows in the manifest; {CURE}")
    return rows


def read_prompts(storage: Storage, prompts: Prompts) -> dict[str, Tensor]:
    """The prompt table: `condition.<name>` and `ids.<text encoder>`, one row per prompt."""
    return safetensors.torch.load(_checked(storage, "prompt table", prompts.file, prompts.sha256))


def _checked(storage: Storage, what: str, file: str, sha256: str) -> bytes:
    try:
        return storage.read(file, sha256)
    except FileNotFoundError as error:
        raise ConfigError(f"{what} {storage.where(file)} is missing; {CURE}") from error
    except ConfigError as problem:
        raise ConfigError(f"{what} {problem}; {CURE}") from problem


def _size_problem(storage: Storage, shard: Shard) -> str | None:
    if storage.folder is None:
        return None
    path = storage.folder / shard.file
    if not path.is_file():
        return f"shard {path} is missing; {CURE}"
    if (size := path.stat().st_size) != shard.bytes:
        return f"shard {path} has {size} bytes, not {shard.bytes}: truncated or altered; {CURE}"
    return None
