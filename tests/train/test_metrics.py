"""What a user sees: whose lines, when bars speak, and the last words."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dbtrain.runtime import console, pace
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.run_folder import RunFolder
from dbtrain.train import summary, trackers
from dbtrain.train.metrics import TENTHS, Metrics, Outcome
from tests.conftest import Make, finished, train

LINES = """
import warnings
from dbtrain.runtime import console
console.start()
console.say("one of six pictures")
console.warn("shard 3 cannot be read; trying again in 1 s")
warnings.warn("this kernel is slow")
with console.bar(2, "outer", "step") as outer:
    with console.bar(2, "inner", "image", leave=False) as inner:
        inner.update(2)
    outer.update(2)
"""


def said(tmp_path: Path, **env: str) -> list[str]:
    (tmp_path / "lines.py").write_text(LINES)
    done = finished([sys.executable, str(tmp_path / "lines.py")], **env)
    assert done.returncode == 0
    return done.stderr.splitlines()


def test_rank_0_says_everything_and_bars_are_plain_lines_in_a_batch_log(tmp_path: Path) -> None:
    lines = said(tmp_path)
    assert "one of six pictures" in lines and "shard 3 cannot be read; trying again in 1 s" in lines
    assert lines[-1].startswith("outer: 100%") and not any(line.startswith("rank") for line in lines)
    assert not any("inner" in line or "\x1b" in line for line in lines)


def test_other_ranks_are_heard_when_something_is_wrong_and_say_who_they_are(
    tmp_path: Path,
) -> None:
    lines = said(tmp_path, RANK="3", WORLD_SIZE="4", LOCAL_RANK="3")
    assert lines[0] == "rank 3: shard 3 cannot be read; trying again in 1 s"
    assert lines[1].startswith("rank 3: ") and "this kernel is slow" in lines[1]
    assert not any("pictures" in line or "outer" in line for line in lines)


def test_a_run_ends_with_where_the_time_went_and_where_things_are(
    make: Make, prepared: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = make(data__shards=str(prepared), validation__prompts=["a photo of sks dog"])
    monkeypatch.setattr(console, "spent_s", {})
    with caplog.at_level(logging.INFO, "dbtrain"):
        train(cfg)
        summary.summary(cfg)
    assert not any("\n" in line for line in caplog.messages), "it would be shown as \\x0a"
    lines = caplog.messages[-7:]
    names = [line.split()[0] for line in lines]
    assert names == ["done", "training", "validation", "other", "adapter", "validation", "log"]
    assert "samples/s" in lines[1]
    for line in lines[-3:]:
        assert Path(line.split()[1]).exists()
    assert "\n".join(lines) in (Path(cfg.run_dir) / "log.txt").read_text()
    assert 0 < console.spent_s["validation"] < console.spent_s["train"]


class Clock:
    """A clock that only the test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(pace, "clock", clock := Clock())
    monkeypatch.setattr(pace, "measured", {})
    return clock


OUTCOME = Outcome(torch.ones(2), torch.ones(()), torch.full((2,), torch.inf), torch.zeros(2, 2, TENTHS), 0)


def test_w_and_b_that_does_not_start_says_what_to_do(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the errors of its package: UsageError without an API key, CommError without a network."""

    class Error(Exception):
        pass

    class UsageError(Error):
        pass

    def init(**_: Any) -> None:
        raise UsageError("No API key configured. Use `wandb login` to log in.\n(more)")

    wandb = SimpleNamespace(Error=Error, Image=None, init=init)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    cfg = make(train__wandb="dogs")
    told = r"train.wandb is 'dogs', but W&B does not start: No API key.*wandb login.*WANDB_MODE=offline$"
    with pytest.raises(ConfigError, match=told):
        trackers.of(RunFolder(cfg.run_dir), cfg, 0)


def test_a_learning_rate_that_was_found_is_shown(make: Make) -> None:
    cfg = make(train__steps=2, train__log_every=1)
    run = RunFolder(cfg.run_dir)
    with Metrics(run, cfg, 0, ["instance"], lambda role, at: "") as metrics:
        for done, found in enumerate((1e-6, 3e-4), 1):
            outcome = OUTCOME._replace(lr=0.5, found=torch.tensor(found, dtype=torch.float64))
            metrics.step(done, outcome, torch.zeros((), dtype=torch.int64))
    assert [line["lr"] for line in run.read_metrics()] == pytest.approx([5e-7, 1.5e-4])


def test_the_time_left_is_of_steps_and_of_the_validations_and_checkpoints_to_come(
    make: Make, clock: Clock
) -> None:
    cfg = make(train__steps=10, train__checkpoint_every=5, train__log_every=100, validation__every=4)
    with Metrics(RunFolder(cfg.run_dir), cfg, 0, ["instance"], lambda role, at: "") as metrics:
        assert metrics.ahead() is None, "nothing was measured yet"

        def step(done: int, seconds: float) -> None:
            clock.passes(seconds)
            metrics.step(done, OUTCOME, torch.zeros((), dtype=torch.int64))

        with metrics.interrupted("validation"):
            clock.passes(900)  # the first one loads what it needs
        step(1, 60)  # compiles
        assert metrics.ahead() is None, "the first step tells nothing"
        step(2, 2)
        assert metrics.ahead() == (2, 3 * 900)
        for done in (3, 4):
            step(done, 2)
        with metrics.interrupted("validation"):
            clock.passes(100)
        assert metrics.ahead() == (2, 2 * 100)
        step(5, 2)
        with metrics.interrupted("checkpoint"):
            clock.passes(7)
        step(6, 2)
        assert metrics.ahead() == (2, 2 * 100 + 7)
        shown = metrics.bar.format_dict
        assert (shown["rate"], shown["whole"], shown["left"]) == (0.5, 6, "3 min 35 s left")
        for done in (7, 8, 9):
            step(done, 2)
        with pytest.raises(KeyError), metrics.interrupted("validation"):
            clock.passes(50)
            raise KeyError
        assert metrics.ahead() == (2, 100 + 7), "half a validation tells nothing"
        step(10, 2)
        assert metrics.ahead() == (2, 100 + 7), "those of the last step are still to come"
        for kind in ("checkpoint", "validation"):
            with metrics.interrupted(kind):
                pass
        assert metrics.bar.format_dict["left"] == "0 s left"


@pytest.mark.parametrize("start", [0, 60])
def test_a_line_of_a_step_tells_the_time_left_also_after_a_resume(
    make: Make, clock: Clock, caplog: pytest.LogCaptureFixture, start: int
) -> None:
    """Neither the first step, which compiles, nor a checkpoint is taken for the pace of a step."""
    cfg = make(train__steps=100, train__checkpoint_every=100, train__log_every=2)
    run = RunFolder(cfg.run_dir)
    with (
        caplog.at_level(logging.INFO, "dbtrain"),
        Metrics(run, cfg, start, ["instance"], lambda role, at: "") as metrics,
    ):
        for done in range(1, 7):
            clock.passes(400 if done == 1 else 5)
            metrics.step(start + done, OUTCOME, torch.zeros((), dtype=torch.int64))
            if done == 3:
                with metrics.interrupted("checkpoint"):
                    clock.passes(40)
    told = [line.rpartition("  ")[2] for line in caplog.messages if line.startswith("step ")]
    after = {0: ["8 min 40 s left", "8 min 30 s left"], 60: ["3 min 40 s left", "3 min 30 s left"]}[start]
    assert told[1:] == after and "left" not in told[0]
    assert "left" not in run.table("metrics").read_text() + run.table("speed").read_text()


@pytest.mark.parametrize(
    "every, after, steps, count", [(4, 0, 10, 3), (4, 3, 10, 3), (4, 4, 10, 2), (5, 5, 10, 1), (4, 10, 10, 0),
                                   (100, 0, 10, 1), (1, 3, 10, 7)]
)  # fmt: skip
def test_what_is_due_is_counted(every: int, after: int, steps: int, count: int) -> None:
    assert pace.times(every, after, steps) == count
    due = [step for step in range(after + 1, steps + 1) if step % every == 0 or step == steps]
    assert len(due) == count


def test_a_bar_moves_by_parts_and_shows_whole_units(capsys: pytest.CaptureFixture[str]) -> None:
    with console.bar(4, "pictures", "picture") as bar:
        for _ in range(100):
            bar.update(0.03)
        assert bar.format_dict["whole"] == 3
        bar.update(1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2, "a log has its first and its last state"
    assert "| 0/4 [" in lines[0] and "| 4/4 [" in lines[1]
