"""Every command in the README and in docs/ runs as it is written, on a small base model."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dbtrain.__main__ import entry
from tests import eyes
from tests.cluster.machines import Cluster
from tests.conftest import LONG, ROOT, command, draw_photo, finished

# One after the other: some look at the runs of those before.
pytestmark = pytest.mark.xdist_group("readme")

README = (ROOT / "README.md").read_text()
SETTINGS = (ROOT / "docs" / "settings.md").read_text()  # the other pages use the run that it makes
PAGES = "\n".join([README, SETTINGS, *(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))])
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGES, re.DOTALL)
BASH = list(dict.fromkeys(line for block in BLOCKS for line in block.strip().splitlines()))
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

# A GPU base and hundreds of steps, made small: the same words, the embedded base.
SMALL = (
    "model.path=tiny model.variant=null prepare.resolution=64 prepare.class_images=8 "
    "prepare.class_dir=class-images prepare.sampling.steps=2 prepare.sampling.precision=fp32 "
    "adapter.rank=2 adapter.alpha=2 train.precision=fp32 train.checkpoint_every=2 "
    "sample.images=1 sample.steps=2 sample.precision=fp32"
).split()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree with photos in it, as a user has it; installed as this one is."""
    folder = tmp_path_factory.mktemp("checkout")
    skipped = shutil.ignore_patterns(".git", ".venv", "runs", "shards", "photos", "*_cache", "__pycache__")
    copy = Path(shutil.copytree(ROOT, folder / "dbtrain", ignore=skipped))
    for subject in ("dog", "mydog", "rex", "tom"):
        (copy / "photos" / subject).mkdir(parents=True)
        for number in range(5):
            draw_photo(copy / "photos" / subject / f"{number}.jpg", number)
    fleet = [{"photos": "photos/rex", "class": "dog"}, {"photos": "photos/tom", "class": "cat"}]
    (copy / "subjects.yaml").write_text(yaml.safe_dump(fleet))
    if (ROOT / ".venv").exists():
        (copy / ".venv").symlink_to(ROOT / ".venv")
    return copy


def shell(line: str, folder: Path, timeout: float = LONG) -> str:
    bin_dir = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        line, shell=True, executable="/bin/bash", cwd=folder, env=env, capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip
    print(line, done.stdout, done.stderr, sep="\n")
    assert done.returncode == 0
    return done.stdout


# How a page starts a verb, and what its `dbtrain` and torchrun are started as once: the others are forks.
STARTS = re.compile(r"(torchrun --standalone --nproc-per-node \d+ -m |python -m )?dbtrain ")
COLD = (
    "dbtrain run configs/mydog.yaml",
    "torchrun --standalone --nproc-per-node 4 -m dbtrain run configs/sd15.yaml",
)


def verb(line: str, folder: Path, cold: bool = False) -> str:
    """What a verb prints: started as the page says, or as forks, of two processes for torchrun's."""
    if cold:
        return shell(re.sub(r"--nproc-per-node \d+", "--nproc-per-node 2", line), folder)
    ranks = 2 if line.startswith("torchrun") else 1
    done = finished(command(*shlex.split(STARTS.sub("", line)), ranks=ranks), cwd=folder)
    assert done.returncode == 0
    return done.stdout


def exact(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`doctor --exact` in this process, which starts forks."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    with pytest.raises(SystemExit) as left:
        entry()
    assert not left.value.code


def small(line: str) -> str:
    """A README command with the embedded base in place of a large one."""
    seen = [f"evaluation.dino={eyes.dino()}", f"evaluation.clip={eyes.clip()}", "evaluation.images=2",
            "evaluation.class_images=2"] if " evaluate " in line else []  # fmt: skip
    return f"{line} {shlex.join([*SMALL, *seen, 'train.steps=2'])}"  # the last of two overrides counts


def on_two_hosts(line: str, hosts: dict[str, str], folder: Path) -> None:
    """The multi-node command on each of two hosts, with one process."""
    line = line.replace("HEAD=node1", "HEAD=a1 RANKS=1")
    line = f"{line} {shlex.join([*SMALL, 'train.steps=2', 'run_dir=runs/nodes'])}"
    script = shlex.quote(str(ROOT / "tests" / "cluster" / "netns2.sh"))
    both = [f"bash {script} on {number} bash -c {shlex.quote(line)}" for number in (1, 2)]
    exports = "; ".join(f"export {k}={shlex.quote(hosts[k])}" for k in ("NETNS_PREFIX", "NETNS_HOSTS"))
    shell(f"{exports}; {both[0]} & first=$!; {both[1]} && wait $first", folder)


def as_a_job(line: str, slurm: Cluster, folder: Path) -> None:
    """The batch job on a cluster of two nodes without GPUs: torchrun on each, with a log of its rank."""
    words = shlex.split(line.replace(" --gpus-per-node=8", ""))
    job = slurm.call("exec", *words[:1], "--parsable", *words[1:], *SMALL, "train.steps=2",
                     "run_dir=runs/job", cwd=folder, DBTRAIN_HOME=str(folder))  # fmt: skip
    assert slurm.wait(job)["JobState"] == "COMPLETED"
    if "train.sbatch" in line:
        assert "batches of 16 on 2 ranks on cpu" in (folder / f"dbtrain-{job}.out").read_text()
        assert sum("stderr" in path.name for path in (folder / "logs").rglob("dbtrain-*/**/*")) == 2


@pytest.mark.slow
@pytest.mark.parametrize("line", BASH)
@pytest.mark.usefixtures("forks")
def test_every_command_runs(
    line: str, checkout: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if line.startswith("pip install"):
        assert "Would install dbtrain" in shell(f"python -m {line} --dry-run --no-deps", checkout)
    elif line.startswith("HEAD="):
        on_two_hosts(line, request.getfixturevalue("hosts"), checkout)
    elif line.startswith("sbatch"):
        as_a_job(line, request.getfixturevalue("slurm"), checkout)
    elif line == "bash launch/test.sh":
        assert (checkout / "launch" / "test.sh").is_file()  # tests/test_checks.py looks at what it does
    elif line == "bash launch/quickstart.sh":
        if not (ROOT / ".venv" / "installed-dev").exists():
            pytest.skip("needs .venv, which launch/venv.sh makes")
        said = shell(line, checkout)
        for name in ("adapter", "pictures"):
            path = re.search(rf"^{name}: +(.+)$", said, re.MULTILINE)
            assert path and Path(path[1]).is_file()
        rows = dict(re.findall(r"^(of the .*?)  +(\d+)% +\d+%$", said, re.MULTILINE))
        assert int(rows["of the way from base to real"]) >= 70, "what the README promises"
        assert int(rows["of the subject's images in the requested place"]) >= 75
        assert int(rows["of the class's images turned into the subject"]) <= 5
    elif line.startswith("dbtrain report"):  # of the runs that the commands above left
        assert (checkout / verb(line, checkout).strip().removeprefix("report: ")).is_file()
    elif line.startswith("dbtrain adapter"):
        verb(line.replace("stable-diffusion-v1-5/stable-diffusion-v1-5", "tiny"), checkout)
    elif line.startswith("dbtrain init"):
        shell(line, checkout)
    elif line.startswith("bash launch/torchrun.sh run configs/sd15.yaml"):
        shell(small(line), checkout)
    elif line.endswith("--exact"):
        exact(small(line), checkout, monkeypatch)
    else:
        assert re.search(r"dbtrain \S+ configs/(sd15|mydog)\.yaml", line), f"no test for: {line}"
        verb(small(line), checkout, cold=line in COLD)


@pytest.mark.slow
@pytest.mark.parametrize("code", PYTHON, ids=["diffusers"])
def test_every_python_example_runs(code: str, checkout: Path) -> None:
    """After the commands above, whose runs it loads."""
    path = checkout / "dbtrain" / "tiny" / "model"
    for large, little in (
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", str(path)), (', variant="fp16"', ""),
        ("torch.float16", "torch.float32"), ('"fp16"', '"fp32"'), ('"cuda"', '"cpu"'),
    ):  # fmt: skip
        code = code.replace(large, little)
    (checkout / "example.py").write_text(code)
    shell("python example.py", checkout)
