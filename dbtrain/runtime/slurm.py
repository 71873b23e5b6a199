"""Ranks that srun starts without torchrun."""

from __future__ import annotations

import os
import subprocess


def adopt() -> None:
    """Set torchrun's variables from srun's if srun, not torchrun, started several tasks."""
    if "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    for ours, slurms in (
        ("RANK", "SLURM_PROCID"), ("LOCAL_RANK", "SLURM_LOCALID"), ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"),
    ):  # fmt: skip
        os.environ[ours] = os.environ[slurms]
    if "MASTER_ADDR" not in os.environ:
        nodes = subprocess.run(
            ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        os.environ["MASTER_ADDR"] = nodes.stdout.split()[0]
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 10000))
