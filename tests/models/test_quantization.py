"""8- and 4-bit base linears: how exact they are, what they keep, and that adapters learn on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dbtrain.adapters import inject as adapters
from dbtrain.adapters.formats import diffusers_file
from dbtrain.config import AdapterSettings, Model
from dbtrain.export import export
from dbtrain.models import loading
from dbtrain.models.base import Base
from dbtrain.models.memory_counter import MemoryCounter
from dbtrain.models.quantization import (
    NF4,
    STORAGE,
    QuantizedLinear,
    decode,
    encode,
    int8_matmul,
    parameters,
    quantize,
)
from dbtrain.prepare.prepare import prepare
from dbtrain.report import report
from dbtrain.runtime.errors import ConfigError
from dbtrain.train.checkpoint import Progress
from dbtrain.train.step import train_step
from tests import bases
from tests.conftest import Make, slow, thinned, train
from tests.networks import build, stream

# Largest relative error of a product and of its gradient, weights normal.
ERROR = {"int8": 0.01, "fp8": 0.03, "nf4": 0.1, "nf4-fp32": 0.1, "int8-dynamic": 0.015}
BITS = {"int8": 8.125, "fp8": 8.125, "nf4": 4.25, "nf4-fp32": 4.5, "int8-dynamic": 8.125}  # a weight, of 256
SETTINGS = [storage for storage in ERROR if storage != "nf4-fp32"]
DECODED = [storage for storage in ERROR if not STORAGE[storage].dynamic]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def normal_linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = nn.Linear(256, 192)
        nn.init.normal_(linear.weight, std=0.02)
        linear.weight.data[3] = 0  # a channel that is off has no scale of its own
        return linear.to(dtype).requires_grad_(False)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("storage", ERROR)
def test_the_product_is_near_the_full_layer_s(storage: str) -> None:
    linear, x = normal_linear(), numbers(4, 50, 256)
    x.requires_grad_()
    results, layer = [], QuantizedLinear(linear, storage)
    for module in (linear, layer):
        y = module(x)
        results += [(y - linear.bias, *torch.autograd.grad(y, x, numbers(4, 50, 192)))]
    for want, found in zip(*results, strict=True):
        assert 0 < (found - want).norm() / want.norm() < ERROR[storage]
    assert not results[1][0][..., 3].any()
    assert 8 * (layer.codes.nbytes + layer.scale.nbytes) == BITS[storage] * linear.weight.numel()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("storage", DECODED)
def test_it_is_exactly_a_linear_layer_with_the_decoded_weight(
    storage: str, autocast: bool, precision: str
) -> None:
    """Output and gradients, in each precision, with a base of that precision and with autocast over fp32."""
    dtype = PRECISIONS[precision]
    base = torch.float32 if autocast else dtype
    layer, plain = QuantizedLinear(normal_linear(base), storage), normal_linear(base)
    weight = decode(layer.codes, layer.scale, layer.table, storage, dtype, 256)
    assert autocast or torch.equal(layer.weight, weight)
    plain.weight.data = weight.to(base)
    results = []
    for module in (layer, plain):
        module.bias.requires_grad_(True)
        module.bias.grad = None
        x = numbers(4, 50, 256).to(base).requires_grad_()
        with torch.amp.autocast("cpu", dtype, enabled=autocast and dtype != torch.float32):
            y = module(x)
        assert y.dtype == dtype
        y.backward(numbers(4, 50, 192).to(dtype))
        results.append((y, x.grad, module.bias.grad))
    for ours, theirs in zip(*results, strict=True):
        assert ours is not None and ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("storage", ERROR)
def test_autograd_keeps_the_codes_and_no_decoded_weight(storage: str) -> None:
    layer, kept = QuantizedLinear(normal_linear(), storage), []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(numbers(4, 50, 256).requires_grad_())
    stored = (layer.codes, layer.scale, layer.table)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in stored}


@pytest.mark.parametrize("storage", ["nf4", "nf4-fp32"])
@pytest.mark.parametrize("width", [64, 100, 256])
def test_4_bit_weights_are_the_nearest_values_of_their_block(storage: str, width: int) -> None:
    """Blocks of 64, the last one maybe shorter; with fp32 scales, decoded weights are kept."""
    weight = numbers(7, width)
    weight[2] = 0
    codes, scale = encode(weight, storage)
    found = decode(codes, scale, STORAGE[storage].table, storage, torch.float32, width)
    values, error = torch.tensor(NF4), 0.002 if storage == "nf4" else 1e-6
    for start in range(0, width, 64):
        block = weight[:, start : start + 64]
        largest = block.abs().amax(1, keepdim=True)
        nearest = (block[:, :, None] - values * largest[:, :, None]).abs().amin(2)
        far = (found[:, start : start + 64] - block).abs()
        assert (far <= nearest + 1.5 * error * weight.abs().amax(1, keepdim=True)).all()
    if storage == "nf4-fp32":
        assert all(map(torch.equal, encode(found, storage), (codes, scale)))


def test_8_bit_products_round_rows_of_the_input_and_of_the_gradient() -> None:
    """The reference formulas; exact sums do not depend on other rows. What is not finite stays so."""
    layer, x, grad = QuantizedLinear(normal_linear(), "int8-dynamic"), numbers(3, 5, 256), numbers(3, 5, 192)
    codes, scale = layer.codes.view(torch.int8).double(), layer.scale.view(torch.float32)

    def rounded(rows: torch.Tensor) -> torch.Tensor:
        step = rows.abs().amax(-1, keepdim=True) / 127
        return (rows / step).round().double() * step

    x.requires_grad_()
    y = layer(x)
    (found,) = torch.autograd.grad(y, x, grad)
    want = rounded(x) @ codes.t() * scale.t() + layer.bias
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.double(), rounded(grad * scale.t()) @ codes, rtol=1e-5, atol=1e-6)
    assert torch.equal(layer(x[1:2, 2:4]), y[1:2, 2:4])
    for bad in (torch.nan, torch.inf):
        x.data[0, 1, 7] = bad
        finite = layer(x).isfinite()
        assert not finite[0, 1].any() and finite[1:].all()


@pytest.mark.parametrize("shape", [(5, 64, 16), (40, 64, 16), (40, 67, 16), (40, 64, 15)], ids=str)
def test_8_bit_products_are_the_same_within_the_limits_of_cublas(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-127, 128, s, generator=draw, dtype=torch.int8) for s in ((m, k), (k, n)))
    for there in (right, right.t().contiguous().t()):
        assert torch.equal(int8_matmul(left, there, True), int8_matmul(left, there, False))


@pytest.mark.parametrize("storage", thinned(ERROR, 3))
def test_it_compiles_into_one_graph(storage: str) -> None:
    layer, x, results = QuantizedLinear(normal_linear(), storage), numbers(3, 256).requires_grad_(), []
    for module in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y = module(x)
        results.append((y, *torch.autograd.grad(y, x, numbers(3, 192))))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("storage", ERROR)
def test_decoding_holds_two_weights_at_most(storage: str) -> None:
    """In bf16, with the codes: the weight itself, and for 4 bits as much again of indices."""
    layer = QuantizedLinear(normal_linear(), storage)
    with FakeTensorMode(allow_non_fake_inputs=True), MemoryCounter() as counter:
        decode(layer.codes, layer.scale, layer.table, storage, torch.bfloat16, 256)
    assert counter.peak < 2 * 192 * 256 * (2.3 if "nf4" in storage else 1.6)


@pytest.mark.parametrize("storage", ERROR)
def test_codes_are_there_before_the_copies_that_encoding_needs(
    storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Allocated behind them, they leave holes, of 40% of an int8 base. A part is encoded at a time."""
    layer, weight, there = QuantizedLinear(normal_linear(), storage), normal_linear().weight.detach(), []

    def noting(rows: torch.Tensor, storage: str) -> tuple[torch.Tensor, torch.Tensor]:
        there.append(counter.live)
        return encode(rows, storage)

    monkeypatch.setattr(loading, "encode", noting)
    monkeypatch.setattr(loading, "ENCODED", 50 * 256)
    with MemoryCounter() as counter:
        codes, scale = loading._stored(layer, loading.CODES, weight)
    assert len(there) == 4 and there[0] >= codes.nbytes + scale.nbytes
    assert torch.equal(codes, layer.codes) and torch.equal(scale, layer.scale)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("storage", ERROR)
@pytest.mark.parametrize("rows", [5, 200])
def test_a_gpu_computes_the_same(storage: str, rows: int) -> None:
    layer, results = QuantizedLinear(normal_linear(), storage), []
    for device in ("cpu", "cuda"):
        x, grad = numbers(rows, 256).to(device).requires_grad_(), numbers(rows, 192).to(device)
        y = layer.to(device)(x)
        results.append([t.cpu() for t in (layer.weight, y, *torch.autograd.grad(y, x, grad))])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("storage", ERROR)
def test_a_denoiser_shrinks_by_its_wide_linears(storage: str) -> None:
    base = Base.find(Model(path=str(bases.sd())))
    unet = base.load("unet", torch.bfloat16)
    whole, count = sum(p.nbytes for p in unet.parameters()), parameters(unet)
    wide = [m for m in unet.modules() if isinstance(m, nn.Linear) and min(m.weight.shape) >= 64]
    freed = sum(m.weight.nbytes for m in wide)
    names = {name for name, _ in unet.named_modules()}
    quantize(unet, storage)
    quantized = [m for m in unet.modules() if isinstance(m, QuantizedLinear)]
    stored = sum(m.codes.nbytes + m.scale.nbytes for m in quantized)
    assert len(wide) == len(quantized) > 10 and stored < 0.6 * freed
    assert sum(p.nbytes for p in unet.parameters()) == whole - freed + stored
    assert parameters(unet) == count > sum(m.weight.numel() for m in wide), "weights count, not their bytes"
    assert {name for name, _ in unet.named_modules()} == names
    assert not any(p.requires_grad for p in unet.parameters())
    weight = quantized[0].weight
    unet.to(torch.float16)
    assert torch.equal(quantized[0].weight, weight), "neither codes nor scales follow the module's dtype"


@pytest.mark.parametrize("storage", ERROR)
def test_rows_are_encoded_by_themselves_and_on_the_meta_device(storage: str) -> None:
    weight = normal_linear(torch.bfloat16).weight
    whole = encode(weight, storage)
    for tensor, part in zip(whole, encode(weight[2:77], storage), strict=True):
        assert tensor.dtype == torch.uint8 and torch.equal(tensor[2:77], part)
    layer = QuantizedLinear(normal_linear().to("meta"), storage)
    for tensor, empty in zip(whole, (layer.codes, layer.scale), strict=True):
        assert empty.is_meta and empty.shape == tensor.shape and not empty.requires_grad


def test_a_component_without_wide_layers_says_so() -> None:
    with pytest.raises(ConfigError, match=r"train.base_linears is 'int8', but the Sequential .* use full"):
        quantize(nn.Sequential(nn.Linear(32, 512)), "int8")


@pytest.mark.parametrize("storage", ERROR)
@pytest.mark.parametrize(
    "settings",
    thinned(
        [{}, {"dora": True}, {"kind": "loha"}, {"kind": "lokr"}, {"bias": "all"}, {"init": "orthogonal"}], 3
    ),
    ids=str,
)
def test_every_adapter_learns_on_it(settings: dict[str, Any], storage: str) -> None:
    """Its first gradient is that on the full layers, up to their error."""
    base, grads = Base.find(Model(path=str(bases.sd()))), []
    x, t, c = numbers(2, 4, 8, 8), torch.tensor([5, 500]), numbers(2, 32, 64)
    for eight_bit in (False, True):
        unet = base.load("unet")
        if eight_bit:
            quantize(unet, storage)
        adapters.attach(unet, AdapterSettings(**{"rank": 4, **settings}), "denoiser", 0)
        unet(x, t, c).sample.square().mean().backward()
        grads.append({name: p.grad for name, p in adapters.trainable(unet).items()})
    assert grads[0].keys() == grads[1].keys()
    whole, eight = (torch.cat([g.flatten() for g in found.values() if g is not None]) for found in grads)
    assert (eight - whole).norm() < 4 * max(ERROR[storage], 0.025) * whole.norm()
    assert all((g is None) == (grads[1][name] is None) for name, g in grads[0].items())


@pytest.mark.parametrize("precision", [slow(name) if name == "bf16" else name for name in PRECISIONS])
@pytest.mark.parametrize("storage", thinned(SETTINGS, 4))
def test_training_losses_stay_close(make: Make, prepared: Path, precision: str, storage: str) -> None:
    losses = []
    for linears in ("full", storage):
        cfg = make(
            model__path=str(bases.sd(size="slim")), train__base_linears=linears, train__precision=precision,
            optim__lr=0.01,
        )  # fmt: skip
        model, batches = build(cfg, prepared), stream(cfg, prepared)
        progress = Progress.begin(model, cfg)
        losses.append(torch.stack([train_step(model, progress, batches, n, cfg).losses for n in range(4)]))
        batches.close()
    assert not torch.equal(losses[0], losses[1])
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0)


@pytest.mark.slow
def test_a_run_may_change_to_it_and_its_export_holds_the_adapter_only(make: Make) -> None:
    prepare(make())
    train(make(train__steps=2))
    cfg = make(train__steps=4, train__base_linears="int8")
    folder = train(cfg)
    metrics = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(metrics) == 4, "it went on from step 2"
    file = export.export(cfg)
    card = (folder / "export" / "README.md").read_text()
    assert "| frozen linear layers | full to step 2, then int8 |" in card
    page = report.report([folder]).read_text()
    assert "frozen linear layers full to step 2, then int8" in page
    size = (file / diffusers_file.FILE if file.is_dir() else file).stat().st_size
    full = export.export(make(train__steps=4), out=folder / "again")
    assert size == (full / diffusers_file.FILE if full.is_dir() else full).stat().st_size
