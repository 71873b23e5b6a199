"""Where shards lie: a folder or a URL, read with retries; what comes from afar is kept on this machine."""

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
from urllib.parse import unquote, urlsplit

from dbtrain.runtime import console, files
from dbtrain.runtime.errors import ConfigError, reason

REMOTE = ("http", "https", "s3", "gs", "az", "hf")  # through fsspec
PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.EREMOTEIO}
SLOW_S = 120.0  # a read from afar that takes longer is tried again
ALLOW_PIPE = "DBTRAIN_ALLOW_PIPE"


@dataclass(frozen=True)
class Storage:
    """A place of shards as the config names it.

    A path, `file:` or `file://` and a path, a URL of one of `REMOTE`, or `pipe:` and a shell command that
    writes the file whose name stands in for `{}`: only if the environment allows it, as a config from a
    stranger would run it.
    """

    location: str
    retries: int = 4

    @property
    def folder(self) -> Path | None:
        """The folder on this machine; None for what lies elsewhere."""
        scheme = self.scheme
        if scheme == "file":
            return files.expand(unquote(urlsplit(self.location).path))
        return None if scheme else files.expand(self.location)

    @property
    def scheme(self) -> str:
        """Of a URL or a command; empty for a path."""
        scheme = self.location.partition(":")[0]
        return scheme if scheme in (*REMOTE, "file", "pipe") else ""

    def where(self, name: str) -> str:
        """A file of it, as messages name it."""
        if self.folder:
            return str(self.folder / name)
        if self.scheme == "pipe":
            return self.location.replace("{}", name)
        return f"{self.location.rstrip('/')}/{name}"

    def has(self, name: str) -> bool:
        """Whether a file is there; for what lies elsewhere, reading it will tell."""
        return not self.folder or (self.folder / name).is_file()

    def read(self, name: str, sha256: str | None = None) -> bytes:
        """A file's bytes; with `sha256`, those and no others.

        What may pass is tried again, `retries` times, with growing pauses. Raises FileNotFoundError if it
        is not there, ConfigError if it is not the one, or cannot be read.
        """
        kept = files.cache() / "shards" / sha256 if sha256 and not self.folder else None
        if kept and kept.is_file():
            data = kept.read_bytes()
            if _is(data, sha256):
                return data
        for attempt in range(self.retries + 1):
            try:
                data = self._read(name)
                if _is(data, sha256):
                    if kept:
                        _keep(kept, data)
                    return data
                problem = f"{self.where(name)} was altered: its sha256 is not the manifest's"
                if self.folder:  # the same bytes, however often it is read
                    break
            except (FileNotFoundError, PermissionError, ConfigError):
                raise
            except OSError as error:
                if self.folder and error.errno not in PASSING:
                    raise
                problem = f"{self.where(name)} cannot be read: {reason(error)}"
            except TooSlow:
                problem = f"{self.where(name)} cannot be read: not there after {SLOW_S:g} s"
            except Exception as error:  # the kinds of a dozen client libraries
                problem = f"{self.where(name)} cannot be read: {reason(error)}"
            if attempt < self.retries:
                console.warn(f"{problem}; trying again in {2**attempt} s")
                time.sleep(2**attempt)
        raise ConfigError(problem)

    def _read(self, name: str) -> bytes:
        if self.folder:
            return (self.folder / name).read_bytes()
        pool = ThreadPoolExecutor(1)
        try:
            read = self._read_piped if self.scheme == "pipe" else self._fetch
            return pool.submit(read, name).result(SLOW_S)
        finally:
            pool.shutdown(wait=False)  # a read that hangs is left to itself

    def _fetch(self, name: str) -> bytes:
        try:
            import fsspec

            place, path = fsspec.url_to_fs(self.where(name))
            return place.cat_file(path)
        except ImportError as error:
            raise ConfigError(
                f"data.shards is '{self.location}': {reason(error)}; run: pip install 'dbtrain[remote]'"
            ) from error

    def _read_piped(self, name: str) -> bytes:
        if os.environ.get(ALLOW_PIPE) != "1":
            raise ConfigError(
                f"data.shards is '{self.location}', which runs a command; if you trust it, set {ALLOW_PIPE}=1"
            )
        command = self.where(name).removeprefix("pipe:")
        done = subprocess.run(command, shell=True, capture_output=True, timeout=SLOW_S)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise ChildProcessError(f"exit code {done.returncode}" + (f", {said[-1]}" if said else ""))
        return done.stdout


def _is(data: bytes, sha256: str | None) -> bool:
    return sha256 is None or hashlib.sha256(data).hexdigest() == sha256


def _keep(path: Path, data: bytes) -> None:
    """Keep a copy on this machine, if there is room for it.

    Whole or not at all, by its hash. fsspec's caches go by URL, keep the part of a file that a killed
    download left, and cannot read without writing.
    """
    try:
        files.write_atomically(path, data)
    except OSError as error:
        console.warn(f"{path} is not kept: {reason(error)}")
