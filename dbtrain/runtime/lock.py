"""One run at a time in a folder: a lock file that its owner touches regularly.

The lock is created by a hard link, which is atomic on network file systems too; many of them lack flock.
A lock whose owner is gone is taken over, whichever machine the owner was on. filelock 4.3's
SoftFileLease needs RENAME_EXCHANGE for that on Linux, which some file systems refuse; it never takes over
an empty lock, and does not know SLURM's restarts.
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
DEAD_S = 30.0  # an owner on another machine that has not touched its lock for this long is gone
POLL_S = 1.0

_gone: dict[str, float] = {}  # by owner that is gone: when it last touched a lock


@contextmanager
def held(folder: Path, what: str, wait: bool = False) -> Iterator[None]:
    """Hold a folder's lock for the block, on behalf of all ranks. A read-only folder needs no lock.

    If another run holds the lock, raises ConfigError on all ranks, or waits for it with `wait`.
    """
    mine: Lock | None = None
    waiting = False
    # Rank 0 takes the lock, again and again if it may wait.
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
        if not waiting:
            console.say(f"{what} {folder} is in use by {owner_of(folder)}; waiting for it to end")
        waiting = True
        time.sleep(POLL_S)
    # Hold it for the block.
    try:
        yield
    finally:
        if mine:
            mine.release()


class Lock:
    """A lock that this process holds and that a thread touches."""

    def __init__(self, path: Path, token: str) -> None:
        self.path, self.token = path, token
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self.thread.start()

    @classmethod
    def take(cls, folder: Path) -> Lock | None:
        """The lock of `folder`, taken over if its owner is gone. None if the owner is alive."""
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
                    replaced = _take_over(path, part)
                    if replaced is not None:
                        return cls(path, token) if replaced else None
                except OSError as error:
                    if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                        raise
                    console.say(f"{folder} is on a file system without hard links and cannot be locked")
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
            except OSError:  # the folder was deleted; the next save reports it
                return


def owner_of(folder: Path) -> str:
    """A phrase that names the run which holds a folder's lock."""
    owner = _read(folder / NAME)
    job = f", job {owner['job']}" if owner.get("job") else ""
    return f"another run (process {owner.get('pid', '?')} on {owner.get('host', '?')}{job})"


def holder(folder: Path) -> tuple[str, bool] | None:
    """A phrase that names the run which holds a folder's lock, and whether it is certainly alive.

    None if nobody holds it. Does not wait, so an owner on another machine is never certainly alive.
    """
    owner = _read(folder / NAME)
    local = owner.get("machine") == _machine()
    if not owner or (local and _started(owner.get("pid", 0)) != owner.get("started")):
        return None
    return owner_of(folder), local


def _me() -> dict[str, Any]:
    return {
        "host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid()),
        "machine": _machine(), "job": os.environ.get("SLURM_JOB_ID", ""),
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }  # fmt: skip


def _take_over(path: Path, part: Path) -> bool | None:
    """Replace a lock whose owner is gone by `part`.

    False if the owner is alive. None if the lock changed meanwhile, and the caller has to try again.
    Only the process that creates the claim file, which is named by the lock's hash, may replace that
    lock. If that process dies first, a claim on its claim replaces it, and so on. A lock that was
    replaced never comes back, because every lock has its own token.
    """
    # Claim the lock, or the claim of a dead process, and so on.
    dead = before = _text(path)
    claims: list[Path] = []
    while True:
        if before is None:
            return None
        if _is_alive(claims[-1] if claims else path, _parsed(before)):
            return False
        claims.append(path.with_name(f"{NAME}.{sha256(before.encode()).hexdigest()[:16]}"))
        try:
            os.link(part, claims[-1])
            break
        except FileExistsError:
            before = _text(claims[-1])
    # Replace it, unless someone else has done so since.
    try:
        if _text(path) != dead:
            return None
        part.replace(path)
        return True
    finally:
        for claim in claims:
            claim.unlink(missing_ok=True)


def _is_alive(path: Path, owner: dict[str, Any]) -> bool:
    """Whether a lock's owner is alive. Waits up to DEAD_S, once an owner, if only a touch can tell."""
    if not owner:  # a damaged lock
        return False
    me = _me()
    if owner.get("machine") == me["machine"]:
        return _started(owner.get("pid", 0)) == owner.get("started") is not None
    if owner.get("job") and owner["job"] == me["job"]:  # SLURM restarts a job only once it has ended
        return owner.get("restart") == me["restart"]
    process = " ".join(str(owner.get(key)) for key in ("machine", "pid", "started"))
    try:
        before, until = path.stat().st_mtime, time.monotonic() + DEAD_S
        if process in _gone and before < _gone[process] + 2 * BEAT_S:  # it touched all its locks until then
            return False
        while time.monotonic() < until:
            if path.stat().st_mtime != before:
                return True
            time.sleep(POLL_S)
            preemption.check()
        _gone[process] = before
    except FileNotFoundError:
        pass
    return False


def _machine() -> str:
    """The boot and the PID namespace that a pid belongs to."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; None if it is not running or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return _started_elsewhere(pid)
    return None if fields[0] in "ZX" else fields[19]


def _started_elsewhere(pid: int) -> str | None:
    """`_started` on systems without /proc, where the start time is unknown."""
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
    """The values in a lock file; {} if it is damaged, for example by a power cut."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _read(path: Path) -> dict[str, Any]:
    return _parsed(_text(path) or "")
