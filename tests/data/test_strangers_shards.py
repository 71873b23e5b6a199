"""Shards from a stranger: whatever a tar, a table or a manifest says, one line and bounded memory."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from dbtrain.config import Config
from dbtrain.data import shards
from dbtrain.data.shards import Manifest
from dbtrain.train import setup
from dbtrain.train.inputs import Inputs
from tests.conftest import Make, at, dbtrain
from tests.hostile import CANARY, Refused

Harm = Callable[[Path], object]
GIB = 2**30


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def rewrite(folder: Path, values: dict[str, Any]) -> None:
    (folder / "manifest.json").write_text(json.dumps(values))


def first(folder: Path) -> Path:
    return folder / manifest(folder)["roles"]["instance"][0]["file"]


def replace(folder: Path, data: bytes) -> None:
    """Put other bytes in the first shard, and their size and hash in the manifest, as a stranger would."""
    values = manifest(folder)
    shard = values["roles"]["instance"][0]
    (folder / shard["file"]).write_bytes(data)
    shard |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite(folder, values)


def changed(folder: Path, change: Callable[[shards.Row], shards.Row]) -> None:
    shard = Manifest.read(at(folder)).roles["instance"][0]
    replace(folder, shards.pack([change(row) for row in shards.read(at(folder), shard)]))


def rows(change: Callable[[shards.Row], shards.Row]) -> Harm:
    return lambda folder: changed(folder, change)


def tensors(**new: torch.Tensor | None) -> Harm:
    def change(row: shards.Row) -> shards.Row:
        both = row.tensors | new
        return shards.Row({name: tensor for name, tensor in both.items() if tensor is not None}, row.meta)

    return rows(change)


def meta(**new: Any) -> Harm:
    return rows(lambda row: shards.Row(row.tensors, row.meta | new))


def data(change: Callable[[bytes], bytes]) -> Harm:
    return lambda folder: replace(folder, change(first(folder).read_bytes()))


def said(**new: Any) -> Harm:
    """Other values in the manifest."""
    return lambda folder: rewrite(folder, manifest(folder) | new)


def shard_said(**new: Any) -> Harm:
    def harm(folder: Path) -> None:
        values = manifest(folder)
        values["roles"]["instance"][0] |= new
        rewrite(folder, values)

    return harm


def table(change: Callable[[dict[str, torch.Tensor]], Any]) -> Harm:
    def harm(folder: Path) -> None:
        values = manifest(folder)
        path = folder / values["prompts"]["file"]
        there = load(path.read_bytes())
        path.write_bytes(changed if isinstance(changed := change(there), bytes) else save(there | changed))
        values["prompts"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        rewrite(folder, values)

    return harm


def bomb(_: bytes) -> bytes:
    """8 GiB of zeros in a few KB: gzip, twice."""
    once = gzip.compress(bytes(2**26), 9) * 128
    return gzip.compress(once, 9)


def tar(
    *members: tuple[str, bytes, dict[str, Any]], kind: int = tarfile.GNU_FORMAT
) -> Callable[[bytes], bytes]:
    def made(_: bytes) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=kind) as file:
            for name, content, settings in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                for key, value in settings.items():
                    setattr(info, key, value)
                file.addfile(info, io.BytesIO(content))
        return out.getvalue()

    return made


def huge_member(_: bytes) -> bytes:
    info = tarfile.TarInfo("000000.safetensors")
    info.size = 2**60
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(10_240)


def sparse_member(_: bytes) -> bytes:
    """A member of a terabyte, of which the tar has a byte: PAX's sparse format 0.1."""
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**40),
           "GNU.sparse.name": "000000.safetensors"}  # fmt: skip
    content = b"1\n0\n1\n".ljust(512, b"\0") + b"x"
    return tar(("x", content, {"pax_headers": pax}), kind=tarfile.PAX_FORMAT)(b"")


def nested_names(_: bytes) -> bytes:
    """Long names of long names."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1
    return (info.tobuf(tarfile.GNU_FORMAT) + b"x".ljust(512, b"\0")) * 5000


def pax_digits(_: bytes) -> bytes:
    return tar(("000000.json", b"{}", {"pax_headers": {"size": "9" * 5000}}), kind=tarfile.PAX_FORMAT)(b"")


def doubled(content: bytes) -> bytes:
    """Every member twice."""
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(content)) as old, tarfile.open(fileobj=out, mode="w") as new:
        for member in old.getmembers() * 2:
            new.addfile(member, old.extractfile(member))
    return out.getvalue()


LINK = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}
HARMS: dict[str, tuple[Harm, str]] = {
    "gzip": (data(lambda content: gzip.compress(content)), "cannot be read"),
    "a gzip bomb": (data(bomb), "cannot be read"),
    "a huge member": (data(huge_member), "is not a plain file"),
    "a sparse member": (data(sparse_member), "'000000.safetensors' is not a plain file"),
    "a link": (data(tar(("000000.safetensors", b"", LINK))), "is not a plain file"),
    "a device": (data(tar(("000000.json", b"", {"type": tarfile.CHRTYPE}))), "is not a plain file"),
    "a pickle": (data(tar(("000000.pyd", b"x", {}))), "cannot be read: row '000000' lacks its"),
    "every member twice": (data(doubled), "is one too many"),
    "many rows": (data(tar(*[(f"{n:06d}.json", b"{}", {}) for n in range(5000)])), "is one too many"),
    "half a row": (data(tar(("000000.json", b"{}", {}))), "cannot be read: row '000000' lacks its"),
    "nested names": (data(nested_names), "cannot be read"),
    "5,000 digits": (data(pax_digits), "cannot be read"),
    "no tar": (data(lambda content: b"<html>" * 999), "cannot be read"),
    "no rows": (data(tar()), "does not match the rows in the manifest"),
    "JSON: deep": (data(tar(("0.safetensors", save({}), {}), ("0.json", b"[" * 200_000, {}))), "recursion"),
    "JSON: a list": (data(tar(("0.safetensors", save({}), {}), ("0.json", b"[]", {}))), "not a JSON object"),
    "tensors: a lying header": (
        data(tar(("0.safetensors", (2**60).to_bytes(8, "little") + b"{}", {}), ("0.json", b"{}", {}))),
        "[Hh]eader",
    ),
    "tensors: another shape": (tensors(mean=torch.zeros(4, 9, 9)), r"mean of \(4, 9, 9\) .* not of \(4"),
    "tensors: another number of dimensions": (tensors(std=torch.zeros(4)), r"std of \(4,\)"),
    "tensors: another type": (tensors(mean=torch.zeros(4, 8, 8, dtype=torch.complex64)), "complex64"),
    "tensors: one is missing": (tensors(std=None), "the tensors mean, not mean, std"),
    "tensors: pixels": (tensors(std=None, mean=None, pixels=torch.zeros(4, 8, 8)), "the tensors pixels, not"),
    "row: a prompt too many": (meta(prompt=10**6), "has prompt 1000000 of 2"),
    "row: no prompt": (meta(prompt=-1), "without a valid prompt"),
    "row: a prompt of text": (meta(prompt="0"), "without a valid prompt"),
    "row: a size of text": (meta(original_size="64x64"), "without a valid original_size"),
    "row: a huge size": (meta(original_size=[10**30, 64]), "without a valid original_size"),
    "row: half a crop": (meta(crop=[1]), "without a valid crop"),
    "row: no source": (meta(source=None), "without a valid source"),
    "manifest: deep": (lambda folder: (folder / "manifest.json").write_text("[" * 200_000), "is damaged"),
    "manifest: huge latents": (said(latent_shape=[10**9] * 3), r"\(1000000000, .* but the base has"),
    "manifest: no latents": (said(latent_shape=[]), "but the base has"),
    "manifest: another scale": (said(latent_scale=[9.0]), "scale=.9.0,.* but the base has"),
    "manifest: scale of NaN": (said(latent_scale=[float("nan")]), "is damaged or of another version"),
    "manifest: no request": (said(request={}), "is damaged or of another version"),
    "manifest: a huge side": (said(request={"resolution": 10**9}), r"but the base has|made with"),
    "manifest: other components": (said(components={"../..": "x"}), "whose ../.. differ"),
    "manifest: shard elsewhere": (shard_said(file="../x.tar"), "is damaged or of another version"),
    "manifest: shard by a path": (shard_said(file="/etc/passwd"), "is damaged or of another version"),
    "manifest: a shard without rows": (shard_said(keys=[]), "is damaged or of another version"),
    "manifest: a hash that is a path": (shard_said(sha256="../../x"), "is damaged or of another version"),
    "manifest: a size of 5,000 digits": (
        lambda folder: (folder / "manifest.json").write_text(
            (folder / "manifest.json").read_text().replace('"bytes":', '"bytes":' + "9" * 5000, 1)
        ),
        "is damaged or of another version",
    ),
    "manifest: a shard twice": (
        lambda folder: rewrite(folder, (m := manifest(folder)) | {
            "roles": m["roles"] | {"instance": m["roles"]["instance"] * 2}
        }),
        "is damaged or of another version",
    ),
    "manifest: a FIFO": (
        lambda folder: ((folder / "manifest.json").unlink(), os.mkfifo(folder / "manifest.json")),
        "is not a regular file",
    ),
    "shard: a FIFO": (lambda folder: (path := first(folder), path.unlink(), os.mkfifo(path)), "is missing"),
    "table: too few prompts": (table(lambda t: {k: v[:1] for k, v in t.items()}), "not of 2 prompts"),
    "table: narrow": (
        table(lambda t: {"condition.prompt_embeds": t["condition.prompt_embeds"][..., :5].contiguous()}),
        r"condition.prompt_embeds of \(32, 5\) per prompt",
    ),
    "table: nothing": (table(lambda t: save({})), "condition.prompt_embeds of no shape"),
    "table: no safetensors": (table(lambda t: b"PK" * 99), "cannot be read"),
    "table: no word": (table(lambda t: {"ids.text_encoder": t["ids.text_encoder"] - 10**6}), "do not have"),
    "table: float words": (table(lambda t: {"ids.text_encoder": t["ids.text_encoder"].float()}), "do not"),
}  # fmt: skip


def trained(cfg: Config) -> None:
    """What `train` does before and in the first step."""
    inputs = Inputs.find(cfg)
    job = setup.setup(cfg, inputs)
    try:
        next(job.stream)
    finally:
        job.stream.close()


@pytest.mark.parametrize("name", HARMS)
def test_hostile_shards_are_refused(
    name: str, make: Make, prepared: Path, tmp_path: Path, refused: Refused
) -> None:
    harm, told = HARMS[name]
    folder = shutil.copytree(prepared, tmp_path / "shards")
    cfg = make(prepare=None, loss__prior_weight=0.0)
    harm(folder)
    refused(lambda: trained(cfg), told)


@pytest.mark.parametrize("verb", ["train", "doctor", "prepare"])
def test_every_verb_survives_a_bomb(verb: str, make: Make, prepared: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(prepared, tmp_path / "shards")
    make()
    HARMS["a gzip bomb"][0](folder)
    done = dbtrain(verb, tmp_path / "c.yaml")
    assert "Traceback" not in done.stderr and "MemoryError" not in done.stderr
    assert done.returncode == {"train": 2, "doctor": 0, "prepare": 0}[verb]
    assert not Path(CANARY).exists()


def test_prepare_writes_shards_of_another_shape_again(make: Make, prepared: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(prepared, tmp_path / "shards")
    tensors(mean=torch.zeros(4, 9, 9))(folder)
    make()
    assert dbtrain("prepare", tmp_path / "c.yaml").returncode == 0
    assert manifest(folder) == manifest(prepared)
    assert first(folder).read_bytes() == first(prepared).read_bytes()


def test_prepare_writes_a_narrow_prompt_table_again(make: Make, prepared: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(prepared, tmp_path / "shards")
    HARMS["table: narrow"][0](folder)
    make()
    assert dbtrain("prepare", tmp_path / "c.yaml").returncode == 0
    assert manifest(folder) == manifest(prepared)
