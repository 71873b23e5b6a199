"""Speed that does not depend on the machine: what a step launches, sends, reads and compiles, counted."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft.tuners.lora import LoraLayer

from dbtrain.adapters import inject as adapters
from dbtrain.config import Adapter, Config, Train
from dbtrain.data.batch import Batch
from dbtrain.data.shards import Row
from dbtrain.models.ddpm import DDPM
from dbtrain.models.families import registry as families
from dbtrain.models.families.space import LatentSpace
from dbtrain.models.precision import PRECISIONS
from dbtrain.runtime.rng import RowNoise
from dbtrain.train.checkpoint import Progress
from dbtrain.train.dreambooth import DreamBooth
from dbtrain.train.step import compute_step
from tests import bases
from tests.conftest import ROOT, Make, finished, slow
from tests.networks import Dispatched


def denoiser() -> UNet2DConditionModel:
    """SD 1.5's structure, every layer of it, with 32 channels instead of 320 to 1280."""
    return UNet2DConditionModel(
        block_out_channels=(32, 32, 32, 32), cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8
    ).requires_grad_(False)


def network(precision: str) -> DreamBooth:
    unet = denoiser().to(PRECISIONS[precision].dtype)
    adapters.attach(unet, Adapter(rank=8), "denoiser", 0)
    objective = DDPM(torch.linspace(0.99, 0.01, 1000), "epsilon", None)
    table = {"prompt_embeds": torch.randn(1, 77, 32)}
    space = LatentSpace((4, 32, 32), (0.18215,))
    return DreamBooth(
        families.get("sd"), unet, {}, {32 * 32: objective}, table, space, dtype=PRECISIONS[precision].dtype
    )


def batch() -> Batch:
    latent = torch.randn(4, 32, 32)
    row = Row({"mean": latent, "std": latent.abs()}, {"prompt": 0})
    noise = RowNoise(torch.tensor(0.5), latent, latent, torch.tensor(1.0))
    return Batch.collate([row], [noise], [{}], weights=[1.0], positions=[1])


def bare(dtype: torch.dtype) -> int:
    """Operators of the denoiser's own forward and backward pass."""
    unet, x = denoiser().to(dtype), torch.randn(1, 4, 32, 32, dtype=dtype, requires_grad=True)
    with Dispatched() as mode:
        out = unet(x, torch.tensor([5]), torch.randn(1, 77, 32, dtype=dtype), return_dict=False)[0]
        out.float().square().mean().backward()
    return mode.total


# Of each LoRA layer: forward, two products, a scale and a sum; backward, four products, a scale and the
# sum with the base's gradient.
LORA_OPS = 10


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", *map(slow, ("fp32", "pure-bf16"))])
def test_a_micro_step_launches_the_denoiser_and_lora_and_little_else(precision: str) -> None:
    """No weight of the base is cast again, no input of an adapter, and no adapter but all at once."""
    train = Train(precision=precision, global_batch=1)
    cfg = Config(run_dir="x", model={"path": "tiny"}, data={"shards": "y"}, train=train)
    model = network(precision)
    progress = Progress.begin(model, cfg)
    compute_step(model, progress, [batch()], cfg)
    with Dispatched() as one:
        compute_step(model, progress, [batch()], cfg)
    layers = sum(isinstance(module, LoraLayer) for module in model.modules())
    assert layers == 128
    needed = bare(PRECISIONS[precision].dtype) + layers * LORA_OPS
    assert one.total <= 1.10 * needed, one.count.most_common(30)
    assert one.count["_to_copy"] <= 12
    assert one.count["_local_scalar_dense"] == 0, "the host waits for nothing"
    assert one.count["_fused_adamw_"] == 1 and one.count["_foreach_norm"] == 1

    with Dispatched() as two:  # one more micro-batch adds to each gradient, and casts nothing again
        compute_step(model, progress, [batch(), batch()], cfg)
    assert two.total - one.total <= 1.10 * needed + 2 * layers
    assert two.count["_fused_adamw_"] == 1


def test_prodigy_and_a_moving_average_take_few_launches_and_no_host_reads() -> None:
    """Whatever the number of weights, but where bad steps are skipped: that asks of each gradient."""
    cfg = Config(run_dir="x", model={"path": "tiny"}, data={"shards": "y"},
                 train=Train(precision="fp32", ema=0.9), optim={"name": "prodigy"})  # fmt: skip
    progress = Progress.begin(network("fp32"), cfg)
    parameters = progress.model.trainable().values()
    for skipping, most in ((False, 80), (True, 80 + len(parameters))):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        if skipping:
            progress.optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
        else:
            progress.optimizer.step()  # makes its moments
        assert progress.ema
        with Dispatched() as mode:
            progress.optimizer.step()
            progress.ema.update()
        assert len(parameters) == 256 and mode.total < most, mode.count.most_common(30)
        assert mode.count["_local_scalar_dense"] == 0


@pytest.mark.slow
def test_the_count_sees_what_autocast_costs() -> None:
    """The limit above is one that a step as autocast would have it does not keep."""
    unet = denoiser().bfloat16()
    adapters.attach(unet, Adapter(rank=8), "denoiser", 0)
    with Dispatched() as mode:
        with torch.amp.autocast("cpu", torch.bfloat16):
            out = unet(
                torch.randn(1, 4, 32, 32), torch.tensor([5]), torch.randn(1, 77, 32), return_dict=False
            )[0]
        out.float().square().mean().backward()
    assert mode.total > 1.25 * (bare(torch.bfloat16) + 128 * LORA_OPS)


def counted(make: Make, folder: Path, prepared: Path, *overrides: str) -> Any:
    """Real steps of two ranks: DDP, LoRA, accumulation, gradient checkpointing."""
    shutil.copytree(prepared, folder / "shards", dirs_exist_ok=True)
    make(
        model__path=str(bases.sd(size="slim")), train__global_batch=8, train__micro_batch=2,
        train__gradient_checkpointing="blocks", train__precision="bf16", adapter__rank=512,
    )  # fmt: skip
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    counting = ROOT / "tests" / "multi" / "counted.py"
    done = finished([sys.executable, *torchrun, str(counting), str(folder / "c.yaml"), *overrides])
    assert done.returncode == 0
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_one_all_reduce_a_step_one_graph_and_no_recompile(make: Make, tmp_path: Path, prepared: Path) -> None:
    found = counted(make, tmp_path, prepared, "train.compile=true")
    assert found["gradient_bytes"] > 2**20, "more than DDP's first bucket, which would be one of its own"
    assert found["all_reduces"] == 3, "one a step, of 3 steps with 2 micro-batches each"
    assert found["other_collectives"] == {}
    assert found["graph_breaks"] == 0
    assert found["graphs"] == [1, 1, 1], "one graph, in the first step"


@pytest.mark.slow
def test_a_sharded_step_gathers_each_block_twice_and_reduces_nothing_else(
    make: Make, tmp_path: Path, prepared: Path
) -> None:
    """Blocks before the first adapter have no backward pass, and those that stay whole are not gathered."""
    for kept, sharded in ((0, 5), (2, 3)):
        words = ("train.shard=all", "train.base_linears=int8", f"kept={kept}")
        found = counted(make, tmp_path, prepared, *words)
        forward, backward = found["blocks"]
        assert 0 < backward < forward == sharded
        assert found["other_collectives"] == {"gloo:all_gather": 3 * 2 * (forward + backward)}
        assert found["all_reduces"] == 3
        assert found["host_reads"] == 0, "the host waits for no GPU"
