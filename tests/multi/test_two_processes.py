"""Two real gloo processes: the same run as one, and one clear end when something is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from dbtrain.adapters.formats import peft_folder
from tests import bases
from tests.conftest import REAL_PHOTOS, Make, dbtrain, slow
from tests.runs import distance, relative, tree


def test_two_ranks_equal_one_rank_with_larger_micro_batches(
    make: Make, tmp_path: Path, prepared: Path
) -> None:
    shutil.copytree(prepared, tmp_path / "shards")
    make(train__steps=8, train__log_every=2)
    config = tmp_path / "c.yaml"
    assert dbtrain("train", config, f"run_dir={tmp_path / 'one'}", "train.micro_batch=4").returncode == 0
    assert (
        dbtrain("train", config, f"run_dir={tmp_path / 'two'}", "train.micro_batch=1", ranks=2).returncode
        == 0
    )
    assert relative(tmp_path / "one", tmp_path / "two") < 1e-3
    curves = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("one", "two")
    ]
    assert [line["step"] for line in curves[1]] == list(range(1, 9))
    assert [line["rows"] for line in curves[0]] == [line["rows"] for line in curves[1]]
    for name in ("loss", "loss_instance", "loss_prior", "grad_norm"):
        torch.testing.assert_close(
            *(torch.tensor([line[name] for line in curve]) for curve in curves), rtol=1e-4, atol=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_dropped_layers_are_those_of_one_rank(make: Make, tmp_path: Path, prepared: Path, kind: str) -> None:
    shutil.copytree(prepared, tmp_path / "shards")
    make(adapter__kind=kind, adapter__module_dropout=0.7, train__micro_batch=2)
    for name, ranks in (("one", 1), ("two", 2)):
        done = dbtrain("train", tmp_path / "c.yaml", f"run_dir={tmp_path / name}", ranks=ranks)
        assert done.returncode == 0
    one, two = (peft_folder.read(tmp_path / name / "export" / "unet").tensors for name in ("one", "two"))
    assert distance(one, two) < 1e-3


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(make: Make, tmp_path: Path, prepared: Path) -> None:
    shutil.copytree(prepared, tmp_path / "shards")
    make(train__steps=4, loss__prior="prediction")
    config = tmp_path / "c.yaml"
    assert dbtrain("train", config, f"run_dir={tmp_path / 'one'}").returncode == 0
    for steps, ranks in ((2, 2), (4, 1)):
        done = dbtrain("train", config, f"run_dir={tmp_path / 'mixed'}", f"train.steps={steps}", ranks=ranks)
        assert done.returncode == 0
    assert relative(tmp_path / "one", tmp_path / "mixed") < 1e-3


@pytest.mark.parametrize("pictures", [False, slow(True)], ids=["latents", "pictures"])
def test_prepare_gives_the_same_files_on_one_and_two_ranks(
    make: Make, tmp_path: Path, pictures: bool
) -> None:
    make(prepare__sampling__batch=3, prepare__class_pictures=pictures)
    config = tmp_path / "c.yaml"
    for ranks in (1, 2):
        done = dbtrain(
            "prepare", config, f"data.shards={tmp_path / f'shards{ranks}'}",
            f"prepare.class_dir={tmp_path / f'class{ranks}'}", ranks=ranks,
        )  # fmt: skip
        assert done.returncode == 0
    for kind in ("shards", "class"):
        one, two = (tree(tmp_path / f"{kind}{ranks}") for ranks in (1, 2))
        for files in (one, two):  # the manifest remembers what was asked for: another class_dir
            text = files.pop("manifest.json", b"{}").replace(b"/class2", b"/class1")
            files["manifest.json"] = text
        assert one == two, kind
    assert len(tree(tmp_path / "class2")) == 8 + 1


@pytest.mark.slow
@pytest.mark.skipif(not REAL_PHOTOS.is_dir(), reason="needs the real photos")
def test_the_main_job_on_real_photos(make: Make, tmp_path: Path) -> None:
    """The README's promise: photos in, on two processes, a file out that a stock pipeline loads."""
    from diffusers import StableDiffusionPipeline
    from peft.tuners.lora import LoraLayer

    make(prepare__photos=str(REAL_PHOTOS / "dog6"), sample__prompts=["a photo of sks dog"])
    done = dbtrain("run", tmp_path / "c.yaml", ranks=2)
    assert done.returncode == 0
    pipe = StableDiffusionPipeline.from_pretrained(bases.sd(), dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.as_tensor(
            pipe("a dog", num_inference_steps=2, generator=generator, output_type="np").images[0]
        )

    before = draw()
    pipe.load_lora_weights(tmp_path / "run" / "export")
    assert not torch.equal(draw(), before)
    scalings = {v for m in pipe.unet.modules() if isinstance(m, LoraLayer) for v in m.scaling.values()}
    assert scalings == {2.0}
    assert (tmp_path / "run" / "samples" / "step-000004" / "sheet.png").is_file()
    again = dbtrain("run", tmp_path / "c.yaml", ranks=2)
    assert again.returncode == 0
    assert again.stderr.count("nothing to ") == 3


@pytest.mark.slow
def test_an_error_on_all_ranks_is_told_once(make: Make, tmp_path: Path, prepared: Path) -> None:
    shutil.copytree(prepared, tmp_path / "shards")
    make()
    done = dbtrain("train", tmp_path / "c.yaml", "train.global_batch=3", ranks=2, cold=True)
    assert done.returncode != 0
    told = "error: train.global_batch is 3, which 2 ranks x train.micro_batch 1 cannot share"
    assert sum(line.startswith(told) for line in done.stderr.splitlines()) == 1
    assert f"traceback : {told}" in done.stderr.partition("Root Cause")[2], "torchrun's report has it too"
    assert "exitcode  : 2" in done.stderr.replace("\t", " ")
    assert 'File "' not in done.stderr.split(told)[0]


@pytest.mark.slow
def test_an_error_on_one_rank_ends_both_and_has_the_rank_s_name(
    make: Make, tmp_path: Path, prepared: Path
) -> None:
    """A shard that only rank 1 reads is damaged."""
    shards = Path(shutil.copytree(prepared, tmp_path / "shards"))
    bad = next(shards.glob("class-00001-*.tar"))
    data = bytearray(bad.read_bytes())
    data[600] ^= 1
    bad.write_bytes(data)
    make()
    done = dbtrain("train", tmp_path / "c.yaml", ranks=2)
    assert done.returncode != 0
    assert f"error: rank 1: shard {bad} was altered" in done.stderr
    assert not (tmp_path / "run" / "DONE").exists()
