"""Signals and time limits: every phase stops in order, and goes on where it was."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests import bases
from tests.conftest import LONG, ROOT, Cold, Make, Started, config_in, dbtrain
from tests.runs import EXPORT, tree
from tests.session import once

SETTINGS = {
    "prepare__class_images": 6, "prepare__sampling__steps": 12, "prepare__sampling__batch": 1,
    "prepare__crop": "random", "prepare__variants": 24, "train__steps": 30, "train__checkpoint_every": 25,
    "train__log_every": 1, "sample__prompts": ["a dog"], "sample__images": 5, "sample__steps": 12,
    "sample__batch": 1,
}  # fmt: skip
FEW = {  # of what comes before and after the training that is stopped
    "prepare__class_images": 1, "prepare__sampling__steps": 1, "prepare__variants": 1, "sample__images": 1,
    "sample__steps": 1,
}  # fmt: skip
SIGNS = {  # that a phase is on
    "class images": "class/**/00001.safetensors",
    "encoding": "shards/instance-*.tar",
    "training": "run/metrics.jsonl",
    "pictures": "run/samples/*/00-00-seed0.png",
}


def config(home: Path, photos: Path, base: str = "tiny") -> Path:
    model = {"model__path": str(bases.ALL[base]()), **FEW} if base != "tiny" else {}
    config_in(home, photos, home / "class", **SETTINGS | model)
    return home / "c.yaml"


def whole(photos: Path, ranks: int, base: str) -> Path:
    """A run that nothing happened to."""

    def fill(folder: Path) -> None:
        assert dbtrain("run", config(folder, photos, base), ranks=ranks).returncode == 0

    return once(f"undisturbed-{base}-{ranks}", fill)


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "ranks", "number", "torchrun", "base", "shard"), [
    ("class images", 2, signal.SIGTERM, False, "tiny", "none"),
    ("encoding", 1, signal.SIGUSR1, False, "tiny", "none"),
    ("training", 1, signal.SIGINT, False, "tiny", "none"),
    ("training", 2, signal.SIGTERM, True, "tiny", "none"),
    ("pictures", 1, signal.SIGUSR1, False, "tiny", "none"),
    ("training", 2, signal.SIGTERM, False, "sd", "all"),
])  # fmt: skip
def test_every_phase_stops_in_order_and_goes_on(
    tmp_path: Path, photos: Path, phase: str, ranks: int, number: int, torchrun: bool, base: str, shard: str
) -> None:
    """With sharded weights as well, to what becomes of whole ones."""
    path, undisturbed = config(tmp_path, photos, base), whole(photos, ranks, base)
    line = ("run", path, f"train.shard={shard}")
    begun = Started(*line, ranks=ranks, cold=torchrun)
    begun.wait_for(lambda: list(tmp_path.glob(SIGNS[phase])))
    begun.signal(number)
    code, said = begun.end()
    marker = tmp_path / "run" / "PREEMPTED"
    assert "run the same command again" in said
    if not torchrun:  # whose agent reports the signal with a traceback, and an exit code of its own
        assert "Traceback" not in said
        assert code == (130 if number == signal.SIGINT else 75)
    assert marker.exists() == (number != signal.SIGINT), "a person who presses Ctrl-C wants no requeue"
    assert phase != "training" or "checkpoint saved" in said
    drawn = [*tmp_path.rglob("*.png"), *tmp_path.glob("class/*/0*.safetensors")]
    before = {p: p.stat().st_mtime_ns for p in drawn}

    assert dbtrain(*line, ranks=ranks).returncode == 0
    assert not marker.exists() and (tmp_path / "run" / "DONE").exists()
    assert {p: p.stat().st_mtime_ns for p in before} == before, "pictures were drawn twice"
    for file in (EXPORT, "metrics.jsonl"):  # a line a step, the same as without the stop
        assert (tmp_path / "run" / file).read_bytes() == (undisturbed / "run" / file).read_bytes()
    for folder in ("shards", "class"):
        ours, theirs = (
            {k: v for k, v in tree(home / folder).items() if k.endswith((".tar", ".safetensors"))}
            for home in (tmp_path, undisturbed)
        )
        assert ours == theirs


@pytest.mark.slow
def test_a_run_stops_before_the_job_s_time_is_over(make: Make, tmp_path: Path, prepared: Path) -> None:
    """As long before as it is told to, in whatever step it is then."""
    os.symlink(prepared, tmp_path / "shards")
    make(train__steps=100_000, train__checkpoint_every=100_000, train__log_every=1,
         faults__stop_before_s=3600.0)  # fmt: skip
    begun = Started("train", tmp_path / "c.yaml", SLURM_JOB_END_TIME=str(int(time.time()) + 3602))
    code, said = begun.end()
    assert code == 75 and "stopped: the end of the job's time" in said  # at a step, if it got so far
    assert (tmp_path / "run" / "PREEMPTED").read_text().startswith("the end of the job's time")


def test_a_second_ctrl_c_interrupts_at_once(tmp_path: Path, photos: Path) -> None:
    slow = ("prepare.sampling.batch=8", "prepare.sampling.steps=1000")  # one batch, of minutes
    begun = Started("run", config(tmp_path, photos), *slow)
    begun.wait_for(lambda: "0/6" in begun.output())
    enough = begun.cpu_seconds() + 1  # by then it is in the batch
    begun.wait_for(lambda: begun.cpu_seconds() > enough)
    begun.signal(signal.SIGINT)
    begun.wait_for(lambda: "press Ctrl-C again to stop at once" in begun.output())
    begun.signal(signal.SIGINT)
    code, said = begun.end()
    assert code == 130 and "interrupted; run the same command again" in said and "Traceback" not in said


@pytest.mark.slow
def test_ctrl_c_ends_all_gpus_of_a_machine_without_a_report_of_failure(
    make: Make, tmp_path: Path, prepared: Path
) -> None:
    """As in a terminal: the script, torchrun and the ranks all get the signal."""
    os.symlink(prepared, tmp_path / "shards")
    make(train__steps=100_000, train__checkpoint_every=100_000)
    env = {**os.environ, "RANKS": "2", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    # The shell of a terminal has not been told to ignore Ctrl-C, as jobs in the background are.
    script = ["env", "--default-signal=INT", "bash", str(ROOT / "launch" / "torchrun.sh")]
    with open(tmp_path / "said", "w+") as said:
        begun = Cold([*script, "train", str(tmp_path / "c.yaml")], env, said, said)
        try:
            while not list(tmp_path.glob("run/metrics.jsonl")):
                assert begun.poll() is None
                time.sleep(0.05)
            os.killpg(begun.process.pid, signal.SIGINT)
            assert begun.wait(LONG) == 130
        finally:
            begun.kill()
        said.seek(0)
        text = said.read()
    print(text)
    assert "stopped: SIGINT at step" in text and "run the same command again" in text
    assert "Traceback" not in text and "FAILED" not in text
