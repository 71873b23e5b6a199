"""What all tests of a session share: an environment without the user's, and folders that are made once."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

WORKER, FOLDER = "PYTEST_XDIST_WORKER", "DBTRAIN_TESTS_FOLDER"
OURS = (
    "DBTRAIN_CLUSTER", "DBTRAIN_KILLS", "DBTRAIN_REFERENCE", "DBTRAIN_REFERENCE_PYTHON", "DBTRAIN_SHARDING",
    FOLDER,
)  # fmt: skip
# Variables of launchers, batch systems and libraries, by how their names begin; and of launch/'s scripts.
PREFIXES = (
    "DBTRAIN_", "DIFFUSERS_", "GLOO_", "GROUP_", "HF_", "HUGGINGFACE_", "LOCAL_", "MASTER_", "NCCL_", "PET_",
    "PYTORCH_", "ROLE_", "SBATCH_", "SLURM_", "TORCH", "TRANSFORMERS_", "TRITON_", "WANDB_",
)  # fmt: skip
NAMES = (
    "RANK", "WORLD_SIZE", "COLUMNS", "FORCE_COLOR", "PYTHONDONTWRITEBYTECODE", "PYTHONWARNINGS",
    "http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "CONTAINER", "HEAD",
    "INTERFACE", "JOB", "MAX_REQUEUES", "MAX_RESTARTS", "MOUNTS", "NODES", "PORT", "RANKS", "RANKS_PER_NODE",
    "STARTER", "VENV",
)  # fmt: skip


def begin() -> Path:
    """Clean the environment, and point all caches into the session's folder; to be called before imports.

    The first pytest process makes the folder, and removes it when it ends; xdist's workers are given it.
    """
    for name in list(os.environ):
        if name not in OURS and (name in NAMES or name.startswith(PREFIXES)):
            del os.environ[name]
    sys.dont_write_bytecode = False  # hundreds of processes would each compile the same files
    if WORKER not in os.environ or FOLDER not in os.environ:
        made = tempfile.mkdtemp(prefix="dbtrain-tests-")
        Path(made).chmod(0o755)  # munge runs as a user of its own, and wants to see its socket
        os.environ[FOLDER] = made
        atexit.register(shutil.rmtree, made, ignore_errors=True)
    folder = Path(os.environ[FOLDER])
    (folder / "tmp").mkdir(exist_ok=True)
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # where tmp_path stays to be seen
    os.environ.update(
        XDG_CACHE_HOME=str(folder / "cache"), HF_HOME=str(folder / "hf"), TMPDIR=str(folder / "tmp"),
        TRITON_CACHE_DIR=str(folder / "triton"), MPLCONFIGDIR=str(folder / "matplotlib"),
        HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1",
    )  # fmt: skip
    tempfile.tempdir = None
    return folder


def once(name: str, fill: Callable[[Path], object]) -> Path:
    """A folder of the session that `fill` fills: by the first worker that asks for it, for all of them."""
    folder = Path(os.environ[FOLDER]) / "shared" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = folder.with_name(f".{folder.name}.made")
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            fill(folder)
            made.touch()
    return folder
