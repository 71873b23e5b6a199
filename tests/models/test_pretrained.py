"""Loading a base: the weights of the files and nothing else, read once, cast once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dbtrain.config import Model
from dbtrain.models import quantization
from dbtrain.models.base import Base
from dbtrain.models.pretrained import Pretrained
from dbtrain.models.weight_files import WeightFiles
from dbtrain.runtime.errors import ConfigError
from tests import bases
from tests.conftest import thinned

PARTS = [
    (name, part)
    for name, parts in {
        "sd": ("unet", "vae", "text_encoder"),
        "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2"),
        "deepfloyd": ("unet", "text_encoder"),
        "deepfloyd-2": ("unet", "text_encoder"),
    }.items()
    for part in parts
]


def found(name: str) -> Pretrained:
    return Pretrained(name, bases.OF_FAMILY[name](), None)


def weights_file(base: Pretrained, part: str) -> Path:
    (path,) = (base.folder / part).glob("*.safetensors")
    return path


def the_long_way(base: Pretrained, part: str, dtype: torch.dtype) -> nn.Module:
    """The component with random weights, and then the file's put in their place."""
    kind, config = base._class(part), base.config(part)
    if kind.__module__.startswith("diffusers"):
        module = kind.from_config(config)
    else:
        module = kind(kind.config_class.from_dict(config))
    own = module.state_dict()
    saved = load_file(weights_file(base, part))
    named = {n if n in own else n.removeprefix("text_model."): tensor for n, tensor in saved.items()}
    lacking, odd = module.load_state_dict(named, strict=False)
    assert not odd
    assert all(lack == "encoder.embed_tokens.weight" for lack in lacking)  # T5's, tied to `shared`
    module.to(dtype)
    for label, parameter in module.named_parameters():
        if label.endswith("DenseReluDense.wo.weight") and dtype == torch.float16:
            parameter.data = parameter.data.float()  # T5 overflows there (huggingface/transformers#20287)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "part"), PARTS)
def test_loading_gives_what_the_long_way_gives(name: str, part: str, dtype: torch.dtype) -> None:
    base = found(name)
    loaded, expected = base.load(part, dtype), the_long_way(base, part, dtype)
    for kind in ("named_parameters", "named_buffers"):  # buffers that no file holds, too
        have, want = dict(getattr(loaded, kind)()), dict(getattr(expected, kind)())
        assert list(have) == list(want)
        for label in want:
            assert have[label].dtype == want[label].dtype, label
            assert have[label].device == torch.device("cpu"), label
            assert torch.equal(have[label], want[label]), label
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", thinned(bases.OF_FAMILY, 4))
def test_a_diffusers_model_is_what_diffusers_loads(name: str, dtype: torch.dtype) -> None:
    """Of every family: norms that stay in fp32, statistics in buffers, tables that no file holds."""
    base = Base.find(Model(path=str(bases.OF_FAMILY[name]())))
    for part in filter(None, (base.family.denoiser, base.family.vae)):
        loaded = base.load(part, dtype)
        theirs = base._class(part).from_pretrained(base.folder, subfolder=part, dtype=dtype)
        for ours, other in zip(loaded.modules(), theirs.modules(), strict=True):
            have, want = ({**vars(m), **m._parameters, **m._buffers} for m in (ours, other))
            assert have.keys() == want.keys()
            for label, tensor in want.items():
                if isinstance(tensor, torch.Tensor):
                    assert have[label].dtype == tensor.dtype and torch.equal(have[label], tensor), label


SHARES = ("set_", "select", "view", "detach", "alias", "expand", "lift_fresh", "empty", "empty_like")


class Made(TorchDispatchMode):
    """Counts the bytes that operators write on the CPU, but for those that share memory or leave it be."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        written = isinstance(result, torch.Tensor) and result.device.type == "cpu"
        if written and func.__name__.split(".")[0] not in SHARES:
            self.bytes += result.nbytes
        return result


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "part"), PARTS)
def test_weights_are_written_once_and_only_to_change_their_dtype(
    name: str, part: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is drawn at random first, and what is in its dtype already stays in the mapped file."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the count sees one thread only
    base = found(name)
    base._class(part)  # imports make tensors of their own
    with Made() as made:
        loaded = base.load(part, dtype)
    cast = sum(p.nbytes for p in loaded.parameters() if p.dtype != torch.float16)  # the files' dtype
    assert made.bytes - cast in range(1000)  # buffers, and one small vector of IF's UNet


def test_a_sharded_base_is_loaded_whole(tmp_path: Path) -> None:
    whole = found("sd")
    for part in ("unet", "text_encoder"):
        module = whole.load(part, torch.float16)
        module.save_pretrained(tmp_path / part, max_shard_size="200KB")
        assert len(list((tmp_path / part).glob("*.safetensors"))) > 1
    (tmp_path / "model_index.json").write_text((whole.folder / "model_index.json").read_text())
    base = Pretrained("sharded", tmp_path, None)
    for part in ("unet", "text_encoder"):
        want = whole.load(part, torch.bfloat16).state_dict()
        have = base.load(part, torch.bfloat16).state_dict()
        assert list(have) == list(want)
        assert all(torch.equal(have[label], want[label]) for label in want)


def test_a_variant_is_loaded_from_its_own_files(tmp_path: Path) -> None:
    whole = found("sd")
    for part in ("unet", "text_encoder"):
        module = whole.load(part)
        module.save_pretrained(tmp_path / part)
        module.half().save_pretrained(tmp_path / part, variant="fp16")
        (other,) = (tmp_path / part).glob("*.fp16.safetensors")
        tensors = {label: tensor + 1 for label, tensor in load_file(other).items()}
        save_file(tensors, other, {"format": "pt"})
    (tmp_path / "model_index.json").write_text((whole.folder / "model_index.json").read_text())
    for part in ("unet", "text_encoder"):
        plain = next(Pretrained("x", tmp_path, None).load(part).parameters())
        variant = next(Pretrained("x", tmp_path, "fp16").load(part).parameters())
        assert torch.equal(variant, (plain.half() + 1).float())


def renamed(folder: Path, name: str) -> None:
    """Rename the weights of UNet and text encoder."""
    for part, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        next((folder / part).glob("*.safetensors")).rename(folder / part / name.format(stem))


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_component_without_the_variant_is_loaded_from_its_plain_files(tmp_path: Path, part: str) -> None:
    whole = found("sd")
    folder = shutil.copytree(whole.folder, tmp_path / "base")
    renamed(folder, "{}.fp16.safetensors")
    shutil.copy(weights_file(whole, "vae"), folder / "vae")
    base = Pretrained("x", folder, "fp16")
    assert all(base.own_variant(name) == "fp16" for name in ("unet", "text_encoder"))
    assert base.own_variant("vae") is None
    for name in (part, "vae"):
        here, there = (one.load(name).state_dict() for one in (base, whole))
        assert all(torch.equal(here[label], there[label]) for label in there)
    assert base.key("vae") == whole.key("vae")


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize(
    ("name", "variant", "told"),
    [
        ("{}.fp16.safetensors", None, r"has no weights of variant null, only .*; set model.variant: fp16"),
        ("{}.fp16.safetensors", "bf16", r"has no weights of variant bf16, only .*; set model.variant: fp16"),
        ("{}.bin", None, r"has its weights only as a pickle \(.*\.bin\), .*; get its .safetensors files"),
        ("{}.none", None, r"has no weights \(\*.safetensors\); get the whole model: dbtrain fetch"),
    ],
)
def test_what_is_there_in_place_of_weights_is_told(
    tmp_path: Path, part: str, name: str, variant: str | None, told: str
) -> None:
    folder = shutil.copytree(found("sd").folder, tmp_path / "base")
    renamed(folder, name)
    with pytest.raises(ConfigError, match=rf"^base model x: .*{part} {told}"):
        Pretrained("x", folder, variant).load(part)


def test_of_a_processor_of_text_and_images_only_the_tokenizer_is_loaded(tmp_path: Path) -> None:
    """Of FLUX.2 dev, whose tokenizer states no length. The processor would need torchvision."""
    plain = Base.find(Model(path=str(bases.flux2_dev())))
    folder = shutil.copytree(plain.folder, tmp_path / "base")
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "PixtralProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    settings = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
    settings |= {"processor_class": "PixtralProcessor", "model_max_length": 10**30}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    base = Base.find(Model(path=str(folder)))
    ours, expected = (
        one.family.tokenize({"text_encoder": one.load("tokenizer")}, ["a dog"]) for one in (base, plain)
    )
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="has no vocabulary"):
        base.load("tokenizer")


@pytest.mark.parametrize("storage", ["full", "int8", "nf4"])
@pytest.mark.parametrize("name", ["sd", "qwen-image"])
def test_a_rank_reads_its_rows_and_they_are_those_of_the_whole(
    name: str, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every matrix; vectors are read by all."""
    monkeypatch.setattr(quantization, "WIDTH", 16)
    base = Base.find(Model(path=str(bases.OF_FAMILY[name]())))
    part, ranks = base.family.denoiser, 3
    read: list[int] = []
    real = WeightFiles.read

    def counted(files: WeightFiles, label: str, rows: slice | None = None) -> torch.Tensor:
        tensor = real(files, label, rows)
        read.append(tensor.numel() if tensor.dim() > 1 else 0)
        return tensor

    def rows_of(parameter: torch.Tensor, rank: int) -> slice:
        size, count = -(-len(parameter) // ranks), len(parameter)
        return slice(min(rank * size, count), min((rank + 1) * size, count))

    def filled(rank: int | None) -> dict[str, torch.Tensor]:
        module = base.skeleton(part)
        if storage != "full":
            quantization.quantize(module, storage)
        held: dict[torch.Tensor, tuple[torch.Tensor, slice]] = {}
        for parameter in module.parameters():
            if rank is not None and parameter.dim() > 1:
                rows = rows_of(parameter, rank)
                held[parameter] = torch.empty_like(parameter[rows], device="cpu"), rows
        names = {parameter: label for label, parameter in module.named_parameters()}
        base.fill(part, module, torch.float32, lambda parameter: held.get(parameter, (parameter, None)))
        if rank is None:
            return dict(module.named_parameters())
        return {names[parameter]: rows for parameter, (rows, _) in held.items()}

    monkeypatch.setattr(WeightFiles, "read", counted)
    whole = filled(None)
    matrices = [parameter for parameter in base.skeleton(part).parameters() if parameter.dim() > 1]
    shares = []
    for rank in range(ranks):
        read.clear()
        shares.append(filled(rank))
        assert sum(read) == sum(matrix[rows_of(matrix, rank)].numel() for matrix in matrices)
    for label in shares[0]:
        assert torch.equal(torch.cat([share[label] for share in shares]), whole[label])


def test_a_full_gpu_is_not_taken_for_a_broken_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sharded weights are read to the GPU; its error has a remedy of its own."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("dbtrain.models.loading.fill", full)
    with pytest.raises(torch.OutOfMemoryError):
        found("sd").load("unet")
