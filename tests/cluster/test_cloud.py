"""The job files of clouds: valid to their own tools, and what they run on each node, on two hosts here."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dbtrain.config import Config
from dbtrain.runtime import exit_codes
from tests.cluster.machines import HERE
from tests.cluster.test_slurm import minutes
from tests.conftest import LONG, ROOT, Make, dbtrain
from tests.runs import EXPORT

SKY, KUBERNETES, CLOUD = (ROOT / "launch" / name for name in ("sky.yaml", "kubernetes.yaml", "cloud.sh"))
HEAD = "10.78.0.1"  # of netns2.sh's two hosts


def sky() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(SKY.read_text())
    return found


def kubernetes() -> dict[str, dict[str, Any]]:
    """The objects, by their kind."""
    return {found["kind"]: found for found in yaml.safe_load_all(KUBERNETES.read_text())}


def environment(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, **more, "PATH": path, "OMP_NUM_THREADS": "1", "RANKS": "1"}


def on_both(hosts: dict[str, str], script: str, *args: object, **env: str) -> list[subprocess.Popen[str]]:
    """What a node of the job runs, on each host."""
    return [
        subprocess.Popen(
            ["bash", str(HERE / "netns2.sh"), "on", host, "bash", "-c", script, "sh", *map(str, args)],
            env=environment(**{**hosts, **env}),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        )
        for host in ("1", "2")
    ]  # fmt: skip


def codes(processes: list[subprocess.Popen[str]]) -> list[int]:
    for process in processes:
        print(process.communicate(timeout=LONG)[0])
    return [process.returncode for process in processes]


def test_sky_s_file_is_valid_to_skypilot() -> None:
    schemas = pytest.importorskip("sky.utils.schemas", reason="needs skypilot")
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(sky(), schemas.get_task_schema())
    jsonschema.validate(sky()["resources"], schemas.get_resources_schema())


def test_kubernetes_file_is_valid_to_its_schema() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    for found in kubernetes().values():
        validate.validate(found, "1.31", strict=True)


def test_what_is_said_twice_in_the_job_files_agrees() -> None:
    found = kubernetes()
    job, name = found["Job"]["spec"], found["Job"]["metadata"]["name"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    env = {one["name"]: one["value"] for one in container["env"]}
    assert int(env["NODES"]) == job["completions"] == job["parallelism"]
    assert env["HEAD"] == f"{name}-0.{pod['subdomain']}"
    assert found["Service"]["metadata"]["name"] == pod["subdomain"]
    assert found["Service"]["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    mounted = {one["name"]: one for one in pod["volumes"]}
    assert mounted.keys() == {one["name"] for one in container["volumeMounts"]}
    claim = mounted["work"]["persistentVolumeClaim"]["claimName"]
    assert claim == found["PersistentVolumeClaim"]["metadata"]["name"]
    assert container["command"] == ["bash", f"/src/launch/{CLOUD.name}"]
    # Exit codes: one is final, one is a pause.
    rules = [(rule["action"], rule.get("onExitCodes")) for rule in job["podFailurePolicy"]["rules"]]
    assert all(found["containerName"] == container["name"] for _, found in rules if found)
    ends = {code: action for action, found in rules if found for code in found["values"]}
    assert ends == {2: "FailJob", exit_codes.PREEMPTED: "Ignore"} and pod["restartPolicy"] == "Never"
    recovered = sky()["resources"]["job_recovery"]["recover_on_exit_codes"]
    assert recovered == [exit_codes.PREEMPTED, exit_codes.LOST]
    assert sky()["envs"]["STORE"] in sky()["file_mounts"]


def examples() -> Iterator[tuple[int, list[str]]]:
    """(ranks, arguments) of the jobs of several GPUs that the job files and documents show."""
    job = kubernetes()["Job"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    yield job["completions"] * gpus, container["args"]
    for path in (*ROOT.glob("launch/*"), *ROOT.glob("docs/*.md"), ROOT / "README.md"):
        for line in path.read_text().splitlines():
            words = line.strip("# ").split()
            if "launch/train.sbatch" in words and words[0] == "sbatch":
                first = words.index("launch/train.sbatch")
                asked = dict(word.strip("-").split("=", 1) for word in words[1:first])
                yield int(asked.get("nodes", 1)) * int(asked["gpus-per-node"]), words[first + 1 :]
            elif "launch/torchrun_nodes.sh" in words and "configs/sd15.yaml" in words:
                yield 16, words[words.index("run") + 1 :]  # two nodes of eight


def test_the_batches_of_examples_can_be_shared_by_their_ranks() -> None:
    found = list(examples())
    assert len(found) > 5
    for ranks, (config, *settings) in found:
        train = Config.load(ROOT / config, settings).train
        assert train.global_batch % (ranks * train.micro_batch) == 0, (ranks, config, settings)


@pytest.mark.slow
def test_a_mistake_in_the_config_is_told_by_the_code(tmp_path: Path, make: Make) -> None:
    """Whether it is found before torchrun starts or by a rank."""
    make()
    for mistake, words in (("optim.lrr=1", "did you mean"), ("prepare.photos=nowhere", "nowhere")):
        done = subprocess.run(
            ["bash", CLOUD, tmp_path / "c.yaml", mistake], capture_output=True, text=True, timeout=LONG,
            env=environment(HEAD="127.0.0.1", NODES="1", PORT="0"), cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == 2 and words in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("cloud", ["sky", pytest.param("kubernetes", marks=minutes)])
def test_a_job_of_which_one_node_has_to_stop_goes_on_when_it_starts_again(
    hosts: dict[str, str], make: Make, tmp_path: Path, cloud: str
) -> None:
    """By SIGTERM to one of two nodes, of which both end with 75; to the same adapter as without a stop."""
    make(prepare__class_dir=str(tmp_path / "class-images"), data__shards=str(tmp_path / "shards" / "dog"),
         train__steps=60, train__checkpoint_every=60, train__log_every=1)  # fmt: skip
    config, run, alone = tmp_path / "c.yaml", tmp_path / "runs" / "dog", tmp_path / "alone"
    assert dbtrain("run", config, f"run_dir={alone}", ranks=2).returncode == 0
    script, args = f'exec bash {CLOUD} "$@"', [config, f"run_dir={run}"]
    env = {"HEAD": "a1", "NODES": "2"}
    if cloud == "sky":
        script, args = sky()["run"].replace("bash launch/cloud.sh", f"exec bash {CLOUD}"), []
        env = {
            **sky()["envs"], "CONFIG": str(config), "STORE": str(tmp_path),
            "SETTINGS": "sample.images=1 train.keep=2", "SKYPILOT_NODE_IPS": f"{HEAD}\n10.78.0.2",
            "SKYPILOT_NUM_NODES": "2", "SKYPILOT_TASK_ID": "sky-1",
        }  # fmt: skip
    started = on_both(hosts, script, *args, **env)
    until = time.monotonic() + LONG
    while not (run / "metrics.jsonl").exists():
        assert time.monotonic() < until and all(process.poll() is None for process in started)
        time.sleep(0.05)
    started[1].terminate()
    assert codes(started) == [exit_codes.PREEMPTED] * 2
    assert codes(on_both(hosts, script, *args, **env)) == [0, 0]
    for name in (EXPORT, Path("metrics.jsonl")):
        assert (run / name).read_bytes() == (alone / name).read_bytes()
