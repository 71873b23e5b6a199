"""4-bit weights of bitsandbytes: decoded bit for bit, kept as they are by nf4, refused if broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dbtrain.config import Model
from dbtrain.models.base import Base
from dbtrain.models.nf4_files import STATE, Nf4Files
from dbtrain.models.quantization import NF4_FP32, QuantizedLinear, quantize
from dbtrain.prepare.prepare import prepare
from dbtrain.runtime.errors import ConfigError
from tests import bases, nf4
from tests.conftest import Make, train
from tests.networks import build


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return Path(shutil.copytree(bases.z_image(), tmp_path / "base"))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(70, 256), (9, 100), (3, 7)], ids=str)
def test_packed_weights_are_decoded_whole_or_by_rows(
    shape: tuple[int, int], double: bool, tmp_path: Path
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    tensors, decoded = nf4.packed("a.weight", weight, double)
    save_file(tensors | {"a.bias": weight[0].contiguous()}, tmp_path / "a.safetensors")
    files = Nf4Files([tmp_path / "a.safetensors"])
    assert set(files.names) == {"a.weight", "a.bias"} and files.shape("a.weight") == shape
    assert torch.equal(files.read("a.weight"), decoded)
    assert torch.equal(files.read("a.bias"), weight[0])
    for start in range(shape[0]):
        assert torch.equal(files.read("a.weight", slice(start, start + 2)), decoded[start : start + 2])


@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
def test_a_packed_component_is_what_its_weights_stand_for(component: str, base: Path) -> None:
    # The embedding of words stays, as in real ones.
    decoded = nf4.pack(base / component, linears="proj" if component == "text_encoder" else "")
    found = Base.find(Model(path=str(base))).load(component, torch.bfloat16).state_dict()
    assert sum(not torch.equal(tensor, nf4_of) for tensor, nf4_of in _both(found, decoded)) == 0


def _both(found: dict[str, Tensor], decoded: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    names = {name: name if name in found else name.removeprefix("model.") for name in decoded}
    return [(found[names[name]].float(), tensor.bfloat16().float()) for name, tensor in decoded.items()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("double", [False, True])
def test_nf4_keeps_packed_weights_as_they_are(double: bool, dtype: torch.dtype, base: Path) -> None:
    decoded = nf4.pack(base / "transformer", double, small=True)
    found = Base.find(Model(path=str(base)))
    module = found.skeleton("transformer", dtype)
    quantize(module, found.storage("transformer", "nf4"))
    found.fill("transformer", module, dtype)
    linears = {name: m for name, m in module.named_modules() if isinstance(m, QuantizedLinear)}
    whole = {name for name, linear in linears.items() if linear.in_features % 64 == 0}
    assert len(whole) > 10
    for name, linear in linears.items():
        linear.dtype = torch.float32
        error = (linear.weight - decoded[f"{name}.weight"]).norm() / linear.weight.norm()
        assert error == 0 if name in whole else error < 0.1, name  # else blocks cross from row to row
    assert found.storage("transformer", "int8") == "int8" and found.storage("vae", "nf4") == "nf4"


@pytest.mark.parametrize("linears", ["full", "nf4"])
def test_a_packed_base_is_prepared_and_trained(make: Make, base: Path, linears: str) -> None:
    nf4.pack(base / "transformer")
    nf4.pack(base / "text_encoder", linears="proj")
    cfg = make(model__path=str(base), train__base_linears=linears, prepare__class_prompt=None, train__steps=1)
    prepare(cfg)
    layers = [m for m in build(cfg, Path(cfg.data.shards)).modules() if isinstance(m, QuantizedLinear)]
    assert {layer.storage for layer in layers} == ({NF4_FP32} if linears == "nf4" else set())
    assert (train(cfg) / "export").is_dir()


def state(**changes: object) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        found = json.loads(bytes(tensors[f"a{STATE}"].tolist())) | changes
        tensors[f"a{STATE}"] = torch.tensor(list(json.dumps(found).encode()), dtype=torch.uint8)

    return change


def cut(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensors[name][1:].clone()})


BROKEN: dict[str, Callable[[dict[str, Tensor]], None]] = {
    "no JSON": lambda tensors: tensors.update({f"a{STATE}": torch.zeros(5, dtype=torch.uint8)}),
    "no shape": state(shape=None), "three axes": state(shape=[1, 2, 3]), "another shape": state(shape=[4, 4]),
    "blocks of nothing": state(blocksize=0), "negative blocks": state(blocksize=-64),
    "blocks of text": state(nested_blocksize="a"), "no nested scales": lambda t: t.pop("a.nested_absmax"),
    "few codes": cut("a"), "few scales": cut("a.absmax"), "few values": cut("a.quant_map"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_packed_weights_are_refused(name: str, tmp_path: Path) -> None:
    tensors, _ = nf4.packed("a", torch.ones(64, 64), double=True)
    BROKEN[name](tensors)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="the 4-bit weight 'a' is broken: "):
        Nf4Files([tmp_path / "a.safetensors"]).read("a")


@pytest.mark.parametrize(
    "changes",
    [{"quant_method": "gptq"}, {"load_in_4bit": False}, {"bnb_4bit_quant_type": "fp4"},
     {"bnb_4bit_quant_storage": "bfloat16"}, {"bnb_4bit_quant_type": None}],
    ids=str,
)  # fmt: skip
def test_no_other_quantization_is_read(changes: dict[str, object], base: Path) -> None:
    config = base / "transformer" / "config.json"
    values = json.loads(config.read_text()) | {"quantization_config": nf4.CONFIG | changes}
    config.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="sets quantization_config"):
        Base.find(Model(path=str(base))).load("transformer")
