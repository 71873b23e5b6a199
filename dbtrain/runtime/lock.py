"""One run at a time in a folder: a lock file whose owner gives signs of life.

Made by a hard link, which is one step on network file systems too; flock is none on many of them.
A lock whose owner is gone is taken over, whether it ended on this machine or another.
filelock 4.3's SoftFileLease does not: on Linux it takes over by RENAME_EXCHANGE only, which file systems
may refuse, and an empty lock never. Nor does it know of SLURM's restarts.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from dbtrain.runtime import console, dist, files, preemption
from dbtrain.runtime.errors import ConfigError

NAME = ".lock"
BEAT_S = 5.0
DEAD_S = 30.0  # without a sign of life for so long, an owner on another machine is gone
POLL_S = 1.0


@contextmanager
def held(folder: Path, what: str, wait: bool = False) -> Iterator[None]:
    """Hold a folder's lock for the block, on behalf of all ranks; none if nothing can be written there.

    If another run has it: raises ConfigError on all ranks, or, with `wait`, waits until it is free.
    """
    mine: Lock | None = None
    told = False
    while True:
        busy = False
        with dist.agreed():
            preemption.check()
            if dist.is_main() and (not folder.exists() or os.access(folder, os.W_OK)):
                mine = Lock.take(folder)
                busy = mine is None
                if busy and not wait:
                    raise ConfigError(f"{what} {folder} is in use by {owner_of(folder)}; wait for it to end")
        if not dist.from_main(busy):
            break
        if not told:
            console.say(f"{what} {folder} is in use by {owner_of(folder)}: waiting for it")
        told = True
        time.sleep(POLL_S)
    try:
        yield
    finally:
        if mine:
            mine.release()


class Lock:
    """A lock that this process holds; a thread keeps it fresh."""

    def __init__(self, path: Path, token: str) -> None:
        self.path, self.token = path, token
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self.thread.start()

    @classmethod
    def take(cls, folder: Path) -> Lock | None:
        """The lock of `folder`, taken over if its owner is gone; None if that lives."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / NAME
        token = secrets.token_hex(8)
        part = folder / f"{NAME}.{token}"
        try:
            files.write(part, json.dumps(_me() | {"token": token}))
            while True:
                try:
                    os.link(part, path)
                    return cls(path, token)
                except FileExistsError:
                    heir = _inherit(path, part)
                    if heir is not None:
                        return cls(path, token) if heir else None
                except OSError as error:
                    if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                        raise
                    console.say(f"{folder} is on a file system without hard links: not locked")
                    part.replace(path)
                    return cls(path, token)
        finally:
            part.unlink(missing_ok=True)

    def release(self) -> None:
        self.closed.set()
        self.thread.join()
        if _read(self.path).get("token") == self.token:
            self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self.closed.wait(BEAT_S):
            try:
                os.utime(self.path)
            except OSError:  # the folder vanished: the next save says so
                return


def owner_of(folder: Path) -> str:
    """Who holds a folder's lock, in words."""
    owner = _read(folder / NAME)
    job = f", job {owner['job']}" if owner.get("job") else ""
    return f"another run (process {owner.get('pid', '?')} on {owner.get('host', '?')}{job})"


def holder(folder: Path) -> tuple[str, bool] | None:
    """Who holds a folder's lock, in words, and whether it surely lives; None if nobody does.

    Looks and does not wait: of an owner on another machine nothing is sure.
    """
    owner = _read(folder / NAME)
    near = owner.get("machine") == _machine()
    if not owner or (near and _started(owner.get("pid", 0)) != owner.get("started")):
        return None
    return owner_of(folder), near


def _me() -> dict[str, Any]:
    return {
        "host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid()),
        "machine": _machine(), "job": os.environ.get("SLURM_JOB_ID", ""),
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }  # fmt: skip


def _inherit(path: Path, part: Path) -> bool | None:
    """Put `part` in the place of a lock whose owner is gone.

    False if it is alive; None if the lock changed meanwhile, so that all is to be asked again.
    Only one may replace a given lock: who makes the file named by that lock's hash, its heir, and
    should that one die before it did so, its heir in turn. A lock once replaced never comes back.
    """
    dead = before = _text(path)
    heirs: list[Path] = []
    while True:
        if before is None:
            return None
        if _lives(heirs[-1] if heirs else path, _parsed(before)):
            return False
        heirs.append(path.with_name(f"{NAME}.{sha256(before.encode()).hexdigest()[:16]}"))
        try:
            os.link(part, heirs[-1])
            break
        except FileExistsError:
            before = _text(heirs[-1])
    try:
        if _text(path) != dead:
            return None
        part.replace(path)
        return True
    finally:
        for heir in heirs:
            heir.unlink(missing_ok=True)


def _lives(path: Path, owner: dict[str, Any]) -> bool:
    """Whether a lock's owner is there still; for one on another machine, waits for a sign of life."""
    if not owner:  # spoilt
        return False
    me = _me()
    if owner.get("machine") == me["machine"]:
        return _started(owner.get("pid", 0)) == owner.get("started") is not None
    if owner.get("job") and owner["job"] == me["job"]:  # SLURM starts a job again after it has ended
        return owner.get("restart") == me["restart"]
    try:
        before, until = path.stat().st_mtime_ns, time.monotonic() + DEAD_S
        while time.monotonic() < until:
            if path.stat().st_mtime_ns != before:
                return True
            time.sleep(POLL_S)
            preemption.check()
    except FileNotFoundError:
        pass
    return False


def _machine() -> str:
    """The boot and the process table that a pid belongs to."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str | None:
    """When a living process started, in the kernel's clock; None if there is none (or a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return _started_elsewhere(pid)
    return None if fields[0] in "ZX" else fields[19]


def _started_elsewhere(pid: int) -> str | None:
    """`_started` on systems without /proc, which do not tell the time."""
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except OSError:
        return None
    return "some time"


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return None


def _parsed(text: str) -> dict[str, Any]:
    """What a lock says; nothing if it was spoilt, as by a power cut."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _read(path: Path) -> dict[str, Any]:
    return _parsed(_text(path) or "")
