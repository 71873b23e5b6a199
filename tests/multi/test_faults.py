"""Ranks that die, hang or see NaN: the others end with one clear line, and a rerun is exact."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dbtrain.data import shards
from dbtrain.data.shards import MANIFEST, Manifest
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.heartbeat import GAVE_UP, Heartbeat
from dbtrain.runtime.run_folder import RunFolder, read_state, step_of
from tests import bases
from tests.conftest import LONG, Make, Started, at, dbtrain, train
from tests.runs import EXPORT, relative

# As many steps as no test waits for: what is to happen happens after the first checkpoint.
ENDLESS = {"train__steps": 100_000, "train__checkpoint_every": 5, "train__keep": 2, "train__log_every": 1}
STEP = Path("run") / "checkpoints" / "step-000005"


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "number", "shard", "told"), [
    (1, signal.SIGKILL, "none", "rank 0: rank 1 (last heard of at step"),
    (0, signal.SIGKILL, "none", "rank 1: rank 0's node is gone"),  # it was the store's host
    (1, signal.SIGSTOP, "none", "rank 0: rank 1 (last heard of at step"),
    (1, signal.SIGKILL, "all", "rank 0: rank 1 (last heard of at step"),
    (1, signal.SIGSTOP, "all", "rank 0: rank 1 (last heard of at step"),
])  # fmt: skip
def test_survivors_name_who_is_gone_and_end(
    make: Make, tmp_path: Path, prepared: Path, victim: int, number: int, shard: str, told: str
) -> None:
    os.symlink(prepared, tmp_path / "shards")
    # A killed process is noticed at once, a stopped one when this time is over.
    make(**ENDLESS, faults__timeout_s=20.0 if number == signal.SIGSTOP else 600.0, train__shard=shard)
    begun = Started("train", tmp_path / "c.yaml", ranks=2)
    begun.wait_for(lambda: (tmp_path / STEP).exists())
    begun.signal(number, rank=victim)
    if number == signal.SIGSTOP:
        begun.processes.wait(LONG, ranks=1)
        begun.signal(signal.SIGKILL, rank=victim)
    _, said = begun.end()
    assert begun.processes.codes == {victim: -signal.SIGKILL, 1 - victim: 3}
    tells(said, told)
    assert "gone" in (tmp_path / "run" / "PREEMPTED").read_text(), "a batch script queues it again"


def tells(said: str, told: str) -> None:
    assert told in said and "; this rank gives up at step" in said
    assert "the same command again to resume from the last checkpoint" in said


@pytest.mark.slow
def test_a_rank_that_stops_over_its_own_error_is_no_reason_to_run_again(
    make: Make, tmp_path: Path, prepared: Path
) -> None:
    shutil.copytree(prepared, tmp_path / "shards")
    make(**ENDLESS, data__cache_gib=1e-9)
    begun = Started("train", tmp_path / "c.yaml", ranks=2)
    begun.wait_for(lambda: (tmp_path / STEP).exists())
    (path,) = (tmp_path / "shards").glob("class-00001-*.tar")
    path.write_bytes(b"")
    # Its size is looked at before its bytes are read: it may change before either.
    given_up(
        begun, tmp_path, rf"shard {path} (has 0 bytes, not \d+: truncated or|was) altered.*; rerun: dbtrain"
    )


@pytest.mark.slow
def test_a_disk_that_is_full_at_a_save_ends_all_ranks_that_share_weights(
    make: Make, tmp_path: Path, prepared: Path
) -> None:
    """A file size limit stands in for it: the write fails half-way, by the same path."""
    os.symlink(prepared, tmp_path / "shards")
    make(**ENDLESS | {"train__log_every": 100_000}, train__shard="all")  # nothing but checkpoints grows
    begun = Started("train", tmp_path / "c.yaml", ranks=2)
    begun.wait_for(lambda: (tmp_path / STEP).exists())
    limit = resource.RLIMIT_FSIZE
    resource.prlimit(begun.processes.pids[0], limit, (20_000, resource.getrlimit(limit)[1]))
    given_up(begun, tmp_path, r"run/checkpoints/.*\.safetensors: File too large")
    assert all(read_state(path) for path in RunFolder(tmp_path / "run").checkpoints()), "none is damaged"


def given_up(begun: Started, folder: Path, told: str) -> None:
    code, said = begun.end()
    assert re.search(told, said) and "Traceback" not in said
    assert code == 2 and set(begun.processes.codes.values()) == {2}
    assert not (folder / "run" / "PREEMPTED").exists()


@pytest.mark.slow
def test_torchrun_starts_lost_ranks_again_from_the_last_checkpoint(
    make: Make, tmp_path: Path, prepared: Path
) -> None:
    os.symlink(prepared, tmp_path / "shards")
    make(train__steps=40, train__checkpoint_every=5)
    whole = dbtrain("train", tmp_path / "c.yaml", f"run_dir={tmp_path / 'whole'}", ranks=2)
    assert whole.returncode == 0
    begun = Started("train", tmp_path / "c.yaml", ranks=2, cold=True, PET_MAX_RESTARTS="1")
    begun.wait_for(lambda: (tmp_path / STEP).exists())
    begun.signal(signal.SIGKILL, rank=0)  # whose store is torchrun's here
    code, said = begun.end()
    tells(said, "rank 1: rank 0 (last heard of at step")
    assert code == 0 and "resuming from step" in said
    assert (tmp_path / "run" / EXPORT).read_bytes() == (tmp_path / "whole" / EXPORT).read_bytes()
    assert not (tmp_path / "run" / "PREEMPTED").exists()


@pytest.mark.slow
def test_one_two_and_four_ranks_and_a_run_moved_between_them(
    make: Make, tmp_path: Path, prepared: Path
) -> None:
    os.symlink(prepared, tmp_path / "shards")
    make(model__path=str(bases.sd(size="slim")), train__steps=8, train__global_batch=8, train__log_every=1)
    for ranks in (1, 2, 4):
        done = dbtrain("train", tmp_path / "c.yaml", f"run_dir={tmp_path / str(ranks)}", ranks=ranks)
        assert done.returncode == 0
    for ranks, until in ((4, 3), (1, 5), (2, 8)):
        run = ["train", tmp_path / "c.yaml", f"run_dir={tmp_path / 'moved'}", "--until", until]
        assert dbtrain(*run, ranks=ranks).returncode in (0, 75)
    for other in ("2", "4", "moved"):
        assert relative(tmp_path / "1", tmp_path / other) < 1e-5
        assert rows_seen(tmp_path / "1") == rows_seen(tmp_path / other)


def rows_seen(run: Path) -> list[str]:
    return [json.loads(line)["rows"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def poisoned(prepared: Path, folder: Path) -> str:
    """Shards in which one photo's latents are NaN; the photo's name."""
    shutil.copytree(prepared, folder)
    manifest = Manifest.read(at(folder))
    shard = manifest.roles["instance"][0]
    rows = shards.read(at(folder), shard)
    rows[2].tensors["mean"].fill_(torch.nan)
    data = shards.pack(rows)
    (folder / shard.file).write_bytes(data)
    text = json.loads((folder / MANIFEST).read_text())
    text["roles"]["instance"][0] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(text))
    return rows[2].meta["source"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_picture(
    make: Make, tmp_path: Path, prepared: Path, precision: str
) -> None:
    photo = poisoned(prepared, tmp_path / "shards")
    cfg = make(train__steps=40, train__global_batch=1, train__checkpoint_every=40, train__precision=precision)
    with pytest.raises(ConfigError, match=rf"at step (\d+), instance position \d+ \({photo}\)") as caught:
        train(cfg)
    named = str(caught.value).split("at step ")[1]
    step, position = int(named.split(",")[0]), int(named.split("position ")[1].split()[0])
    assert position == step - 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert next(line["step"] for line in lines if line["loss"] is None) == step


@pytest.mark.slow
def test_steps_that_are_not_finite_can_be_left_out(make: Make, tmp_path: Path, prepared: Path) -> None:
    poisoned(prepared, tmp_path / "shards")
    settings = {"train__steps": 20, "train__global_batch": 1, "faults__nonfinite": "skip"}
    run = train(make(**settings))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    bad = [line["step"] for line in lines if line["loss"] is None]
    assert len(bad) == 4, "one of five photos, twenty steps"
    state = json.loads((run / "checkpoints" / "step-000020" / "state.json").read_text())
    assert state["skipped"] == 4
    assert all(tensor.isfinite().all() for tensor in load_file(run / EXPORT).values())
    moments = load_file(run / "checkpoints" / "step-000020" / "optimizer.safetensors")
    assert {int(t) for name, t in moments.items() if name.startswith("step.")} == {16}
    make(run_dir=str(tmp_path / "halves"), **settings)
    for until in (7, 20):
        assert dbtrain("train", tmp_path / "c.yaml", "--until", until).returncode in (0, 75)
    assert (tmp_path / "halves" / EXPORT).read_bytes() == (run / EXPORT).read_bytes()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_more_steps_than_may_be_left_out_stop_the_run(
    make: Make, tmp_path: Path, prepared: Path, precision: str
) -> None:
    poisoned(prepared, tmp_path / "shards")
    cfg = make(
        train__steps=20, train__global_batch=1, train__log_every=1, train__precision=precision,
        train__checkpoint_every=8, faults__nonfinite="skip", faults__skips=2,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"3 of the first \d+ steps were skipped.*faults.skips \(2\)"):
        train(cfg)
    saved = RunFolder(cfg.run_dir).checkpoints()[-1]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    bad = sum(line["loss"] is None for line in lines if line["step"] <= step_of(saved))
    assert json.loads((saved / "state.json").read_text())["skipped"] == bad


class Store(dict):
    """What Heartbeat asks of torch's store."""

    set = dict.__setitem__

    def multi_get(self, keys: list[str]) -> list[str]:
        return [self[key] for key in keys]

    def add(self, key: str, number: int) -> int:
        self[key] = self.get(key, 0) + number
        return int(self[key])


def test_ranks_wait_for_each_other_until_one_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dbtrain.runtime.heartbeat.PERIOD_S", 0.02)
    store = Store()
    mine, other = Heartbeat(store, 0, 2), Heartbeat(store, 1, 2)
    met: list[str] = []
    with ThreadPoolExecutor() as pool:
        first = pool.submit(lambda: (mine.barrier(), met.append("mine")))
        wanted = other.beats + 3
        while other.beats < wanted:
            time.sleep(0.001)
        assert not met
        other.barrier()
        first.result()
    assert met
    other.closed.set()
    other.thread.join()
    monkeypatch.setattr("dbtrain.runtime.heartbeat.LONG_S", 0.02)
    with pytest.raises(RuntimeError, match="a rank is gone"):
        mine.barrier()
    mine.close("")


def test_the_pulse_tells_the_dead_from_the_late_and_the_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dbtrain.runtime.heartbeat.PERIOD_S", 0.02)
    store = Store()
    mine, other = Heartbeat(store, 0, 2), Heartbeat(store, 1, 2)
    mine.step, other.step = 5, 4

    def beats(_: float) -> None:
        """Wait until each that lives has beaten twice."""
        for pulse in (mine, other):
            wanted = pulse.beats + 2
            while not pulse.closed.is_set() and pulse.beats < wanted:
                time.sleep(0.001)

    def ask() -> tuple[str, bool]:
        return mine.absent(beats)

    assert ask() == ("rank 1 (last heard of at step 4) is stuck", False)
    other.step = 5
    assert ask()[0].startswith("no rank is gone")
    other.closed.set()
    other.thread.join()
    assert ask() == ("rank 1 (last heard of at step 5) is gone", False)
    other.close("exit code 2")
    assert ask() == ("rank 1 (last heard of at step 5) ended with exit code 2", True)
    other.close(GAVE_UP)
    assert ask()[0].startswith("no rank is gone"), "who gave up is not to blame"
    store.clear()
    assert ask() == ("rank 0's node is gone, or cut off from this one", False)
    mine.close("")
