"""Shards: WebDataset tars of encoded images, a prompt table, and the manifest that vouches for them.

Each image is `<number>.safetensors` (what the family's `encode_images` gave) and `<number>.json`
(where it came from, which prompt it has); any WebDataset reader opens them. Files are named by
their content, so a new manifest never points into a file that an old one points to.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import webdataset as wds
from pydantic import BeforeValidator, ValidationError, field_validator
from safetensors import SafetensorError
from torch import Tensor

from dbtrain import files
from dbtrain.errors import ConfigError
from dbtrain.section import Names, Section

VERSION: Literal[1] = 1
MANIFEST = "manifest.json"
CURE = "rerun: dbtrain prepare"

Numbers = Annotated[tuple[int, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]

Floats = Annotated[tuple[float, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]


class Shard(Section):
    """One tar: its file, and the content key of each row."""

    file: str
    bytes: int
    sha256: str
    keys: Names


class Prompts(Section):
    """The prompt table: one file with ids and embeddings of every prompt, in the order of `texts`."""

    file: str
    sha256: str
    texts: Names


class Manifest(Section):
    """What a shard folder holds and what it was made of; written last, in one step."""

    version: Literal[1]
    family: str
    base: str
    components: dict[str, str]  # sha256 of the base's components that the content depends on
    request: dict[str, Any]  # the settings that asked for this content
    latent_shape: Numbers  # (C, H, W)
    latent_scale: Floats  # one, or one a channel
    latent_shift: Floats
    prompts: Prompts
    roles: dict[str, Annotated[tuple[Shard, ...], BeforeValidator(tuple)]]

    @field_validator("roles")
    @classmethod
    def _has_images(cls, roles: dict[str, tuple[Shard, ...]]) -> dict[str, tuple[Shard, ...]]:
        if not {"instance"} <= roles.keys() <= {"instance", "class"} or not all(roles.values()):
            raise ValueError("no images")
        return roles

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """The manifest of a shard folder.

        Raises ConfigError if there is none, or one that this version cannot read.
        """
        path = files.expand(folder) / MANIFEST
        if not path.is_file():
            raise ConfigError(f"data.shards is '{folder}', where there is no {MANIFEST}; {CURE}")
        try:
            return cls.model_validate_json(path.read_bytes(), strict=False)
        except ValidationError as error:
            raise ConfigError(f"{path} is damaged or of another version; {CURE}") from error

    def text(self) -> str:
        return self.model_dump_json(indent=1) + "\n"

    @property
    def shards(self) -> list[Shard]:
        """The shards of all roles."""
        return [shard for every in self.roles.values() for shard in every]

    def rows(self, role: str) -> tuple[int, ...]:
        """Rows of each shard of a role."""
        return tuple(len(shard.keys) for shard in self.roles[role])

    def check_files(self, folder: Path) -> None:
        """Raise ConfigError that lists every shard or table that is missing or of the wrong size."""
        problems = [
            problem for shard in self.shards if (problem := _size_problem(folder / shard.file, shard.bytes))
        ]
        if not (folder / self.prompts.file).is_file():
            problems.append(f"prompt table {folder / self.prompts.file} is missing; {CURE}")
        if problems:
            raise ConfigError(*problems)


@dataclass(frozen=True)
class Row:
    """One encoded image: the stored tensors, (C, H, W) each, and its description."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def pack(rows: list[Row]) -> bytes:
    """The bytes of a tar with these rows; the same rows give the same bytes."""
    buffer = io.BytesIO()
    with wds.TarWriter(buffer, mtime=0, user="", group="") as tar:
        for number, row in enumerate(rows):
            tar.write({
                "__key__": f"{number:06d}",
                "safetensors": safetensors.torch.save(row.tensors),
                "json": row.meta,
            })  # fmt: skip
    return buffer.getvalue()


def read(folder: Path, shard: Shard) -> list[Row]:
    """All rows of a shard, in order.

    Raises ConfigError if the file is missing, truncated or not the one the manifest vouches for.
    """
    path = folder / shard.file
    if problem := _size_problem(path, shard.bytes):
        raise ConfigError(problem)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        raise ConfigError(f"shard {path} was altered: its sha256 is not the manifest's; {CURE}")
    opened = [{"url": str(path), "stream": io.BytesIO(data)}]
    try:
        samples = list(wds.tariterators.group_by_keys(wds.tariterators.tar_file_expander(opened)))
        decoder = wds.autodecode.Decoder([wds.handle_extension("safetensors", safetensors.torch.load)])
        decoded = [decoder(sample) for sample in samples]
    except (tarfile.TarError, SafetensorError, ValueError) as error:
        raise ConfigError(f"shard {path} cannot be read: {error}; {CURE}") from error
    return [Row(dict(sorted(sample["safetensors"].items())), sample["json"]) for sample in decoded]


def read_prompts(folder: Path, prompts: Prompts) -> dict[str, Tensor]:
    """The prompt table: `condition.<name>` and `ids.<text encoder>`, one row a prompt."""
    path = folder / prompts.file
    if not path.is_file():
        raise ConfigError(f"prompt table {path} is missing; {CURE}")
    if files.sha256_of(path) != prompts.sha256:
        raise ConfigError(f"prompt table {path} was altered: its sha256 is not the manifest's; {CURE}")
    return safetensors.torch.load_file(path)


def _size_problem(path: Path, size: int) -> str | None:
    if not path.is_file():
        return f"shard {path} is missing; {CURE}"
    if path.stat().st_size != size:
        return f"shard {path} has {path.stat().st_size} bytes, not {size}: truncated or altered; {CURE}"
    return None
