"""Shards: WebDataset tars of encoded images, a prompt table, and a manifest with their checksums.

Each image is `<number>.safetensors` (the output of the family's `encode_images`) and `<number>.json` (its
source and prompt), which any WebDataset reader can open. Files are named by their content, so two
manifests never share a file name for different content.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
import webdataset as wds
from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator
from torch import Tensor

from dbtrain.config.base import Names, Natural, Positive, Repeats, Section, SizeText, T, listed
from dbtrain.data import tars
from dbtrain.data.description import Description
from dbtrain.data.emphasis import Emphasis
from dbtrain.data.sizes import Size
from dbtrain.data.storage import Storage
from dbtrain.runtime import files
from dbtrain.runtime.errors import ConfigError, reason

# 1: the colors of photos were read as sRGB, whatever their profile. 2: unless the profile was embedded.
VERSION: Literal[3] = 3
MANIFEST = "manifest.json"
CURE = "rerun: dbtrain prepare"
MASK = "mask"  # the tensor of rows that have one, (1, H, W) uint8: 255 is the subject
MOST_ROWS = 10**6  # that an epoch has of a shard
EMPTY = ""  # the prompt of rows that `data.prompt_dropout` chooses
HELD_OUT = {"instance": "instance-held-out", "class": "class-held-out"}  # roles that are not trained on

DTYPES = {torch.float32, torch.float16, torch.bfloat16, torch.uint8}  # of stored tensors
Numbers = Annotated[tuple[int, ...], BeforeValidator(listed)]
Floats = Annotated[tuple[float, ...], BeforeValidator(listed)]
EachRow = Annotated[tuple[T, ...], BeforeValidator(listed)]
File = Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")]  # no path, so that it cannot leave the folder

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Shard(Section):
    """One tar and the content key of each of its rows."""

    file: File
    bytes: Annotated[int, Field(ge=0, le=files.FILE_BYTES)]
    sha256: Sha256
    keys: Annotated[Names, Field(min_length=1)]
    part: Natural = Field(0, exclude_if=lambda part: not part)  # of several subjects or classes, which one
    size: SizeText | None = Field(None, exclude_if=lambda size: size is None)  # None: that of the manifest
    # Of each row: how often an epoch has it, and a factor of its loss; () if all are 1.
    repeats: EachRow[Repeats] = Field((), exclude_if=lambda each: not each)
    weights: EachRow[Positive] = Field((), exclude_if=lambda each: not each)

    @model_validator(mode="after")
    def _one_of_each_row(self) -> Shard:
        if not {len(self.repeats), len(self.weights)} <= {0, len(self.keys)}:
            raise ValueError("repeats or weights of other rows than keys")
        if sum(self.repeats) > MOST_ROWS:
            raise ValueError("repeats are too many")
        return self

    @property
    def epoch(self) -> int:
        """How many rows an epoch has of it."""
        return sum(self.repeats) or len(self.keys)

    def emphasis(self, row: int) -> Emphasis:
        """How often a row is seen, and how much its loss counts."""
        return Emphasis(self.repeats[row] if self.repeats else 1, self.weights[row] if self.weights else 1.0)


class Prompts(Section):
    """The prompt table: a file with token ids and embeddings of each prompt in `texts`, in order."""

    file: File
    sha256: Sha256
    texts: Names


class Original(Section):
    """A file of the user's that an image comes from, and its caption if it has one."""

    sha256: str
    caption: str | None = None
    mask: str | None = Field(None, exclude_if=lambda mask: mask is None)  # what it depends on
    repeats: int = Field(1, exclude_if=lambda count: count == 1)
    weight: float = Field(1.0, exclude_if=lambda weight: weight == 1)


class Manifest(Section):
    """The content of a shard folder and what it was made from. Written last, atomically."""

    version: Literal[3]
    family: str
    base: str
    components: dict[str, str]  # sha256 of each component of the base that the content depends on
    request: dict[str, Any]  # the settings that the content was made with
    latent_shape: Numbers  # (C, H, W), of the largest square
    latent_scale: Floats  # one, or one per channel
    latent_shift: Floats
    prompts: Prompts
    sources: dict[str, dict[str, Original]] = Field(default={})  # by role and name; empty if unknown
    roles: dict[str, Annotated[tuple[Shard, ...], BeforeValidator(tuple)]]

    @field_validator("roles")
    @classmethod
    def _has_images(cls, roles: dict[str, tuple[Shard, ...]]) -> dict[str, tuple[Shard, ...]]:
        known = {*HELD_OUT, *HELD_OUT.values()}
        if not {"instance"} <= roles.keys() <= known or not all(roles.values()):
            raise ValueError("no images")
        names = [shard.file for every in roles.values() for shard in every]
        if len(names) != len(set(names)):
            raise ValueError("a shard is listed twice")
        return roles

    @field_validator("request")
    @classmethod
    def _has_a_side(cls, request: dict[str, Any]) -> dict[str, Any]:
        if not all(type(side) is int for side in _resolutions(request)):
            raise ValueError("no resolution")
        return request

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

    @property
    def side(self) -> int:
        """The side length of the largest square, px."""
        return max(_resolutions(self.request))

    def size(self, shard: Shard) -> Size:
        """The size of a shard's images."""
        return Size.parse(shard.size) if shard.size else Size.square(self.side)

    def shape(self, size: Size) -> tuple[int, ...]:
        """The shape of images of this size as they are stored, (C, H, W)."""
        cell = self.side // self.latent_shape[-1]
        return self.latent_shape[0], size.height // cell, size.width // cell

    @property
    def has_masks(self) -> bool:
        """Whether the photos have masks."""
        return bool(self.request.get("mask"))

    @property
    def sizes(self) -> list[Size]:
        """The sizes of all images."""
        return list(dict.fromkeys(size for role in self.roles for size in self.sizes_of(role)))

    def sizes_of(self, role: str) -> list[Size]:
        """The sizes of the images of a role, the most frequent first."""
        counts: dict[Size, int] = {}
        for shard in self.roles[role]:
            size = self.size(shard)
            counts[size] = counts.get(size, 0) + len(shard.keys)
        return sorted(counts, key=lambda size: (-counts[size], size))

    def rows(self, role: str) -> tuple[int, ...]:
        """The number of rows of each shard of a role."""
        return tuple(len(shard.keys) for shard in self.roles[role])

    def class_prompts(self) -> tuple[int, ...]:
        """The index of each subject's class prompt in the table. Raises ConfigError if one is not there."""
        wanted = [one.get("class_prompt") for one in self.request.get("subjects", [self.request])]
        if missing := set(wanted) - set(self.prompts.texts):
            raise ConfigError(
                f"loss.prior is prediction, but the shards lack the class prompt {missing.pop()!r}; set "
                f"prepare.class_prompt, then {CURE}"
            )
        return tuple(map(self.prompts.texts.index, wanted))

    def check_files(self, storage: Storage) -> None:
        """Raise a ConfigError that lists all files that are missing or have the wrong size.

        Remote files are checked when they are read.
        """
        problems = [problem for shard in self.shards if (problem := _size_problem(storage, shard))]
        if not storage.has(self.prompts.file):
            problems.append(f"prompt table {storage.where(self.prompts.file)} is missing; {CURE}")
        if problems:
            raise ConfigError(*problems)


def _resolutions(request: Mapping[str, Any]) -> Sequence[Any]:
    """The resolutions in a manifest, whatever they are."""
    found = request.get("resolution")
    return found if isinstance(found, list) and found else [found]


@dataclass(frozen=True)
class Row:
    """An encoded image: the stored tensors, (C, H, W) each, and its description."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def with_mask(self) -> Row:
        """The row with a mask: if it has none, as class images, all of it is subject."""
        shape = (1, *next(iter(self.tensors.values())).shape[1:])
        return Row({MASK: torch.full(shape, 255, dtype=torch.uint8), **self.tensors}, self.meta)


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


def read(
    storage: Storage, shard: Shard, manifest: Manifest | None = None, stored: Collection[str] = ()
) -> list[Row]:
    """All rows of a shard, in order.

    With a manifest, they must be as it says: its latent shape, its prompts; `stored` are the names of the
    tensors that each must have. Raises ConfigError if the file is missing, truncated or does not match.
    """
    if problem := _size_problem(storage, shard):
        raise ConfigError(problem)
    path = storage.where(shard.file)
    data = checked(storage, "shard", shard.file, shard.sha256)
    try:
        rows = [
            Row(
                dict(sorted(safetensors.torch.load(tensors).items())), files.json_object(text, "a row's JSON")
            )
            for tensors, text in tars.members(data, len(shard.keys))
        ]
    except tars.BROKEN as error:
        raise ConfigError(f"shard {path} cannot be read: {reason(error)}; {CURE}") from error
    if [row.meta.get("key") for row in rows] != list(shard.keys):
        raise ConfigError(f"shard {path} does not match the rows in the manifest; {CURE}")
    if manifest:
        shape = manifest.shape(manifest.size(shard))
        for row in rows:
            if problem := _row_problem(row, manifest, shape, stored):
                raise ConfigError(f"shard {path}: row {row.meta['key'][:16]} has {problem}; {CURE}")
    return rows


def _row_problem(row: Row, manifest: Manifest, shape: tuple[int, ...], stored: Collection[str]) -> str | None:
    """What a row has that the manifest does not say; None if they match."""
    if stored and row.tensors.keys() - {MASK} != set(stored):
        return f"the tensors {', '.join(row.tensors)}, not {', '.join(stored)}"
    for name, tensor in row.tensors.items():
        wanted = (1, *shape[1:]) if name == MASK else shape
        if tuple(tensor.shape) != wanted or tensor.dtype not in DTYPES:
            return f"{name} of {tuple(tensor.shape)} {tensor.dtype}, not of {wanted}"
    try:
        described = Description.model_validate(row.meta)
    except ValidationError as error:
        return f"a description without a valid {error.errors()[0]['loc'][0]}"
    if (most := max(described.prompt, *described.prompts, 0)) >= (count := len(manifest.prompts.texts)):
        return f"prompt {most} of {count}"
    return None


def checked(storage: Storage, what: str, file: str, sha256: str) -> bytes:
    """The bytes of a file. Raises ConfigError unless they are those of this hash."""
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
