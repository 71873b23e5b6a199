"""Shards from folders, URLs and pipes: the same bytes, retried where it can help, named where not."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dbtrain.data import storage
from dbtrain.data.storage import Storage
from dbtrain.runtime.errors import ConfigError
from tests.conftest import Make, dbtrain, slow, train
from tests.runs import EXPORT


class Server(http.server.ThreadingHTTPServer):
    """A folder over HTTP, or as a bucket of S3; `harm` may answer instead."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, []  # type: ignore[var-annotated]
        self.harm: Callable[[str, int], bytes | int | None] = lambda name, time_: None
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.split("?")[0].rsplit("/", 1)[1]
        path = self.server.folder / name
        if self.command == "GET":
            self.server.asked.append(name)
        answer = self.server.harm(name, self.server.asked.count(name))
        if answer is None:
            answer = path.read_bytes() if path.is_file() else 404
        if isinstance(answer, int):
            self.send_error(answer)
            return
        first, last = 0, len(answer)
        if (asked := self.headers.get("Range", "")).startswith("bytes="):
            begin, end = asked.removeprefix("bytes=").split("-")
            first, last = int(begin), min(last, int(end or last) + 1)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(last - first))
        self.send_header("Content-Range", f"bytes {first}-{last - 1}/{len(answer)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", '"one"')
        self.send_header("Last-Modified", "Wed, 01 Jan 2025 00:00:00 GMT")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(answer[first:last])

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(prepared: Path) -> Iterator[Server]:
    found = Server(prepared)
    yield found
    found.shutdown()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No pauses, and a cache of this test's own."""
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in (("KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b")):
        monkeypatch.setenv(f"AWS_{name}" if name.startswith("SECRET") else f"AWS_ACCESS_{name}", value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.mark.parametrize("kind", ["file:", "s3", *map(slow, ("file://", "http", "pipe"))])
def test_training_from_anywhere_gives_the_same_adapter(
    make: Make, tmp_path: Path, prepared: Path, server: Server, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    local = train(make(run_dir=str(tmp_path / "local"), data__shards=str(prepared)))
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv(storage.ALLOW_PIPE, "1")
    where = {"file:": f"file:{prepared}", "file://": f"file://{prepared}", "http": f"{server.url}/dog",
             "s3": "s3://bucket/dog", "pipe": f"pipe:cat {prepared}/{{}}"}[kind]  # fmt: skip
    run = train(make(data__shards=where))
    assert (run / EXPORT).read_bytes() == (local / EXPORT).read_bytes()
    kept = list((tmp_path / "cache" / "dbtrain" / "shards").glob("*"))
    assert bool(kept) == (kind in ("http", "s3", "pipe"))
    if kind == "http":
        before = len(server.asked)
        train(make(data__shards=where, run_dir=str(tmp_path / "again")))
        assert set(server.asked[before:]) == {"manifest.json"}, "the rest is on this machine"
        kept[0].write_bytes(b"damaged")
        train(make(data__shards=where, run_dir=str(tmp_path / "third")))


def shard_of(prepared: Path) -> tuple[str, str]:
    path = sorted(prepared.glob("instance-*.tar"))[0]
    return path.name, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("harm", ["busy", "short", "altered", "slow"])
def test_what_passes_is_tried_again(
    prepared: Path, server: Server, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    name, sha256 = shard_of(prepared)
    whole = (prepared / name).read_bytes()
    monkeypatch.setattr(storage, "SLOW_S", 1.0 if harm == "slow" else 30.0)
    wake = threading.Event()

    def answer(asked: str, time_: int) -> bytes | int | None:
        if time_ > 1:
            return None
        if harm == "slow":
            wake.wait(3)
        return {"busy": 503, "short": whole[:-10], "altered": b"?" + whole[1:], "slow": whole}[harm]

    server.harm = answer
    assert Storage(server.url).read(name, sha256) == whole
    assert server.asked.count(name) == 2
    wake.set()


def test_what_does_not_pass_is_named(prepared: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(storage.ALLOW_PIPE, "1")
    name, sha256 = shard_of(prepared)
    with pytest.raises(FileNotFoundError):
        Storage(server.url).read("instance-00009-0.tar")
    server.harm = lambda asked, time_: 500
    with pytest.raises(ConfigError, match=rf"{server.url}/{name} cannot be read: .*500"):
        Storage(server.url, retries=2).read(name, sha256)
    assert server.asked.count(name) == 3
    server.shutdown()
    server.server_close()
    with pytest.raises(ConfigError, match=rf"{server.url}/{name} cannot be read"):
        Storage(server.url, retries=1).read(name, sha256)
    with pytest.raises(ConfigError, match="exit code 3, no such host"):
        Storage("pipe:echo no such host >&2; exit 3", retries=0).read(name)


def test_a_failing_disk_is_tried_again(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, sha256 = shard_of(prepared)
    real, failures = Path.read_bytes, iter([5, 116])  # EIO, ESTALE

    def read_bytes(path: Path) -> bytes:
        if path.name == name and (number := next(failures, 0)):
            raise OSError(number, "fails", str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert hashlib.sha256(Storage(str(prepared)).read(name, sha256)).hexdigest() == sha256


def test_a_full_disk_does_not_stop_what_reads_from_afar(
    server: Server, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, sha256 = shard_of(prepared)

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(storage.files, "write_atomically", full)
    assert Storage(server.url).read(name, sha256)


def test_a_pipe_runs_only_where_it_is_allowed(make: Make, tmp_path: Path) -> None:
    make(data__shards=f"pipe:touch {tmp_path}/canary; cat {{}}")
    done = dbtrain("train", tmp_path / "c.yaml")
    assert done.returncode == 2 and "set DBTRAIN_ALLOW_PIPE=1" in done.stderr
    assert not (tmp_path / "canary").exists()


def test_prepare_refuses_to_write_elsewhere(make: Make, tmp_path: Path) -> None:
    make(data__shards="s3://bucket/dog")
    done = dbtrain("prepare", tmp_path / "c.yaml")
    assert done.returncode == 2 and "prepare writes to a local folder only" in done.stderr
