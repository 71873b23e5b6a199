"""Side by side with Diffusers' script: its parts without the script, and a small run where it is at hand.

The small run needs DBTRAIN_REFERENCE (the script's path) and DBTRAIN_REFERENCE_PYTHON (a Python with
accelerate). `python -m tests.test_vs_diffusers`, where torchvision can be imported, prints KNOWN anew.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image
from torch import Tensor

from benchmarks import vs_diffusers
from benchmarks.common import Measure, Result
from benchmarks.side_by_side import compare, pages, runs, witness
from benchmarks.side_by_side.runs import HOOK, LORA, STANDIN, Reference, Run, Task
from dbtrain.config import Config
from dbtrain.models.base import Base
from tests.conftest import ROOT, Make

SCRIPT, PYTHON = os.environ.get("DBTRAIN_REFERENCE"), os.environ.get("DBTRAIN_REFERENCE_PYTHON")


def task(tmp_path: Path, **changes: Any) -> Task:
    (tmp_path / "photos").mkdir(exist_ok=True)
    for number in range(3):
        (tmp_path / "photos" / f"{number}.png").touch()
    given: dict[str, Any] = {
        "base": tmp_path / "base", "photos": tmp_path / "photos", "class_images": 8, "resolution": 64,
        "batch": 2, "accumulation": 1, "rank": 4, "lr": 2e-4, "steps": 10, "precision": "fp32", "threads": 1,
        "device": "cpu",
    }  # fmt: skip
    return Task(**(given | changes))


def a_run(folder: Path, cpu_ms: float, wall_ms: float = 10.0, cpu_s: float = 5.0, **seen: Any) -> Run:
    """A run of 10 steps; the first ends 2 CPU seconds after the start."""
    stamps = [(100 + k * wall_ms / 1000, 2 + k * cpu_ms / 1000) for k in range(10)]
    return Run(cpu_s * 2, cpu_s, {"stamps": stamps, "peak_rss_gib": 0.5, **seen}, folder)


# Figures.


def test_a_step_is_everything_between_two_steps(tmp_path: Path) -> None:
    run = a_run(tmp_path, 100)
    run.seen["stamps"][7:] = [(wall, cpu + 0.5) for wall, cpu in run.seen["stamps"][7:]]  # a slow step
    assert run.step(8)["cpu"] == pytest.approx(100)
    assert run.step(4)["cpu"] == pytest.approx(100 + 500 / 6)
    assert (run.start_cpu_s, run.after_cpu_s) == (2, pytest.approx(5 - 2 - 0.9 - 0.5))


def test_ratios_are_taken_from_pair_to_pair(tmp_path: Path) -> None:
    theirs = [a_run(tmp_path, ms) for ms in (200, 300, 240)]  # the machine slowed for the second pair
    ours = [a_run(tmp_path, ms) for ms in (100, 150, 120)]
    *sides, ratio = compare.rows("matched", theirs, ours, compare.steps(2), "step, CPU")
    assert [row.measures["step, CPU"].median for row in sides] == pytest.approx([240, 120])
    assert ratio.measures["step, CPU"].samples == pytest.approx((2, 2, 2))
    assert ratio.counts == {"verdict": "step, CPU: dbtrain is faster"}


@pytest.mark.parametrize(("ours", "said"), [
    ([1, 2, 3], "dbtrain is faster"), ([1, 2, 4.5], "no difference"), ([4, 5, 6], "no difference"),
    ([7, 8, 9], "the reference is faster"),
])  # fmt: skip
def test_what_is_inside_the_spread_is_no_difference(ours: list[float], said: str) -> None:
    assert compare.verdict(Measure.of("s", [4, 5, 6]), Measure.of("s", ours)) == said


def test_the_table_keeps_as_shipped_and_compute_matched_apart(tmp_path: Path) -> None:
    found = vs_diffusers.Found(
        shipped=[a_run(tmp_path, 200, cpu_s=30)], ours=[a_run(tmp_path, 100, cpu_s=10)],
        matched=[a_run(tmp_path, 150)], floors=[(90.0, 75.0)],
    )  # fmt: skip
    rows = {row.label: row for row in vs_diffusers.tables(task(tmp_path), found)}
    shipped, matched = (rows[f"{kind}: reference / dbtrain"] for kind in ("as shipped", "compute-matched"))
    assert shipped.measures["photos → adapter, CPU"].median == 3
    assert shipped.measures["step, CPU"].median == pytest.approx(2)
    assert matched.measures.keys() == {"step, CPU", "step, wall"}, "photos to adapter is never matched"
    assert matched.measures["step, CPU"].median == pytest.approx(1.5)
    assert rows["the denoiser alone, without adapter, forward and backward"].measures["step, CPU"].min == 75
    (limit,) = pages.limit([150, 160, 140], found.floors)
    assert "would be 1.67 times" in limit and "and 2.00 times" in limit


def test_matched_steps_are_counted_once_every_picture_was_seen(tmp_path: Path) -> None:
    assert vs_diffusers.windows(task(tmp_path, class_images=11, steps=60)) == (10, 10)
    assert vs_diffusers.windows(task(tmp_path, class_images=50, steps=60)) == (10, 25)
    with pytest.raises(SystemExit, match="only after 25 steps"):
        vs_diffusers.windows(task(tmp_path, class_images=50, steps=26))


# Equal work.


def test_the_lora_files_are_compared_by_name_and_shape(tmp_path: Path) -> None:
    old = {"unet.a.lora.down.weight": torch.full((2, 8), 3.0), "unet.a.lora.up.weight": torch.zeros(8, 2)}
    new = {"unet.a.lora_A.weight": torch.ones(2, 8), "unet.a.lora_B.weight": torch.full((8, 2), 0.5)}
    for name, tensors in (("old", old), ("new", new)):
        (tmp_path / name).mkdir()
        safetensors.torch.save_file(tensors, tmp_path / name / LORA)
    found = compare.files(tmp_path / "old", tmp_path / "new")
    assert found["same names and shapes"] and found["parameters"] == (32, 32)
    assert found["norm of the down projections"] == (12, 4)
    assert found["norm of the up projections"] == (0, 2)
    safetensors.torch.save_file({**new, "unet.b.lora_A.weight": torch.ones(1, 1)}, tmp_path / "new" / LORA)
    found = compare.files(tmp_path / "old", tmp_path / "new")
    assert not found["same names and shapes"] and found["only in dbtrain's"] == ["unet.b.lora_A.weight"]


def test_gradients_are_compared_as_one_vector() -> None:
    theirs = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    found = witness.compare({name: 2 * tensor for name, tensor in theirs.items()}, theirs)
    assert found["gradient cosine"] == pytest.approx(1) and found["gradient norms, ratio"] == pytest.approx(2)
    assert found["gradient, relative gap"] == pytest.approx(1)
    turned = {"a": torch.tensor([0.0, 5.0]), "b": torch.tensor([0.0])}
    assert witness.compare(turned, theirs)["gradient cosine"] == pytest.approx(0)


def test_the_references_batch_is_taken_by_dbtrains_own_step(make: Make, prepared: Path) -> None:
    cfg = make(data__shards=str(prepared))
    model = witness._model(cfg)
    space = torch.randn(4, *model.family.space(Base.find(cfg.model), 64).shape)
    found = {"x0": space, "noise": torch.randn_like(space), "t": torch.tensor([5, 900, 5, 900])}
    batch = witness._batch(found, model, cfg)
    torch.testing.assert_close(model.x0(batch), space)
    assert model.objective.timesteps(batch.u).tolist() == [5, 900, 5, 900]
    assert model(batch).shape == (4,)


def test_settings_that_differ_are_said_so() -> None:
    same = {"optimizer: lr": (1e-4, 1e-4), "threads": (1, 1), "loss, mean of steps 1 to 2": ("1", "2")}
    assert pages.differences(same) == ""
    odd = {**same, "optimizer: dtypes": (["bfloat16"], ["float32"]), "threads": (1, 2)}
    assert pages.differences(odd) == (
        "threads: 1 against dbtrain's 2; optimizer: dtypes: ['bfloat16'] against dbtrain's ['float32']"
    )


def test_kernels_are_summed_by_what_they_are_for() -> None:
    kernels = {"aten::mkldnn_convolution": [28, 5.0], "aten::convolution_backward": [42, 4.0],
               "aten::addmm": [3, 2.0], "aten::view": [9, 1.0], "aten::add": [9, 0.5],
               "aten::addcmul_": [9, 0.25]}  # fmt: skip
    found = compare.grouped(kernels)
    assert (found["convolutions"], found["matrix products"], found["pointwise"]) == (9, 2, 0.5)
    assert (found["optimizer"], found["views and all else"]) == (0.25, 1)
    assert sum(found.values()) == sum(ms for _, ms in kernels.values())


def test_loss_curves_are_compared_by_quarters(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lines = [json.dumps({"step": k + 1, "loss": 1.0}) for k in range(8)]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    theirs = a_run(tmp_path, 1, losses=[0.0, 2.0] * 4)
    found = compare.losses(theirs, a_run(tmp_path, 1))
    assert next(iter(found)) == "loss, mean of steps 1 to 2" and len(found) == 4
    assert found["loss, mean of steps 7 to 8"] == ("1.0000 ± 1.0000", "1.0000 ± 0.0000")


def test_both_are_given_the_same_task(tmp_path: Path) -> None:
    asked = task(tmp_path, accumulation=3, precision="bf16", threads=2)
    words = Reference(Path("script.py"), "python", True).command(asked, tmp_path / "c", tmp_path / "o", 7)
    flags = dict(itertools.pairwise(words))
    made = runs.settings(asked, tmp_path / "c", tmp_path, 7)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(made))
    cfg = Config.load(tmp_path / "config.yaml", ())
    assert cfg.prepare is not None
    assert (
        words.count("--mixed_precision") == 2 and flags["--mixed_precision"] == "bf16" == cfg.train.precision
    )
    assert "--cpu" in words and flags["--num_cpu_threads_per_process"] == "2"
    assert int(flags["--train_batch_size"]) == 2 == cfg.train.micro_batch
    assert int(flags["--gradient_accumulation_steps"]) * 2 == 6 == cfg.train.global_batch
    assert int(flags["--rank"]) == cfg.adapter.rank and cfg.adapter.alpha is None  # alpha is the rank in both
    assert float(flags["--learning_rate"]) == cfg.optim.lr and cfg.optim.schedule == "constant"
    assert int(flags["--max_train_steps"]) == cfg.train.steps and int(flags["--seed"]) == cfg.seed
    assert flags["--class_prompt"] == cfg.prepare.class_prompt
    assert flags["--instance_prompt"] == cfg.prepare.instance_prompt
    assert flags["--class_data_dir"] == cfg.prepare.class_dir
    assert int(flags["--num_class_images"]) == cfg.prepare.class_images
    assert (int(flags["--resolution"]), "--center_crop" in words) == (cfg.prepare.resolution, True)
    assert cfg.prepare.crop == "center" and float(flags["--prior_loss_weight"]) == cfg.loss.prior_weight
    plain = Reference(Path("s.py"), "python", True).command(task(tmp_path), tmp_path, tmp_path, 0)
    assert plain[plain.index("--mixed_precision") + 1] == "no"


def test_a_reference_that_cannot_run_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--script is .*none.py"):
        Reference.find(tmp_path / "none.py", sys.executable)
    script, fake = tmp_path / "script.py", tmp_path / "python"
    script.touch()
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    with pytest.raises(RuntimeError, match="cannot import accelerate"):
        Reference.find(script, str(fake))


# The hook.


def watched(tmp_path: Path, program: str, **asked: Any) -> dict[str, Any]:
    """What the hook saw of a program in a process of its own."""
    (tmp_path / "program.py").write_text(program)
    out = tmp_path / "seen.json"
    env = {**os.environ, "PYTHONPATH": str(HOOK), "OMP_NUM_THREADS": "1",
           "SIDE_BY_SIDE": json.dumps({"out": str(out), "first": 1, **asked})}  # fmt: skip
    done = subprocess.run([sys.executable, str(tmp_path / "program.py")], env=env, cwd=tmp_path,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


STEPS = """
import torch, time
weight = torch.nn.Parameter(torch.ones(4, 3))
optimizer = torch.optim.AdamW([weight], lr=0.5, weight_decay=0.25)
for number in range(3):
    weight.grad = torch.ones(4, 3)
    optimizer.step()
    until = time.process_time() + 0.05
    while time.process_time() < until: pass
"""


def test_the_hook_stamps_every_step_of_an_unchanged_program(tmp_path: Path) -> None:
    seen = watched(tmp_path, STEPS, steps=3, count=2)
    assert len(seen["stamps"]) == 3 and seen["threads"] == 1
    gaps = [after[1] - before[1] for before, after in zip(seen["stamps"], seen["stamps"][1:], strict=False)]
    assert all(0.05 <= gap < 0.5 for gap in gaps)
    about = seen["optimizer"]
    assert (about["kind"], about["parameters"], about["dtypes"]) == ("AdamW", 12, ["float32"])
    assert (about["lr"], about["weight_decay"]) == (0.5, 0.25)
    assert seen["operators"]["aten.ones.default"] == 1, "one step's operators, not more"


def test_without_a_task_the_hook_does_nothing() -> None:
    env = {**os.environ, "PYTHONPATH": str(HOOK)}
    line = "import sys; print('torch' in sys.modules, any('sitecustomize' in str(f) for f in sys.meta_path))"
    done = subprocess.run([sys.executable, "-c", line], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


VAE = """
import torch
from diffusers import AutoencoderKL
torch.manual_seed(0)
vae = AutoencoderKL(block_out_channels=(32,), sample_size=8).eval()
real = vae._encode
images = torch.rand(3, 3, 8, 8)
calls = []
vae._encode = lambda x: calls.append(len(x)) or real(x)
weight = torch.nn.Parameter(torch.ones(1))
optimizer = torch.optim.AdamW([weight])
with torch.no_grad():
    for rows in ([0, 1], [1, 0], [2, 1]):
        mean = vae.encode(images[rows]).latent_dist.mean
        torch.testing.assert_close(mean, real(images[rows]).chunk(2, dim=1)[0])
        weight.grad = torch.ones(1)
        optimizer.step()
assert calls == [1, 1, 1], calls
"""


def test_the_stubbed_vae_encodes_each_image_once_and_gives_what_the_vae_gave(tmp_path: Path) -> None:
    seen = watched(tmp_path, VAE, steps=3, stub_vae=True)
    assert seen["encoded_at"] == [1, 1, 3]


ASKING = """
import importlib.util
import itertools
assert importlib.util.find_spec("torchvision") is None, "libraries that ask would use what is not there"
from torchvision import transforms
assert transforms.__file__.startswith(%r)
import torch
optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
optimizer.step()
"""


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
def test_the_stand_in_is_found_by_import_only(tmp_path: Path) -> None:
    watched(tmp_path, ASKING % str(STANDIN), steps=1, standin=str(STANDIN))


# The stand-in for torchvision.

# First 12 hex digits of sha256 over the result's shape and fp32 bytes, made with torchvision 0.28.0.
KNOWN = {
    "wide bilinear": "f2b5f1694a15", "wide bicubic": "06408fdfbef9", "wide lanczos": "62e82c9e0724",
    "wide nearest": "5f943eb4c82e", "wide random": "73922f572553",
    "tall bilinear": "ae48392ecc7d", "tall bicubic": "12448f31521d", "tall lanczos": "3448eb34ceb7",
    "tall nearest": "6191a4c9cc6c", "tall random": "aebfdab9ee56",
}  # fmt: skip


def standin() -> ModuleType:
    path = STANDIN / "torchvision" / "transforms.py"
    spec = importlib.util.spec_from_file_location("standin_transforms", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def picture(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    values = np.stack([x * 7 + y * 3, x * y, x * 5 - y * 11], axis=-1) % 256
    return Image.fromarray(values.astype(np.uint8))


def results(transforms: Any) -> dict[str, Tensor]:
    """What a torchvision makes of two pictures, in all the ways that a training script may ask for."""
    found = {}
    mode = transforms.InterpolationMode
    for name, photo in (("wide", picture(51, 34)), ("tall", picture(33, 47))):
        for how in (mode.BILINEAR, mode.BICUBIC, mode.LANCZOS, mode.NEAREST):
            chain = [transforms.Resize(16, interpolation=how), transforms.CenterCrop(16),
                     transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]  # fmt: skip
            found[f"{name} {how.value}"] = transforms.Compose(chain)(photo)
        torch.manual_seed(3)
        chain = [transforms.Resize((20, 24)), transforms.RandomCrop(15), transforms.RandomHorizontalFlip(),
                 transforms.ToTensor()]  # fmt: skip
        found[f"{name} random"] = torch.stack([transforms.Compose(chain)(photo) for _ in range(4)])
    return found


def digests(found: dict[str, Tensor]) -> dict[str, str]:
    return {
        name: hashlib.sha256(str(tuple(t.shape)).encode() + t.contiguous().numpy().tobytes()).hexdigest()[:12]
        for name, t in found.items()
    }


def test_the_stand_in_gives_torchvisions_pictures_bit_for_bit() -> None:
    found = results(standin())
    assert digests(found) == KNOWN
    assert all(found[name].shape == (3, 16, 16) and found[name].min() < -0.5 for name in ("wide bilinear",))


def test_the_stand_in_refuses_what_it_does_not_offer() -> None:
    transforms = standin()
    with pytest.raises(NotImplementedError, match="padding"):
        transforms.CenterCrop(40)(picture(51, 34))
    with pytest.raises(NotImplementedError, match="mode"):
        transforms.ToTensor()(Image.new("I;16", (4, 4)))


# The whole.


@pytest.mark.slow
@pytest.mark.skipif(
    not (SCRIPT and PYTHON), reason="DBTRAIN_REFERENCE and DBTRAIN_REFERENCE_PYTHON are not set"
)
def test_a_small_run_beside_the_reference(tmp_path: Path) -> None:
    words = ["--smoke", "--out", str(tmp_path), "--script", str(SCRIPT), "--python", str(PYTHON)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.vs_diffusers", *words], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = Result.read(tmp_path / "vs_diffusers-tiny-fp32-cpu.json")
    told = {row.label: row.config for row in found.rows}["equal work (below)"]
    assert told["same tensors in both LoRA files"] is True
    assert told["gradients"]["gradient cosine"] > 0.9999
    assert told["facts"]["optimizer: parameters"][0] == told["facts"]["optimizer: parameters"][1] > 0
    assert any("photos → adapter, CPU" in row.measures for row in found.rows)


def test_smoke_is_small() -> None:
    usual = vs_diffusers.words().parse_args(["--script", "x.py"])
    assert usual.steps == 100 and usual.repeats >= 3 and usual.batch == 2
    small = vs_diffusers.small(Namespace(**{**vars(usual), "smoke": True}))
    assert small.steps < 10 and small.repeats == 1 and vs_diffusers.small(usual) is usual


if __name__ == "__main__":
    from torchvision import transforms as real

    print(json.dumps(digests(results(real)), indent=4))
