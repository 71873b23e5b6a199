"""Starts verbs as forks of a process that has imported all they need: a fraction of a second each.

`Forked` takes the command line of a cold start. Each fork gets the environment, folder and output files
that it is given; no module of dbtrain reads the environment when it is imported. Several ranks get the
variables that torchrun sets on one node, but no agent: each has to end by itself, as under srun.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import itertools
import json
import os
import pkgutil
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

import dbtrain
from tests.session import FOLDER

ROOT = Path(__file__).parents[1]
LIBRARIES = {  # and what they would import when it is asked for
    "numpy": (), "yaml": (), "typer": (), "jinja2": (), "webdataset": (), "packaging.requirements": (),
    "pydantic": ("AfterValidator", "BaseModel", "Field", "TypeAdapter", "field_validator", "model_validator"),
    "PIL.Image": (), "PIL.ImageDraw": (), "PIL.JpegImagePlugin": (), "PIL.PngImagePlugin": (),
    "torch": (), "torch._dynamo": (), "torch._dynamo.backends.common": (),
    "torch._inductor.pattern_matcher": (), "torch.distributed.fsdp": (), "torch.nn.parallel": (),
    "torch.utils.flop_counter": (), "torch.utils.tensorboard": (), "safetensors.torch": (),
    "huggingface_hub": ("HfApi", "hf_hub_download"), "peft": (),
    "transformers": ("CLIPModel", "CLIPTextModel", "CLIPTokenizer", "T5EncoderModel", "ViTModel"),
    "diffusers": (
        "AutoencoderKL", "DDIMScheduler", "DDPMScheduler", "DiffusionPipeline", "IFPipeline",
        "IFSuperResolutionPipeline", "StableDiffusionPipeline", "StableDiffusionXLPipeline",
        "UNet2DConditionModel",
    ),
}  # fmt: skip
# Variables that libraries read when they are imported, by how their names begin.
AT_IMPORT = ("CUDA", "HF_", "HUGGINGFACE", "KMP_", "LD_", "MKL_", "OMP_", "PYTHON", "TORCH_")
PORTS = range(20000, 30000)  # below those that the kernel gives to outgoing connections


class Forked:
    """The processes that a command line would start: of one Python module or file, maybe under torchrun."""

    def __init__(
        self, command: list[str], env: dict[str, str], stdout: IO[Any], stderr: IO[Any], cwd: Path = ROOT
    ) -> None:
        ranks, words = _parsed(command)
        self.channel, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        request = json.dumps({"ranks": ranks, "words": words, "env": env, "cwd": str(cwd)})
        with theirs:
            fds = [theirs.fileno(), stdout.fileno(), stderr.fileno()]
            socket.send_fds(_server(), [request.encode()], fds)
        self.pids: list[int] = self._heard(None)
        self.codes: dict[int, int] = {}  # by rank, of those that have ended

    def _heard(self, seconds: float | None) -> Any:
        self.channel.settimeout(seconds)
        message = self.channel.recv(1 << 16)
        assert message, "the fork server has died"
        return json.loads(message)

    def wait(self, seconds: float, ranks: int | None = None) -> int:
        """The exit code of all ranks, or of the first that failed. Raises TimeoutError after so long.

        With `ranks`, wait only until so many of them have ended.
        """
        while len(self.codes) < (ranks or len(self.pids)):
            rank, code = self._heard(seconds)
            self.codes[rank] = code
        return next((code for code in self.codes.values() if code), 0)

    def poll(self) -> int | None:
        """The exit code, if all ranks have ended."""
        with contextlib.suppress(BlockingIOError):
            return self.wait(0)
        return None

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to all ranks that still run, or to one of them."""
        self.poll()
        for one, pid in enumerate(self.pids):
            if one not in self.codes and rank in (None, one):
                os.kill(pid, number)

    def kill(self) -> None:
        """End every process at once, with those that it started itself."""
        self.poll()
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
        self.wait(60)
        self.channel.close()


def can_fork(env: dict[str, str]) -> bool:
    """Whether libraries, as the server has imported them, are what this environment asks for."""
    return _at_import(env) == _at_import(dict(os.environ))


def _at_import(env: dict[str, str]) -> dict[str, str]:
    return {name: env[name] for name in env if name.startswith(AT_IMPORT) and name != "HF_TOKEN"}


def _parsed(command: list[str]) -> tuple[int, list[str]]:
    """Number of ranks, and what each of them runs: `-m MODULE` or a file, and arguments."""
    ranks, words = 1, command[1:]
    if words[:2] == ["-m", "torch.distributed.run"]:
        options = list(itertools.takewhile(lambda word: word.startswith("--"), words[2:]))
        ranks = next(int(word.partition("=")[2]) for word in options if word.startswith("--nproc"))
        words = words[2 + len(options) :]
    return ranks, words


@functools.cache
def _server() -> socket.socket:
    """The session's server, which the first worker that asks starts; it ends with the last of them."""
    folder = Path(os.environ[FOLDER])
    address = f"\0{folder.name}"  # a name of Linux that is gone with the server
    mine = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with FileLock(folder / "forks.lock"):
        with contextlib.suppress(ConnectionRefusedError):
            mine.connect(address)
            return mine
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(address)
            listener.listen()
            subprocess.Popen(
                [sys.executable, "-m", "tests.forkserver", str(listener.fileno())], cwd=ROOT,
                pass_fds=[listener.fileno()], stdin=subprocess.DEVNULL, start_new_session=True,
                env={**os.environ, "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"},
            )  # fmt: skip
            mine.connect(address)
    return mine


# What follows runs in the server and its forks.


def serve(listener: socket.socket) -> list[str]:
    """Fork for every request of every worker. Returns in each rank, with what it is to run."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel forgets those that end
    start = random.SystemRandom().randrange(len(PORTS))  # apart from the servers of other sessions
    ports = itertools.cycle([*PORTS[start:], *PORTS[:start]])
    workers: list[socket.socket] = []
    while True:
        for ready in select.select([listener, *workers], [], [])[0]:
            if ready is listener:
                workers.append(listener.accept()[0])
                continue
            message, fds, *_ = socket.recv_fds(ready, 1 << 20, 3)
            if not message:
                workers.remove(ready)
                ready.close()
                if not workers:
                    os._exit(0)
                continue
            port = next(port for port in ports if _is_free(port))
            if os.fork() == 0:
                for one in (listener, *workers):
                    one.close()
                return agent(json.loads(message), fds, port)
            for fd in fds:
                os.close(fd)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def agent(request: dict[str, Any], fds: list[int], port: int) -> list[str]:
    """Fork the ranks of one request, and tell how each of them ends. Returns in each rank."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have it ignored in the background
    channel, stdout, stderr = fds
    ranks: dict[int, int] = {}
    for rank in range(request["ranks"]):
        pid = os.fork()
        if pid == 0:
            os.close(channel)
            variables = _variables(rank, request["ranks"], port) if request["ranks"] > 1 else {}
            become(request["env"] | variables, request["cwd"], stdout, stderr)
            return request["words"]
        ranks[pid] = rank
    with socket.socket(fileno=channel) as told:
        told.send(json.dumps(list(ranks)).encode())
        for _ in range(len(ranks)):
            pid, status = os.wait()
            with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
                told.send(json.dumps([ranks[pid], os.waitstatus_to_exitcode(status)]).encode())
    os._exit(0)


def _variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def become(env: dict[str, str], cwd: str, stdout: int, stderr: int) -> None:
    """Make this fork what a process started anew would be."""
    os.setsid()
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.closerange(3, 256)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None
    sys.modules["numpy"].random.seed()  # as each process has its own; Python's is drawn anew in forks


def main() -> None:
    for module, names in LIBRARIES.items():
        found = importlib.import_module(module)
        for name in names:
            getattr(found, name)
    for module in pkgutil.walk_packages(dbtrain.__path__, "dbtrain."):
        if module.name != "dbtrain.__main__":
            importlib.import_module(module.name)
    gc.freeze()  # for forks to share this memory, and to end without a walk over it
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would be missing in the forks"
    words = serve(socket.socket(fileno=int(sys.argv[1])))
    code: Any = 1
    try:
        run(words)
        code = 0
    except SystemExit as leaving:
        code = leaving.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    # What an interpreter does at its end, but for taking all modules apart, which takes longer than a start.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(words: list[str]) -> None:
    """Run a module or a file as Python does."""
    if words[0] == "-m":
        sys.argv = words[1:]
        if "." in words[1]:  # a module that is run has not been imported
            sys.modules.pop(words[1], None)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
