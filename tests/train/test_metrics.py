"""What a user sees: whose lines, when bars speak, and the last words."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from dbtrain.runtime import console
from dbtrain.train import summary
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
    lines = caplog.messages
    names = [line.split()[0] for line in lines[-1].splitlines()]
    assert names == ["done", "training", "validation", "other", "adapter", "validation", "log"]
    assert "samples/s" in lines[-1]
    for line in lines[-1].splitlines()[-3:]:
        assert Path(line.split()[1]).exists()
    assert lines[-1] in (Path(cfg.run_dir) / "log.txt").read_text()
    assert 0 < console.spent_s["validation"] < console.spent_s["train"]
