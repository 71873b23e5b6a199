"""`doctor --exact` tells runs that are the same from runs that are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from dbtrain.doctor import reproducibility
from dbtrain.runtime.errors import ConfigError
from tests.conftest import Make, dbtrain


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_all_ways_are_the_same_run(make: Make, tmp_path: Path, prepared: Path) -> None:
    cfg = make(data__shards=str(prepared))
    lines = {gap.way.name: str(gap) for gap in reproducibility.exact(cfg) if gap.fine}
    assert list(lines) == [way.name for way in reproducibility.WAYS]
    for way in reproducibility.WAYS:
        assert ("bit for bit" in lines[way.name]) >= way.same
    assert not (tmp_path / "run").exists(), "it writes to a temporary folder"


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_another_run_is_noticed(
    make: Make, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, other = make(data__shards=str(prepared)), make(data__shards=str(prepared), seed=1)
    straight = reproducibility._run(cfg, reproducibility.WAYS[0], tmp_path / "straight")
    gap = reproducibility._gap(
        cfg,
        reproducibility.WAYS[0],
        straight,
        reproducibility._run(other, reproducibility.WAYS[0], tmp_path / "other"),
    )
    monkeypatch.setattr(reproducibility, "exact", lambda _: iter([gap]))
    with pytest.raises(ConfigError, match="these differ from the straight run: straight"):
        list(reproducibility.table(cfg))
    assert not gap.rows and gap.adapter > 0.1 and not gap.fine and "NOT THE SAME" in str(gap)


@pytest.mark.slow
def test_a_run_that_fails_is_told(make: Make, tmp_path: Path) -> None:
    make()
    done = dbtrain("doctor", tmp_path / "c.yaml", "--exact")
    assert done.returncode == 2 and "straight: " in done.stderr and "no manifest.json" in done.stderr


@pytest.mark.parametrize(("batch", "left_out"), [(4, ()), (1, ("2 processes", "2 processes, then 1"))])
def test_ways_that_the_batch_cannot_take_are_left_out(
    make: Make, batch: int, left_out: tuple[str, ...]
) -> None:
    cfg = make(train__global_batch=batch)
    possible = [
        way
        for way in reproducibility.WAYS
        if all(reproducibility._possible(cfg, ranks) for ranks, _ in way.parts)
    ]
    assert [way.name for way in reproducibility.WAYS if way not in possible] == list(left_out)
