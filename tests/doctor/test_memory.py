"""The predicted memory is the measured one, is read from configs alone, and leads to settings that fit."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from benchmarks import bases as real
from benchmarks.common import Result
from benchmarks.memory import BOUND, configured, measured
from dbtrain.data.sizes import Size
from dbtrain.models.base import Base
from dbtrain.models.families import registry as families
from dbtrain.models.memory_counter import MemoryCounter, like_cuda
from dbtrain.prepare.prepare import prepare
from dbtrain.runtime.memory import GIB
from dbtrain.train import memory
from tests import bases
from tests.conftest import Make, dbtrain, finished, thinned


def test_a_tally_counts_each_storage_while_it_lives() -> None:
    with FakeTensorMode(), MemoryCounter(block=512) as counter:
        x = torch.empty(1000)  # 4000 bytes, rounded to 4096
        assert (counter.live, counter.peak) == (4096, 4096)
        view = x.view(10, 100)[2:]
        x.add_(1)
        assert counter.live == 4096, "views and changes in place take nothing"
        y = view * 2  # 3200 bytes
        assert counter.live == counter.peak == 4096 + 3584
        del x, y
        assert counter.live == 4096, "the view keeps the storage"
        del view
        assert (counter.live, counter.peak) == (0, 4096 + 3584)


def test_cuda_s_kernels_and_autocast_are_stood_in_for_and_put_back() -> None:
    plain = functional.scaled_dot_product_attention, functional.group_norm
    with FakeTensorMode(), like_cuda(), torch.amp.autocast("cpu", torch.bfloat16):
        x = torch.empty(2, 8, 64, 40, requires_grad=True)
        fused = functional.scaled_dot_product_attention(x, x, x)
        assert "FlashAttention" in type(fused.grad_fn).__name__ and fused.dtype == torch.bfloat16
        masked = functional.scaled_dot_product_attention(x, x, x, torch.empty(1, 1, 64, 64))
        assert "EfficientAttention" in type(masked.grad_fn).__name__
        few = torch.empty(2, 2, 64, 40, requires_grad=True)
        for mask, kernel in ((None, "FlashAttention"), (torch.empty(1, 1, 64, 64), "Unsafe")):
            grouped = functional.scaled_dot_product_attention(x, few, few, mask, enable_gqa=True)
            assert kernel in type(grouped.grad_fn).__name__ and grouped.shape == x.shape
        norm = functional.group_norm(torch.empty(1, 8, 4, 4, dtype=torch.bfloat16), 2)
        assert norm.dtype == torch.float32, "as on GPUs, not as on CPUs"
    assert plain == (functional.scaled_dot_product_attention, functional.group_norm)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("sd", {}),
    ("sd", {"train__precision": "bf16", "train__micro_batch": 4}),
    ("sd", {"train__gradient_checkpointing": "blocks", "train__base_linears": "int8"}),
    ("sd", {"train__gradient_checkpointing": "transformer", "train__swap_blocks": 4}),
    ("sd", {"train__gradient_checkpointing": "blocks", "train__base_linears": "nf4"}),
    ("sd", {"train__gradient_checkpointing": "transformer", "adapter__text_encoder": {"rank": 2}}),
    ("sdxl", {"train__precision": "bf16"}),
    ("if_1", {"prepare__resolution": 16}),
    ("if_2", {"prepare__resolution": 32, "adapter__kind": "lokr"}),
    ("flux2_klein", {"train__precision": "bf16"}),
    ("qwen_image", {"train__precision": "bf16"}),
    ("z_image", {"train__precision": "bf16"}),
    ("krea2", {"train__precision": "pure-bf16"}),
]


@pytest.mark.parametrize(("base", "settings"), thinned(CASES, 15), ids=str)
def test_it_is_what_a_real_step_takes(make: Make, base: str, settings: dict[str, Any]) -> None:
    """Of all families; rows are 64 px small, yet activations are most of the sum."""
    path = getattr(bases, base)()
    cfg = make(**{"model__path": str(path), "prepare__class_prompt": None, **settings})
    prepare(cfg)
    found = memory.predict(cfg, Base.find(cfg.model), "cpu")
    assert found.peak == pytest.approx(measured(cfg), rel=BOUND)


@pytest.mark.slow
def test_it_is_what_a_sharded_step_takes(tmp_path: Path) -> None:
    """On each of two ranks, with quantized weights and recomputed blocks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = ["-m", "benchmarks.memory", "--smoke", f"--out={tmp_path}", f"--work={tmp_path / 'work'}"]
    assert finished([sys.executable, *torchrun, *words], RANK="0").returncode == 0
    counts = Result.read(tmp_path / "memory-tiny-64-cpu-2-ranks.json").rows[0].counts
    assert counts["predicted, MiB"] == pytest.approx(counts["measured, MiB"], rel=BOUND)
    assert counts["gathered, MiB"] > 0


@pytest.mark.slow
def test_class_images_and_ranks_take_more(make: Make) -> None:
    cfg = make(train__global_batch=1)
    base = Base.find(cfg.model)
    both = memory.predict(cfg, base, "cuda")
    alone = memory.predict(make(train__global_batch=1, loss__prior_weight=0.0), base, "cuda")
    assert 1.6 < both.activations / alone.activations < 2.4
    assert both.gradients == 0 and memory.predict(cfg, base, "cuda", ranks=2).gradients == both.adapter
    assert memory.predict(make(), base, "cuda").gradients == both.adapter, "accumulated over micro-batches"
    assert 2 * both.adapter < both.moments < 2 * both.adapter + 70 * 512, "two moments, and 64 step counts"


@pytest.mark.slow
def test_pictures_for_validation_take_what_the_vae_takes(make: Make) -> None:
    cfg = make(validation__prompts=["a photo of sks dog"], validation__images=1)
    base = Base.find(cfg.model)
    found = memory.predict(cfg, base, "cpu")
    vae = base.load("vae")
    with MemoryCounter(64) as counter, torch.no_grad():
        vae.decode(torch.randn(1, *families.get("sd").space(base, Size.square(64)).shape))
        taken = counter.peak + sum(parameter.nbytes for parameter in vae.parameters())
    assert found.validation == pytest.approx(taken, rel=BOUND)
    assert found.peak == found.base + found.adapter + found.moments + found.gradients + max(
        found.validation, found.activations
    )
    assert memory.predict(make(), base, "cpu").validation == 0


@pytest.mark.slow
def test_no_weights_are_read(make: Make, tmp_path: Path) -> None:
    cfg = make()
    whole = memory.predict(cfg, Base.find(cfg.model), "cuda")
    folder = shutil.copytree(bases.sd(), tmp_path / "hollow", ignore=shutil.ignore_patterns("*.safetensors"))
    cfg = make(model__path=str(folder))
    assert memory.predict(cfg, Base.find(cfg.model), "cuda") == whole


@pytest.mark.slow
def test_doctor_says_what_fits(make: Make, tmp_path: Path) -> None:
    make()
    done = dbtrain("doctor", tmp_path / "c.yaml", "--gib", 24)
    assert done.returncode == 0 and "fits into 24.0 GiB" in done.stdout
    rows = ["base", "adapter", "optimizer", "activations", "accumulated gradients", "peak"]
    lines = done.stdout.splitlines()
    first = next(number for number, line in enumerate(lines) if "for training on a GPU, GiB" in line)
    assert [line.strip().rsplit(" ", 1)[0].strip() for line in lines[first + 1 : first + 7]] == rows


GIVEN = [  # totals counted by another program, on meta tensors: GiB with bf16 under autocast, rank 8, 1 row
    ("sd15", [], 2.72, 2.5),
    ("sdxl", ["train.gradient_checkpointing=blocks"], 5.67, 4.5),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "changes", "gib", "in_8_bits"), GIVEN)
def test_real_architectures_take_what_was_counted(
    tmp_path: Path, model: str, changes: list[str], gib: float, in_8_bits: float
) -> None:
    """And, with the base's linear layers in 8 bits, no more than that."""
    cfg = configured(model, real.outline(model, tmp_path), tmp_path, real.side_of(model), changes)
    base = Base.find(cfg.model)
    found = memory.predict(cfg, base, "cuda")
    assert found.peak / GIB == pytest.approx(gib, rel=0.03)
    small = found.stored(memory.weights_of(cfg, base, "int8"))
    assert small.peak <= in_8_bits * GIB
