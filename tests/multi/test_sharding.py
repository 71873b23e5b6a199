"""Sharded training: bit for bit as with whole weights, whatever is sharded, on however many ranks.

With DBTRAIN_SHARDING every family, storage, number of ranks and compiler is tried, else some.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest

from dbtrain.config import Model
from dbtrain.config.training import Train
from dbtrain.models.base import Base
from dbtrain.prepare.prepare import prepare
from tests import bases
from tests.conftest import ROOT, config_in, finished
from tests.runs import relative, tree
from tests.session import once
from tests.train.test_training_adapter import written

FAMILIES = ("sd", "sdxl", "flux1", "qwen-image", "chroma")
LINEARS = get_args(Train.model_fields["base_linears"].annotation)
ALL = "DBTRAIN_SHARDING" in os.environ
EVERY = [*itertools.product(FAMILIES, LINEARS)] if ALL else []
COMBINATIONS = {
    2: EVERY or [("sdxl", "int8"), ("chroma", "full"), ("flux1", "full")],
    4: EVERY or [("sd", "full"), ("qwen-image", "nf4")],
}
SETTINGS: dict[str, Any] = {
    "loss__prior": "none", "train__steps": 4, "train__global_batch": 8, "train__checkpoint_every": 2,
    "train__gradient_checkpointing": "blocks", "sample__steps": 2,
}  # fmt: skip
# Its ranks have rows of one length of prompts, or of two.
OF_ONE: dict[str, dict[str, Any]] = {"chroma": {"data__prompt_dropout": 0.5, "train__micro_batch": 2}}
PICTURES = {  # three batches, which 2 and 4 ranks share unevenly
    "validation__prompts": ["a dog", "a cat", "sks dog"], "validation__images": 1, "validation__every": 4,
    "prepare__held_out": 1,
}  # fmt: skip


def config(name: str, photos: Path, class_dir: Path) -> Path:
    """The config of a base, with its shards."""

    def fill(folder: Path) -> None:
        base = {"model__path": str(bases.OF_FAMILY[name]()), "prepare__resolution": bases.SIDES[name]}
        prepare(config_in(folder, photos, class_dir, **SETTINGS | PICTURES | base | OF_ONE.get(name, {})))

    return once(f"sharding-{name}", fill) / "c.yaml"


def run(folder: Path, ranks: int, plan: Sequence[Sequence[object]]) -> str:
    """Several runs, one after the other, in one launch; returns what they say."""
    path = folder / "plan.json"
    path.write_text(json.dumps([[str(word) for word in line] for line in plan]))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    if ranks == 1:
        torchrun = []
    script = str(ROOT / "tests" / "multi" / "sharded.py")
    done = finished([sys.executable, *torchrun, script, str(path)], RANK="0")
    assert done.returncode == 0
    return done.stdout + done.stderr


def results(run: Path) -> dict[str, bytes]:
    """Weights, moments, losses and pictures; not the summary, which names the folder."""
    kept = (".safetensors", ".png", "metrics.jsonl", "validation.jsonl")
    return {name: data for name, data in tree(run).items() if name.endswith(kept)}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", COMBINATIONS)
def test_sharded_runs_are_those_with_whole_weights(
    tmp_path: Path, photos: Path, class_dir: Path, ranks: int
) -> None:
    """Four steps with accumulation, held-out losses, and validation images.

    With checkpointing if all blocks are sharded, and without if one stays whole, where the base is asked for
    its predictions too.
    """
    ways = ("none", "all", "node")[: 3 if ranks > 2 else 2]
    plan = [
        (config(name, photos, class_dir), f"run_dir={tmp_path / f'{name}-{storage}-{way}'}",
         f"train.base_linears={storage}", f"train.shard={way}", f"kept={number % 2}",
         f"train.gradient_checkpointing={'none' if number % 2 else 'blocks'}",
         f"loss.prior={'prediction' if number % 2 else 'none'}")
        for number, (name, storage) in enumerate(COMBINATIONS[ranks]) for way in ways
    ]  # fmt: skip
    run(tmp_path, ranks, plan)
    for name, storage in COMBINATIONS[ranks]:
        whole, *others = (results(tmp_path / f"{name}-{storage}-{way}") for way in ways)
        assert len(whole) > 10
        for other in others:
            assert whole.keys() == other.keys()
            assert not [file for file in whole if whole[file] != other[file]], (name, storage)


@pytest.mark.slow
def test_a_run_moves_between_ways_and_numbers_of_ranks(tmp_path: Path, photos: Path, class_dir: Path) -> None:
    path = config("flux1", photos, class_dir)
    there, back = (
        [path, f"run_dir={tmp_path / name}", f"train.shard={how}"]
        for name, how in (("there", "all"), ("back", "none"))
    )
    run(tmp_path, 4, [[*there, "until=2"]])
    run(tmp_path, 1, [[path, f"run_dir={tmp_path / 'one'}"], [*there[:2]], [*back, "until=2"]])
    run(tmp_path, 4, [[*back[:2], "train.shard=all"]])
    for name in ("there", "back"):
        assert relative(tmp_path / "one", tmp_path / name) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", *["inductor"] * ALL])
def test_compiled_blocks_are_sharded_too(tmp_path: Path, photos: Path, class_dir: Path, backend: str) -> None:
    path = config("flux1", photos, class_dir)
    ways = (("none", "false"), ("all", "regional"))  # whole ones compiled: tests/train/test_modes.py
    run(tmp_path, 2, [[path, f"run_dir={tmp_path / way}", f"train.shard={way}", f"train.compile={compiled}",
                       "train.steps=2", "validation.prompts=[]", "kept=1", f"backend={backend}"]
                      for way, compiled in ways])  # fmt: skip
    assert relative(*(tmp_path / way for way, _ in ways)) < 1e-5


@pytest.mark.slow
def test_as_many_blocks_stay_whole_as_all_gpus_have_room_for(
    tmp_path: Path, photos: Path, class_dir: Path
) -> None:
    """One has room for all blocks, but the other for none; then both have."""
    path, words = config("flux1", photos, class_dir), ("train.shard=all", "train.steps=1")
    said = run(tmp_path, 2, [
        [path, f"run_dir={tmp_path / gpus}", *words, "validation.prompts=[]", f"gpus={gpus}"]
        for gpus in ("2,0.1", "2,2")
    ])  # fmt: skip
    assert re.findall(r"each rank holds (\d) of 3 blocks whole", said) == ["0", "3"]
    assert results(tmp_path / "2,0.1") == results(tmp_path / "2,2")


@pytest.mark.slow
def test_a_training_adapter_is_merged_into_rows_and_left_out_of_images(
    tmp_path: Path, photos: Path, class_dir: Path
) -> None:
    base = Base.find(Model(path=str(bases.flux1())))
    adapter, path = written(base, tmp_path / "adapter"), config("flux1", photos, class_dir)
    run(tmp_path, 2, [
        [path, f"run_dir={tmp_path / way}", f"train.shard={way}", "train.base_linears=int8", "train.steps=2",
         f"model.training_adapter={adapter}", "kept=1"] for way in ("none", "all")
    ])  # fmt: skip
    assert results(tmp_path / "none") == results(tmp_path / "all")
