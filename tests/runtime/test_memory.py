"""Free memory: the least of the machine's and its control groups'."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.host_memory import held
from dbtrain.runtime import memory


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8,000 KiB to spare, on which this process runs in the control group /job/step."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text("4:memory:/old\n0::/job/step\n")
    (tmp_path / "groups" / "job" / "step").mkdir(parents=True)
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")
    return tmp_path


def limit(folder: Path, most: str, used: int, cached: int) -> None:
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\nfile {cached}\n")


def test_the_machine_s(machine: Path) -> None:
    assert memory.free() == 8000 * 1024


def test_a_control_group_s_without_cached_files(machine: Path) -> None:
    limit(machine / "groups" / "job", "6000000", 3000000, 1000000)
    limit(machine / "groups" / "job" / "step", "max", 3000000, 1000000)
    assert memory.free() == 4000000


def test_never_below_zero(machine: Path) -> None:
    limit(machine / "groups" / "job", "1000", 3000, 0)
    assert memory.free() == 0


def test_real() -> None:
    assert 2**20 < memory.free() < 2**50


def test_freed_memory_between_what_is_in_use_goes_back() -> None:
    """To the system: malloc keeps it as long as something lies behind it."""
    pieces = [bytearray(b"x" * 60_000) for _ in range(1000)]
    kept = pieces[::50]
    pieces.clear()
    before = held()
    memory.trim()
    assert before - held() > 30 * 2**20 and len(kept) == 20
