"""A real SLURM cluster of two nodes on this machine, and two hosts with a cable between them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import LONG, ROOT

HERE = Path(__file__).parent
NEEDED = {"slurm": ("slurmctld", "slurmd", "sbatch", "munged", "ip"), "netns": ("ip", "unshare")}


def skip_without(what: str) -> None:
    lacking = [name for name in NEEDED[what] if not shutil.which(name)]
    if lacking or os.geteuid():
        pytest.skip(
            "needs root and Debian's slurmctld slurmd slurm-client munge iproute2; "
            f"lacks {', '.join(lacking) or 'root'}"
        )
    probe = subprocess.run(["ip", "netns", "add", "dbtrain-probe"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"needs network namespaces: {probe.stderr.strip()}")
    subprocess.run(["ip", "netns", "del", "dbtrain-probe"], check=True)


class Cluster:
    """What tests do with SLURM: submit, signal, wait."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {
            **os.environ, "MINISLURM_DIR": str(folder), "MINISLURM_PREFIX": f"dbt{os.getpid()}",
            "DBTRAIN_HOME": str(ROOT), "VENV": str(Path(sys.executable).parents[1]), "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "eth0",
        }  # fmt: skip

    def call(self, *args: object, cwd: Path | None = None, **env: str) -> str:
        done = subprocess.run(
            ["bash", str(HERE / "minislurm.sh"), *map(str, args)], env={**self.env, **env}, cwd=cwd,
            capture_output=True, text=True, timeout=LONG,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def submit(self, *args: object, cwd: Path, **env: str) -> str:
        """The number of a new batch job, whose logs lie in `cwd`."""
        return self.call("exec", "sbatch", "--parsable", *args, cwd=cwd, **env)

    def job(self, job: str) -> dict[str, str]:
        words = self.call("exec", "scontrol", "show", "job", "-o", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def preempt(self, job: str, folder: Path) -> None:
        """Send a job SIGUSR1 while its ranks, which run in `folder`, pause: none can end before it has it."""
        ranks = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _is_rank(pid, folder)]
        assert ranks
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        try:
            self.call("exec", "scancel", "--signal=USR1", job)
            until = time.monotonic() + LONG
            while not all(_awaits(pid, signal.SIGUSR1) for pid in ranks):
                assert time.monotonic() < until, "SLURM did not signal all ranks"
                time.sleep(0.05)
        finally:
            for pid in ranks:
                os.kill(pid, signal.SIGCONT)

    def wait(self, job: str, seconds: float = LONG) -> dict[str, str]:
        """The job once it has ended; its log is shown if a test fails."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            found = self.job(job)
            if found["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED"):
                log = Path(found["StdOut"])
                print(job, found["JobState"], log.read_text() if log.exists() else "no log", sep="\n")
                return found
            time.sleep(0.3)
        raise AssertionError(f"job {job} did not end: {self.job(job)}")


def _is_rank(pid: int, folder: Path) -> bool:
    """Whether a process is a rank of a job that was submitted in `folder`, started by torchrun or srun."""
    proc = Path(f"/proc/{pid}")
    try:
        words = (proc / "cmdline").read_bytes().decode().split("\0")
        started = words[1:4] == ["-u", "-m", "dbtrain"] or words[1:3] == [
            "-m",
            "dbtrain",
        ]  # by torchrun, srun
        return started and (proc / "cwd").readlink() == folder
    except OSError:  # it has ended
        return False


def _awaits(pid: int, number: int) -> bool:
    """Whether a signal is pending for a process."""
    (mask,) = re.findall(r"^ShdPnd:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    skip_without("slurm")
    folder = Path(tempfile.mkdtemp(prefix="dbtrain-slurm-"))
    folder.chmod(0o755)  # munge wants its socket seen by all
    cluster = Cluster(folder)
    try:
        cluster.call("up", MINISLURM_CPUS="4")
        yield cluster
    finally:
        cluster.call("down")
        shutil.rmtree(folder)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment in which `netns2.sh` manages two hosts, a1 and a2."""
    skip_without("netns")
    env = {**os.environ, "NETNS_PREFIX": f"dbh{os.getpid()}", "NETNS_HOSTS": str(tmp_path / "hosts")}
    call = ["bash", str(HERE / "netns2.sh")]
    subprocess.run([*call, "up"], env=env, check=True)
    yield env
    subprocess.run([*call, "down"], env=env, check=True)
