"""Two hosts without a batch system: each with its own network, name and hosts file, and a cable."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.machines import HERE
from tests.conftest import LONG, ROOT, Make, dbtrain
from tests.runs import EXPORT


def on_both(hosts: dict[str, str], *args: object) -> list[subprocess.Popen[str]]:
    """The same line on each host."""
    env = {
        **hosts, "HEAD": "a1", "NODES": "2", "RANKS": "1", "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    script = str(ROOT / "launch" / "torchrun_nodes.sh")
    return [
        subprocess.Popen(
            ["bash", str(HERE / "netns2.sh"), "on", str(host), "bash", script, *map(str, args)], env=env,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        )
        for host in (1, 2)
    ]  # fmt: skip


def ends(both: list[subprocess.Popen[str]], seconds: float = LONG) -> list[tuple[int, str]]:
    found = []
    for process in both:
        try:
            said, _ = process.communicate(timeout=seconds)
        finally:
            process.kill()
        print(said)
        found.append((process.returncode, said))
    return found


@pytest.mark.slow
def test_two_hosts_train_what_one_does_and_a_cut_cable_ends_it(
    hosts: dict[str, str], make: Make, tmp_path: Path, prepared: Path
) -> None:
    os.symlink(prepared, tmp_path / "shards")
    make(
        train__steps=100,
        train__checkpoint_every=10,
        train__keep=20,
        train__log_every=50,
        faults__timeout_s=15.0,
    )
    path, run = tmp_path / "c.yaml", tmp_path / "run"
    assert dbtrain("train", path, f"run_dir={tmp_path / 'whole'}", ranks=2).returncode == 0
    both = on_both(hosts, "train", path)
    until = time.monotonic() + LONG
    while not (run / "checkpoints" / "step-000010").exists():
        assert time.monotonic() < until and all(process.poll() is None for process in both)
        time.sleep(0.05)
    subprocess.run(["bash", str(HERE / "netns2.sh"), "unplug", "1"], env=hosts, check=True)
    code, said = ends(both[:1])[0]
    assert code == 1 and "gives up at step" in said and "resume from the last checkpoint" in said
    subprocess.run(["pkill", "-9", "-f", str(path)], check=False)  # the host that was cut off
    ends(both[1:])
    subprocess.run(["bash", str(HERE / "netns2.sh"), "plug", "1"], env=hosts, check=True)
    assert [code for code, _ in ends(on_both(hosts, "train", path))] == [0, 0]
    assert (run / EXPORT).read_bytes() == (tmp_path / "whole" / EXPORT).read_bytes()
    assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["torchrun.sh", "torchrun_nodes.sh"])
def test_a_rank_for_each_gpu_that_may_be_used(tmp_path: Path, name: str) -> None:
    """However many the machine has."""
    for program, says in (
        ("torchrun", 'echo "$@"'),
        ("nvidia-smi", "seq 8"),
        ("ip", "echo 1 lo 127.0.0.1/8"),
    ):
        (tmp_path / program).write_text(f"#!/bin/sh\n{says}\n")
        (tmp_path / program).chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {
        **os.environ,
        "PATH": path,
        "CUDA_VISIBLE_DEVICES": "",
        "HEAD": "127.0.0.1",
        "NODES": "1",
        "RANKS": "",
    }
    done = subprocess.run(["bash", ROOT / "launch" / name], env=env, capture_output=True, text=True)
    assert "--nproc-per-node=1 " in done.stdout, done.stderr


def test_shell_code_is_clean() -> None:
    scripts = [*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch"), *HERE.glob("*.sh")]
    assert len(scripts) >= 10
    try:
        done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        pytest.skip("needs shellcheck")
    assert done.returncode == 0, done.stdout
