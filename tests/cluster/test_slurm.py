"""Batch jobs on a real SLURM: many nodes, preemption of every kind, requeue, arrays."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dbtrain.tiny import world
from tests import eyes
from tests.cluster.machines import Cluster
from tests.conftest import LONG, ROOT, Make, dbtrain
from tests.runs import EXPORT, relative, tree

pytestmark = pytest.mark.xdist_group("slurm")  # they share what takes long to make

TRAIN, PREPARE, ARRAY, FLEET, DREAMBENCH = (
    ROOT / "launch" / f"{name}.sbatch" for name in ("train", "prepare", "array", "fleet", "dreambench")
)
minutes = pytest.mark.skipif("DBTRAIN_CLUSTER" not in os.environ, reason="minutes: DBTRAIN_CLUSTER=1 runs it")
TWO = ("--nodes=2", "--ntasks-per-node=1")


@pytest.fixture
def config(make: Make, tmp_path: Path) -> Path:
    """The quickstart's subject."""
    world.main(tmp_path / "photos", "mug")
    make(
        prepare__photos=str(tmp_path / "photos"), prepare__instance_prompt="a photo of sks mug",
        prepare__class_prompt="a photo of a mug", prepare__class_images=2,
        train__steps=80, train__checkpoint_every=80, train__log_every=1, faults__stop_before_s=10.0,
    )  # fmt: skip
    return tmp_path / "c.yaml"


def until(there: Callable[[], Any], seconds: float = LONG) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.1)


def steps_done(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.slow
def test_two_nodes_train_what_one_does(slurm: Cluster, config: Path, tmp_path: Path) -> None:
    """Also if the ranks of each node share the frozen weights. With torchrun: tests/test_readme.py."""
    line = [config, "train.steps=6"]
    job = slurm.submit("--nodes=2", "--ntasks-per-node=2", TRAIN, *line, "train.shard=node", cwd=tmp_path,
                       STARTER="srun", RANKS_PER_NODE="2")  # fmt: skip
    assert slurm.wait(job)["JobState"] == "COMPLETED"
    said = (tmp_path / f"dbtrain-{job}.out").read_text()
    assert "4 ranks on cpu, frozen weights sharded over 2 ranks\n" in said
    for name, ranks in (("one", 4), ("alone", 1)):
        assert dbtrain("run", *line, f"run_dir={tmp_path / name}", ranks=ranks).returncode == 0
    assert (tmp_path / "run" / EXPORT).read_bytes() == (tmp_path / "one" / EXPORT).read_bytes()
    assert relative(tmp_path / "alone", tmp_path / "run") < 1e-3
    logs = [path for path in (tmp_path / "logs").rglob("*") if path.is_file()]
    assert sum(path.name.startswith("rank") for path in logs) == 4


@minutes
@pytest.mark.slow
@pytest.mark.parametrize(("starter", "time", "hows"), [
    ("torchrun", "1:00:00", ("priority", "requeue", "signal")), ("srun", "1", ("time limit", "signal"))
])  # fmt: skip
def test_a_preempted_job_goes_on_by_itself(
    slurm: Cluster, config: Path, tmp_path: Path, starter: str, time: str, hows: tuple[str, ...]
) -> None:
    """By a more important job, by hand, by a signal, and by its time limit: to the very same adapter."""
    settings = ["train.steps=600", "train.checkpoint_every=600"]
    if "time limit" in hows:
        settings.append("faults.stop_before_s=40")  # of the minute that the job has
    job = slurm.submit(*TWO, f"--time={time}", TRAIN, config, *settings, cwd=tmp_path, STARTER=starter)
    run = tmp_path / "run"
    for how in hows:
        before = steps_done(run)
        until(lambda before=before: steps_done(run) >= before + 5)  # type: ignore[misc]
        restarts = int(slurm.job(job)["Restarts"])
        if how == "priority":
            urgent = slurm.submit(
                "--partition=urgent", "--exclusive", *TWO, "--wrap", "sleep 1", cwd=tmp_path
            )
            assert slurm.wait(urgent)["JobState"] == "COMPLETED"
        elif how == "requeue":
            slurm.call("exec", "scontrol", "requeue", job)
        elif how == "signal":
            slurm.preempt(job, tmp_path)
        until(lambda restarts=restarts: int(slurm.job(job)["Restarts"]) > restarts)  # type: ignore[misc]
    ended = slurm.wait(job)
    assert ended["JobState"] == "COMPLETED" and int(ended["Restarts"]) >= len(hows)
    said = (tmp_path / f"dbtrain-{job}.out").read_text()
    reasons = {
        "priority": "SIGTERM",
        "requeue": "SIGTERM",
        "signal": "SIGUSR1",
        "time limit": "the job's time",
    }
    for how in hows:
        assert f"{reasons[how]} at step" in said
    assert said.count("checkpoint saved") >= len(hows) <= said.count("resuming from step")
    assert not (run / "PREEMPTED").exists()
    whole = ["train", config, f"run_dir={tmp_path / 'whole'}", *settings]
    assert dbtrain(*whole, ranks=2).returncode == 0
    assert (run / EXPORT).read_bytes() == (tmp_path / "whole" / EXPORT).read_bytes()
    assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


@minutes
@pytest.mark.slow
def test_a_lost_node_is_replaced_and_the_job_goes_on(slurm: Cluster, config: Path, tmp_path: Path) -> None:
    job = slurm.submit(*TWO, TRAIN, config, "train.steps=200", "train.checkpoint_every=10",
                       "faults.timeout_s=20", cwd=tmp_path)  # fmt: skip
    run = tmp_path / "run"
    until(lambda: (run / "checkpoints" / "step-000010").exists())
    slurm.call("node-down", "n2")
    until(lambda: slurm.job(job)["JobState"] in ("PENDING", "REQUEUED", "COMPLETING"))
    slurm.call("node-up", "n2")
    ended = slurm.wait(job)
    assert ended["JobState"] == "COMPLETED" and int(ended["Restarts"]) >= 1
    assert "resuming from step" in (tmp_path / f"dbtrain-{job}.out").read_text()
    whole = ["train", config, f"run_dir={tmp_path / 'whole'}", "train.steps=200"]
    assert dbtrain(*whole, ranks=2).returncode == 0
    assert (run / EXPORT).read_bytes() == (tmp_path / "whole" / EXPORT).read_bytes()


@pytest.mark.slow
def test_an_array_of_subjects_shares_its_class_images(slurm: Cluster, config: Path, tmp_path: Path) -> None:
    names = ("mug", "ball")
    lines = []
    for name in names:
        world.main(tmp_path / "photos" / name, name)
        lines.append(f"{name}  '{tmp_path / 'photos' / name}'\tthing\n")
    (tmp_path / "subjects").write_text("".join(lines))
    array = slurm.submit(
        "--array=1-2", ARRAY, "subjects", config, f"prepare.class_dir={tmp_path / 'class'}",
        "prepare.class_images=10", "prepare.sampling.batch=1", "train.steps=2", cwd=tmp_path,
    )  # fmt: skip
    until(lambda: slurm.call("exec", "squeue", "-h", "-j", array) == "")
    said = [(tmp_path / f"subjects-{array}_{k}.out").read_text() for k in (1, 2)]
    print(*said, sep="\n\n")
    assert all((tmp_path / "runs" / name / "DONE").exists() for name in names)
    assert sum("10 to generate" in text for text in said) == 1, "one task makes them, the others wait"
    made = [key for key in tree(tmp_path / "class") if key.endswith(".safetensors")]
    assert len(made) == 10
    exports = {(tmp_path / "runs" / name / EXPORT).read_bytes() for name in names}
    assert len(exports) == 2


@pytest.mark.slow
def test_a_fleet_that_is_preempted_goes_on_by_itself(slurm: Cluster, tmp_path: Path) -> None:
    """On two nodes, with a config that leaves the words, photos and shards to the list."""
    names = ("mug", "ball", "boot")
    for name in names:
        world.main(tmp_path / "photos" / name, name)
    rows = ["name,photos,token,class", *(f"{name},photos/{name},sks,thing" for name in names)]
    (tmp_path / "subjects.csv").write_text("\n".join(rows))
    (tmp_path / "c.yaml").write_text(
        "run_dir: runs/fleet\nmodel: {path: tiny}\n"
        "prepare: {instance_prompt: 'a photo of {}', resolution: 64}\n"
        "train: {steps: 100, global_batch: 1, checkpoint_every: 100, precision: fp32}\n"
    )
    job = slurm.submit(*TWO, FLEET, "c.yaml", "subjects.csv", "--slots", "2", "loss.prior=none", cwd=tmp_path,
                       STARTER="srun")  # fmt: skip
    fleet = tmp_path / "runs" / "fleet"
    until(lambda: steps_done(fleet / "mug") >= 1)
    slurm.preempt(job, tmp_path)
    ended = slurm.wait(job)
    assert ended["JobState"] == "COMPLETED" and int(ended["Restarts"]) == 1
    assert all((fleet / name / "DONE").exists() and steps_done(fleet / name) == 100 for name in names)
    assert not (fleet / "PREEMPTED").exists()
    assert len({(fleet / name / EXPORT).read_bytes() for name in names}) == 3


def test_a_fleet_without_a_list_is_told_what_it_needs(slurm: Cluster, tmp_path: Path) -> None:
    job = slurm.submit(FLEET, "c.yaml", cwd=tmp_path)
    assert slurm.wait(job)["ExitCode"] == "2:0"
    said = (tmp_path / f"fleet-{job}.out").read_text()
    assert said.startswith("usage: sbatch launch/fleet.sbatch CONFIG SUBJECTS")


@pytest.mark.parametrize("restarts", [0, 20])
def test_a_preempted_job_that_is_not_requeued_did_not_succeed(tmp_path: Path, restarts: int) -> None:
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "scontrol").chmod(0o755)
    (tmp_path / "PREEMPTED").touch()
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "DBTRAIN_HOME": str(ROOT), "SLURM_JOB_ID": "7",
        "SLURM_JOB_END_TIME": "1", "SLURM_RESTART_COUNT": str(restarts),
    }  # fmt: skip
    script = f'source "{ROOT}/launch/slurm.sh"; requeue_if_preempted .; exit 0'
    done = subprocess.run(["bash", "-uc", script], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 75 and "submit" in done.stderr


REQUEUED = f"""#!/usr/bin/env bash
#SBATCH --requeue --open-mode=append --output=task-%a.out
DBTRAIN_HOME={ROOT}
source "$DBTRAIN_HOME/launch/slurm.sh"
echo "start ${{SLURM_RESTART_COUNT:-0}}"
mkdir -p "$SLURM_ARRAY_TASK_ID"
rm -f "$SLURM_ARRAY_TASK_ID"/PREEMPTED
if [[ $SLURM_JOB_ID == "$SLURM_ARRAY_JOB_ID" && -z ${{SLURM_RESTART_COUNT:-}} ]]; then
  touch "$SLURM_ARRAY_TASK_ID"/PREEMPTED
else
  until grep -qs "start 1" task-*.out; do sleep 0.5; done
fi
requeue_if_preempted "$SLURM_ARRAY_TASK_ID"
"""


@pytest.mark.slow
def test_a_task_of_an_array_puts_only_itself_back(slurm: Cluster, tmp_path: Path) -> None:
    """Also the one whose job has the whole array's number."""
    (tmp_path / "job.sbatch").write_text(REQUEUED)
    array = slurm.submit("--array=1-2", "job.sbatch", cwd=tmp_path)
    until(lambda: slurm.call("exec", "squeue", "-h", "-j", array) == "")
    said = sorted((tmp_path / f"task-{k}.out").read_text().count("start") for k in (1, 2))
    assert said == [1, 2]


@pytest.mark.slow
def test_an_array_trains_and_scores_the_dreambooth_dataset(
    slurm: Cluster, config: Path, tmp_path: Path
) -> None:
    dataset = tmp_path / "dataset"
    for name in ("mug", "ball"):
        world.main(dataset / name, name)
    prompts = "Prompts\n\nprompt_list = [\n'a {0} {1} in a barn'.format(unique_token, class_token)\n]\n\n"
    (dataset / "prompts_and_classes.txt").write_text(
        "Classes\n\nsubject_name,class\nmug,mug\nball,ball\n\nPrompts\n\n"
        f"Object {prompts}Live Subject {prompts}"
    )
    array = slurm.submit(
        "--array=1-2", DREAMBENCH, dataset, config, f"prepare.class_dir={tmp_path / 'class'}",
        f"evaluation.dino={eyes.dino()}", f"evaluation.clip={eyes.clip()}", "evaluation.class_images=2",
        "evaluation.images=2", "train.steps=2", cwd=tmp_path,
    )  # fmt: skip
    until(lambda: slurm.call("exec", "squeue", "-h", "-j", array) == "")
    said = [(tmp_path / f"dreambench-{array}_{k}.out").read_text() for k in (1, 2)]
    print(*said, sep="\n\n")
    found = [json.loads((tmp_path / "runs" / "dreambench" / name / "scores" / "scores.json").read_text())
             for name in ("mug", "ball")]  # fmt: skip
    assert [(one["prompts"], one["images"]) for one in found] == [(1, 2), (1, 2)]
    tables = [text for text in said if "2 of 2 subjects" in text]
    ours = f"{(found[0]['dino'] + found[1]['dino']) / 2:.3f}"
    assert tables and all(f"DINO{ours:>24}   0.668" in text for text in tables)


@pytest.mark.slow
def test_shards_are_prepared_by_a_job_of_their_own(slurm: Cluster, config: Path, tmp_path: Path) -> None:
    job = slurm.submit(*TWO, PREPARE, config, cwd=tmp_path, STARTER="srun")
    assert slurm.wait(job)["JobState"] == "COMPLETED"
    assert dbtrain("prepare", config, f"data.shards={tmp_path / 'here'}").returncode == 0
    assert tars(tmp_path / "shards") == tars(tmp_path / "here")


def tars(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(folder).items() if name.endswith(".tar")}


def test_a_mistake_in_the_config_fails_the_job_and_says_why(slurm: Cluster, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("run_dir: runs/x\nmodel: {path: tiny}\ndata: {shards: nowhere}\n")
    job = slurm.submit(TRAIN, "c.yaml", "optim.lrr=1", cwd=tmp_path)
    assert slurm.wait(job)["JobState"] == "FAILED"
    assert "did you mean 'optim.lr'?" in (tmp_path / f"dbtrain-{job}.out").read_text()
