"""Storage of shards: a folder or a URL, read with retries. Remote files are cached on this machine."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooSlow
from dataclasses import dataclass
from pathlib import Path

from dbtrain.runtime import console, files
from dbtrain.runtime.errors import ConfigError, reason

TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR}
TRANSIENT |= {getattr(errno, "EREMOTEIO", errno.EIO)}  # Linux only
SLOW_S = 120.0  # timeout of a remote read
ALLOW_PIPE = "DBTRAIN_ALLOW_PIPE"


@dataclass(frozen=True)
class Storage:
    """The storage that `data.shards` names.

    `location`: a path, `file:` or `file://` and a path, a URL of one of `files.REMOTE`, or `pipe:` and a
    shell command that writes file `{}` to stdout. The environment has to allow commands, because a config
    from someone else could contain any.
    """

    location: str
    retries: int = 4

    @property
    def folder(self) -> Path | None:
        """The folder on this machine; None if the storage is remote."""
        return files.folder_of(self.location)

    @property
    def scheme(self) -> str:
        """The scheme of a URL or command; empty for a path."""
        return files.scheme_of(self.location)

    def where(self, name: str) -> str:
        """The path, URL or command of a file."""
        if self.folder:
            return str(self.folder / name)
        if self.scheme == "pipe":
            return self.location.replace("{}", name)
        return f"{files.with_variables(self.location).rstrip('/')}/{name}"

    def has(self, name: str) -> bool:
        """Whether a file exists. Always True for remote storage, where only reading it can tell."""
        return not self.folder or (self.folder / name).is_file()

    def read(self, name: str, sha256: str | None = None) -> bytes:
        """The content of a file.

        Retries transient errors up to `retries` times, with growing pauses. Raises FileNotFoundError if the
        file does not exist, and ConfigError if it cannot be read or does not have this `sha256`.
        """
        # Remote files come from the cache if they are in it.
        cached = files.cache() / "shards" / sha256 if sha256 and not self.folder else None
        if cached and cached.is_file():
            data = cached.read_bytes()
            if _matches(data, sha256):
                return data
        # Otherwise read the file, again if the error is transient.
        for attempt in range(self.retries + 1):
            try:
                data = self._read(name)
                if _matches(data, sha256):
                    if cached:
                        _cache(cached, data)
                    return data
                problem = f"{self.where(name)} was altered: its sha256 does not match the manifest"
                if self.folder:  # another read would give the same bytes
                    break
            except (FileNotFoundError, PermissionError, ConfigError):
                raise
            except OSError as error:
                if self.folder and error.errno not in TRANSIENT:
                    raise
                problem = f"{self.where(name)} cannot be read: {reason(error)}"
            except TooSlow:
                problem = f"{self.where(name)} cannot be read: timed out after {SLOW_S:g} s"
            except Exception as error:  # each client library has its own kinds
                problem = f"{self.where(name)} cannot be read: {reason(error)}"
            if attempt < self.retries:
                console.warn(f"{problem}; retrying in {2**attempt} s")
                time.sleep(2**attempt)
        raise ConfigError(problem)

    def _read(self, name: str) -> bytes:
        if self.folder:
            return _local(self.folder / name)
        pool = ThreadPoolExecutor(1)
        try:
            read = self._read_piped if self.scheme == "pipe" else self._fetch
            return pool.submit(read, name).result(SLOW_S)
        finally:
            pool.shutdown(wait=False)  # does not wait for a read that hangs

    def _fetch(self, name: str) -> bytes:
        try:
            import fsspec

            filesystem, path = fsspec.url_to_fs(self.where(name))
            return filesystem.cat_file(path)
        except ImportError as error:
            raise ConfigError(
                f"data.shards: cannot open '{self.location}': {reason(error)}; "
                "run: pip install 'dbtrain[remote]'"
            ) from error

    def _read_piped(self, name: str) -> bytes:
        if os.environ.get(ALLOW_PIPE) != "1":
            raise ConfigError(
                f"data.shards: '{self.location}' runs a command; if you trust it, set {ALLOW_PIPE}=1"
            )
        command = self.where(name).removeprefix("pipe:")
        done = subprocess.run(command, shell=True, capture_output=True, timeout=SLOW_S)
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            raise ChildProcessError(f"exit code {done.returncode}" + (f", {lines[-1]}" if lines else ""))
        return done.stdout


def _local(path: Path) -> bytes:
    """The content of a file on this machine. Raises ConfigError if it is not a regular one, or too large."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ConfigError(f"{path} is not a regular file")
    most = files.TEXT_BYTES if path.suffix == ".json" else files.FILE_BYTES
    if path.is_file() and (size := path.stat().st_size) > most:
        raise ConfigError(f"{path} has {files.size_text(size)}, more than {files.size_text(most)}")
    return path.read_bytes()


def _matches(data: bytes, sha256: str | None) -> bool:
    return sha256 is None or hashlib.sha256(data).hexdigest() == sha256


def _cache(path: Path, data: bytes) -> None:
    """Cache a file under its hash, if there is space for it.

    fsspec's own caches use the URL as key, keep the partial file of a killed download, and need a writable
    cache even to read.
    """
    try:
        files.write_atomically(path, data)
    except OSError as error:
        console.warn(f"cannot cache {path}: {reason(error)}")
