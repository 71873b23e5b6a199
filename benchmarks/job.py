"""One training run in a process (or several) of its own, watched: what the timing benchmarks are made of.

    python -m benchmarks.job SPEC.json OUT.json

`run` starts it and reads what it saw. A process each, so that no run sees another's memory, compiled
code or threads, and its start counts as a user's does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
LIMIT_S = 570  # a call has ten minutes


@dataclass(frozen=True)
class Spec:
    """What to run. `overrides` are put over the benchmark's settings, as on dbtrain's command line."""

    model: str
    work: str
    batch: int  # instance images of a rank's forward pass
    global_batch: int = 0  # 0: one pass a step, of one rank
    prior: bool = False  # as many class images ride along
    overrides: tuple[str, ...] = ()
    warm_up: int = 3
    windows: int = 3
    window: int = 10
    on_disk: bool = False  # weights in files, so that loading them is timed too
    rate: bool = False  # measure how fast this device multiplies matrices
    inline: bool = False  # in this process: quick, for smoke tests; its start tells nothing
    env: dict[str, str] = field(default_factory=dict)


@dataclass
class Report:
    """What came of it: a list of what each rank saw, or why there is none."""

    ranks: list[dict[str, Any]]
    problem: str = ""


def settings(spec: Spec) -> dict[str, Any]:
    """The config of a run, before its overrides: rank 8 on the attention layers, no checkpoint on the way."""
    steps = _plan(spec).steps
    work = Path(spec.work)
    return {
        "run_dir": str(work / "runs" / f"{os.getpid()}-{time.monotonic_ns()}"),
        "model": {"path": "tiny" if spec.model == "tiny" else str(_base(spec))},
        "data": {"shards": str(work / f"shards-{spec.model}")},
        "adapter": {"rank": 8},
        "train": {
            "steps": steps, "global_batch": spec.global_batch or spec.batch, "micro_batch": spec.batch,
            "checkpoint_every": steps, "log_every": steps, "keep": 1,
            "precision": "fp32" if spec.model == "tiny" else "bf16",
        },
        "loss": {"prior_weight": 1.0 if spec.prior else 0.0},
    }  # fmt: skip


def run(spec: Spec, processes: int = 1) -> Report:
    """Run a spec in `processes` processes; what each saw, or the last line of what went wrong."""
    work = Path(spec.work)
    name = f"job-{os.getpid()}-{time.monotonic_ns()}"
    ask, out = work / f"{name}.json", work / f"{name}.out.json"
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "HF_HUB_OFFLINE": "1"}
    ask.write_text(json.dumps({**asdict(spec), "config": settings(spec), "started": time.time()}))
    if spec.inline and processes == 1:
        from dbtrain.runtime.errors import ConfigError

        try:
            _child(ask, out)
        except ConfigError as error:
            return Report([], "; ".join(error.problems))
        return Report([json.loads(Path(f"{out}.0").read_text())])
    try:
        done = subprocess.run(
            [*launcher, "benchmarks.job", str(ask), str(out)], cwd=ROOT, env=env | spec.env,
            capture_output=True, text=True, timeout=LIMIT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Report([], f"took more than {LIMIT_S} s")
    found = [Path(f"{out}.{rank}") for rank in range(processes)]
    if done.returncode or not all(path.exists() for path in found):
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        told = [line for line in lines if line.startswith(("error:", "problem:"))] or lines[-1:]
        return Report([], told[0].removeprefix("error: ").removeprefix("problem: ") if told else "no words")
    return Report([json.loads(path.read_text()) for path in found])


def _plan(spec: Spec) -> Any:
    from benchmarks.watch import Plan

    return Plan(spec.warm_up, spec.windows, spec.window)


def _base(spec: Spec) -> Path:
    from benchmarks import bases

    return (bases.folder if spec.on_disk else bases.outline)(spec.model, Path(spec.work))


def make(spec: Spec, rows: int = 64) -> None:
    """Make the base and the shards of a spec, once, before anything is timed."""
    from benchmarks import bases
    from dbtrain.config import Model
    from dbtrain.models.base import Base

    path = "tiny" if spec.model == "tiny" else str(_base(spec))
    with bases.without_weights():
        base = Base.find(Model(path=path))
    bases.write_shards(
        Path(spec.work) / f"shards-{spec.model}", spec.model, base, rows, ("instance", "class")
    )


def _child(ask: Path, out: Path) -> None:
    """Train as the verb does, and write down what was seen of it."""
    given = json.loads(ask.read_text())
    from benchmarks import bases, flops, watch
    from dbtrain.config import Config
    from dbtrain.runtime import console, dist, files
    from dbtrain.train.loop import train

    console.start()
    imports_s, imports_cpu_s = time.time() - given["started"], time.process_time()
    config = ask.with_suffix(".yaml")
    if dist.is_main():
        files.write_atomically(config, yaml.safe_dump(given["config"]))
    else:
        while not config.exists():
            time.sleep(0.01)
    cfg = Config.load(config, given["overrides"])
    plan = watch.Plan(given["warm_up"], given["windows"], given["window"])
    watcher = watch.Watch(plan, dist.device(), bool(cfg.train.compile))
    with bases.without_weights(), watcher.run() as seen:
        train(cfg)
    found = {**asdict(seen), "imports_s": imports_s, "imports_cpu_s": imports_cpu_s}
    found["samples_a_step"] = cfg.train.global_batch * (2 if given["prior"] else 1)
    if given["rate"]:
        found["matmul_rate"] = flops.matmul_rate(dist.device().type, str(cfg.train.precision))
    Path(f"{out}.{dist.rank()}").write_text(json.dumps(found))


def main(arguments: Sequence[str]) -> None:
    from dbtrain.runtime import dist
    from dbtrain.runtime.errors import ConfigError

    try:
        _child(Path(arguments[0]), Path(arguments[1]))
        dist.finish(0)
    except ConfigError as error:
        print(f"error: {'; '.join(error.problems)}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:  # torch's: out of memory, an unsupported kernel; told in the table
        print(f"problem: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
        raise


if __name__ == "__main__":
    main(sys.argv[1:])
