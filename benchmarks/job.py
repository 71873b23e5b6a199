"""One training run in processes of its own, watched: what the timing benchmarks are made of.

`run` starts it and reads what it saw. Processes of its own, so that no run sees another's memory, compiled
code or threads, and its start counts as a user's does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIMIT_S = 3600  # a run that takes longer hangs


@dataclass(frozen=True)
class Spec:
    """What to run. `overrides` are put over the benchmark's settings, as on dbtrain's command line."""

    model: str
    work: str
    batch: int  # images of a rank's step
    processes: int = 1
    overrides: tuple[str, ...] = ()
    warm_up: int = 3
    windows: int = 3
    window: int = 10
    on_disk: bool = False  # weights in files, so that loading them is timed too
    rate: bool = False  # measure how fast this device multiplies matrices
    inline: bool = False  # in this process: quick, for smoke tests; its start tells nothing
    env: dict[str, str] = field(default_factory=dict)

    @property
    def samples_a_step(self) -> int:
        return self.batch * self.processes


@dataclass
class Report:
    """What came of it: what each rank saw, or why there is nothing."""

    ranks: list[dict[str, Any]]
    problem: str = ""

    @property
    def windows(self) -> list[dict[str, float]]:
        """The timed windows of the first rank."""
        return self.ranks[0]["windows"]


def rounds(specs: Sequence[Spec], count: int, bar: Any) -> list[list[Report]]:
    """Reports of each spec, run in turns: what slows the machine for a while slows all of them."""
    found: list[list[Report]] = [[] for _ in specs]
    for _ in range(count):
        for spec, reports in zip(specs, found, strict=True):
            if not (reports and reports[-1].problem):  # what cannot run is tried once
                reports.append(run(spec))
            bar.update()
    return found


def run(spec: Spec) -> Report:
    """Train a spec: what each process saw."""
    given = asdict(spec) | {"config": _settings(spec)}
    if spec.inline and spec.processes == 1:
        return inline(_train, given)
    return launch("benchmarks.job", given, Path(spec.work), spec.processes, spec.env)


def inline(work: Callable[[Mapping[str, Any]], Any], given: Mapping[str, Any]) -> Report:
    """`work` in this process: quick, for smoke tests."""
    from dbtrain.runtime.errors import ConfigError

    try:
        return Report([work({**given, "started": time.time()})])
    except ConfigError as error:
        return Report([], "; ".join(error.problems))


def launch(
    module: str, given: Mapping[str, Any], work: Path, processes: int = 1, env: Mapping[str, str] = {}
) -> Report:
    """Run a module that calls `answer`, in processes of its own."""
    ask = work / f"{module}-{os.getpid()}-{time.monotonic_ns()}.json"
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    ask.write_text(json.dumps({**given, "started": time.time()}))
    try:
        done = subprocess.run(
            [*launcher, module, str(ask)], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S,
            env={**os.environ, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", **env},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Report([], f"took more than {LIMIT_S} s")
    answers = [ask.with_suffix(f".{rank}") for rank in range(processes)]
    if done.returncode or not all(path.exists() for path in answers):
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        told = [line for line in lines if line.startswith("error: ")] or lines[-1:] or ["no output"]
        return Report([], told[0].removeprefix("error: "))
    return Report([json.loads(path.read_text()) for path in answers])


def answer(work: Callable[[Mapping[str, Any]], Any]) -> None:
    """In such a process: `work` on what was given, and leave what it returns for `launch`."""
    ask = Path(sys.argv[1])
    found = work(json.loads(ask.read_text()))
    ask.with_suffix(f".{os.environ.get('RANK', '0')}").write_text(json.dumps(found))


def make(spec: Spec, rows: int = 64) -> None:
    """Make the base and the shards of a spec, once, before anything is timed."""
    from benchmarks import bases
    from dbtrain.models.base import Base

    with bases.without_weights():
        base = Base.find(bases.model(spec.model, Path(spec.work), spec.on_disk))
    bases.write_shards(Path(spec.work) / f"shards-{spec.model}", spec.model, base, rows, ("instance",))


def _settings(spec: Spec) -> dict[str, Any]:
    """The config of a run, before its overrides: rank 8 on the attention layers, no checkpoint on the way."""
    from benchmarks import bases, watch

    work = Path(spec.work)
    steps = watch.Plan(spec.warm_up, spec.windows, spec.window).steps
    return {
        "run_dir": str(work / "runs" / f"{os.getpid()}-{time.monotonic_ns()}"),
        "model": {"path": bases.model(spec.model, work, spec.on_disk).path},
        "data": {"shards": str(work / f"shards-{spec.model}")},
        "adapter": {"rank": 8},
        "train": {
            "steps": steps, "global_batch": spec.samples_a_step, "micro_batch": spec.batch,
            "checkpoint_every": steps, "log_every": steps, "keep": 1,
            "precision": "fp32" if spec.model == "tiny" else "bf16",
        },
    }  # fmt: skip


def _train(given: Mapping[str, Any]) -> dict[str, Any]:
    """Train as the verb does; what was seen of it."""
    import yaml

    from benchmarks import bases, flops, trainer, watch
    from dbtrain.config import Config
    from dbtrain.runtime import console, dist

    console.start()
    imports_s, imports_cpu_s = time.time() - given["started"], time.process_time()
    config = Path(given["work"]) / f"config-{os.getpid()}-{time.monotonic_ns()}.yaml"
    config.write_text(yaml.safe_dump(given["config"]))
    cfg = Config.load(config, given["overrides"])
    plan = watch.Plan(given["warm_up"], given["windows"], given["window"])
    watcher = watch.Watch(plan, dist.device(), bool(cfg.train.compile))
    with bases.without_weights(), watcher.run() as seen:
        trainer.train(cfg)
    found = {**asdict(seen), "imports_s": imports_s, "imports_cpu_s": imports_cpu_s}
    if given["rate"]:
        found["matmul_rate"] = flops.matmul_rate(dist.device().type, str(cfg.train.precision))
    return found


def main() -> None:
    from dbtrain.runtime import dist
    from dbtrain.runtime.errors import ConfigError

    try:
        answer(_train)
        dist.finish(0)
    except ConfigError as error:
        print(f"error: {'; '.join(error.problems)}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:  # torch's: out of memory, an unsupported kernel; told in the table
        print(f"error: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
