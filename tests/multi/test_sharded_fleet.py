"""Fleets on ranks that hold the base together: to the bit what ranks with a whole one make."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from dbtrain.runtime.run_folder import RunFolder, step_of
from tests import bases
from tests.conftest import Make, Started, dbtrain, draw_photo
from tests.runs import tree

STEPS = {1: 2, 2: 5, 3: 3}  # by subject: two ranks are never done together
LONG = 40  # enough of them to be stopped


def listed(make: Make, folder: Path, base: str, **settings: Any) -> list[object]:
    """The arguments of a fleet of three subjects."""
    make(
        model__path=str(bases.OF_FAMILY[base]()), prepare__resolution=bases.SIDES[base],
        prepare__class_images=2, train__global_batch=2, train__micro_batch=1, train__checkpoint_every=1,
        train__log_every=1, prepare__instance_prompt="a photo of {}", sample__steps=2, **settings,
    )  # fmt: skip
    values = yaml.safe_load((folder / "c.yaml").read_text())
    del values["data"], values["prepare"]["photos"]
    (folder / "c.yaml").write_text(yaml.safe_dump(values))
    entries = []
    for number, steps in STEPS.items():
        (photos := folder / f"s{number}").mkdir()
        for photo in range(2):
            draw_photo(photos / f"{photo}.png", 3 * number + photo)
        entries.append({"photos": f"s{number}", "steps": steps, "token": " ".join(["sks"] * number)})
    (folder / "list.yaml").write_text(yaml.safe_dump(entries))
    return ["fleet", folder / "c.yaml", folder / "list.yaml", "--slots", 1]


def results(fleet: Path, subjects: Mapping[int, int] = STEPS) -> dict[str, bytes]:
    """Exports, last checkpoints, validations and metrics of subjects, by their steps."""
    found = {}
    for number, steps in subjects.items():
        run = RunFolder(fleet / f"s{number}")
        for part in (run.export, run.checkpoint(steps), run.validation):
            found |= {f"{number} {path}": data for path, data in tree(part).items() if path != "README.md"}
        found[f"{number} metrics"] = run.table("metrics").read_bytes()
    return {name: data.replace(bytes(fleet), b"") for name, data in found.items()}


def newest(run: RunFolder) -> int:
    """The step of the newest checkpoint."""
    return max(map(step_of, run.checkpoints()), default=0)


VALIDATED: dict[str, Any] = {
    "validation__prompts": ["a {} in the snow"], "validation__images": 1, "validation__every": 2,
    "prepare__held_out": 1,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "settings"),
    [("flux1", {"loss__prior": "prediction", "train__gradient_checkpointing": "blocks", **VALIDATED}),
     ("chroma", {}), ("sd", {"train__base_linears": "int8"})],
    ids=str,
)  # fmt: skip
def test_subjects_are_what_they_are_with_a_whole_base(
    make: Make, tmp_path: Path, base: str, settings: dict[str, Any]
) -> None:
    """Whose prompts differ in length; one rank validates, or has nothing left, while the other trains."""
    line = listed(make, tmp_path, base, **settings)
    assert dbtrain(*line, f"run_dir={tmp_path / 'whole'}").returncode == 0
    there = [f"run_dir={tmp_path / 'sharded'}", "train.shard=all"]
    assert dbtrain(*line, *there, ranks=2).returncode == 0
    whole, sharded = results(tmp_path / "whole"), results(tmp_path / "sharded")
    assert whole.keys() == sharded.keys() and len(whole) > 10
    assert not [name for name in whole if whole[name] != sharded[name]]


@pytest.mark.slow
def test_ranks_wait_for_new_subjects_and_stop_and_die_together(make: Make, tmp_path: Path) -> None:
    """Then they go on with a whole base; what became of the subjects is as if nothing had happened."""
    line = listed(make, tmp_path, "flux1")
    entries = yaml.safe_load((tmp_path / "list.yaml").read_text())
    entries[1]["steps"] = LONG
    (tmp_path / "list.yaml").write_text(yaml.safe_dump(entries[:1]))
    there = f"run_dir={tmp_path / 'stopped'}"
    running = Started(*line, there, "train.shard=all", "--watch", ranks=2)
    first, second = (RunFolder(tmp_path / "stopped" / f"s{number}") for number in (1, 2))
    running.wait_for(lambda: first.done.exists())
    (tmp_path / "list.yaml").write_text(yaml.safe_dump(entries))
    running.wait_for(lambda: second.checkpoint(2).is_dir())
    running.signal(signal.SIGTERM, rank=1)
    code, said = running.end()
    assert code == 75 and "stopped: SIGTERM (" in said and not second.done.exists()
    stopped = newest(second)
    running = Started(*line, there, "train.shard=all", ranks=2)
    running.wait_for(lambda: newest(second) > stopped)
    running.signal(signal.SIGKILL, rank=1)
    _, said = running.end()
    assert running.processes.codes == {1: -signal.SIGKILL, 0: 3} and not second.done.exists()
    assert re.search(r"rank 1 \(last heard of at step \d+\) is gone; this rank gives up at step [1-9]", said)
    for fleet in (there, f"run_dir={tmp_path / 'whole'}"):
        assert dbtrain(*line, fleet).returncode == 0
    steps = {**STEPS, 2: LONG}
    assert results(tmp_path / "stopped", steps) == results(tmp_path / "whole", steps)
