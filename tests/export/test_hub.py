"""Publishing, through the real Hub client, to a stand-in for the Hub's endpoints on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dbtrain.adapters.formats.diffusers_file import FILE
from dbtrain.export import hub as publishing
from dbtrain.prepare.prepare import prepare
from dbtrain.runtime.errors import ConfigError
from tests.conftest import Make, dbtrain, train

TOKEN = "hf_" + "s3cret" * 6


class Hub(ThreadingHTTPServer):
    """Keeps what is pushed: small files come inside the commit, weights by the LFS protocol."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Endpoints)
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.created: dict[str, Any] = {}
        self.refuse = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Endpoints(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.body()
        self.server.asked.append((self.path, self.headers.get("Authorization", "")))
        if self.server.refuse or self.headers.get("Authorization") not in (f"Bearer {TOKEN}", None):
            return self.answer(403, {"error": f"no write access for {TOKEN}"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            return self.answer(200, {"url": f"{self.server.url}/me/dog", "name": "me/dog", "id": "1"})
        if self.path.endswith("/preupload/main"):
            asked = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "lfs" if "safetensors" in f["path"] else "regular",
                      "shouldIgnore": False, "oid": None} for f in asked]  # fmt: skip
            return self.answer(200, {"files": modes})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [{"oid": o["oid"], "size": o["size"], "authenticated": True, "actions": {
                "upload": {"href": f"{self.server.url}/upload/{o['oid']}", "header": {}}}}
                for o in json.loads(body)["objects"]]  # fmt: skip
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if "/commit/main" in self.path:
            for line in body.decode().splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    self.server.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
                if item["key"] == "lfsFile":
                    self.server.files[item["value"]["path"]] = self.server.blobs[item["value"]["oid"]]
            return self.answer(200, {"commitUrl": f"{self.server.url}/me/dog/commit/abc", "commitOid": "abc",
                                     "success": True})  # fmt: skip
        return self.answer(404, {"error": self.path})

    def do_PUT(self) -> None:
        data = self.body()
        self.server.blobs[self.path.rsplit("/", 1)[1]] = data
        assert hashlib.sha256(data).hexdigest() == self.path.rsplit("/", 1)[1]
        self.answer(200, {})

    def do_GET(self) -> None:
        self.answer(200, {"name": "me", "type": "user", "auth": {}})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, code: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        return


@contextmanager
def serving() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as server:
        yield server


def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    home = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return home | {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}


@pytest.mark.slow
def test_a_run_pushes_the_adapter_its_card_and_its_pictures_and_nothing_else(
    make: Make, tmp_path: Path, hub: Hub
) -> None:
    make(hub__repo="dog", hub__license="openrail++", train__steps=2, sample__prompts=["a photo of sks dog"],
         export__formats=["diffusers", "peft"])  # fmt: skip
    done = dbtrain("run", tmp_path / "c.yaml", **environment(hub, tmp_path))
    assert done.returncode == 0
    assert f"pushed {tmp_path / 'run' / 'export'} to {hub.url}/me/dog" in done.stderr
    assert hub.created["name"] == "dog" and "private" in (*hub.created, *hub.created.values())
    local = tmp_path / "run" / "export"
    assert hub.files == {
        name: (local / name).read_bytes()
        for name in (FILE, "README.md", "samples.png", "unet/adapter_config.json",
                     "unet/adapter_model.safetensors")
    }  # fmt: skip
    card = hub.files["README.md"].decode()
    assert "license: openrail++" in card and "url: samples.png" in card and "final loss_prior" in card
    with Image.open(local / "samples.png") as sheet:
        assert sheet.height > 2 * 96
    everything = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in data for data in everything)
    assert TOKEN not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_refused_push_says_so_without_the_token_and_keeps_the_export(
    make: Make, tmp_path: Path, hub: Hub
) -> None:
    cfg = make(train__steps=1)
    prepare(cfg)
    run = train(cfg)
    hub.refuse = True
    where = environment(hub, tmp_path)
    failed = dbtrain("export", tmp_path / "c.yaml", "train.steps=1", "hub.repo=me/dog", **where)
    assert failed.returncode == 2
    assert "hub.repo is 'me/dog', but the push failed" in failed.stderr
    assert TOKEN not in failed.stdout + failed.stderr and "Traceback" not in failed.stderr
    assert (run / "export" / FILE).is_file()
    nobody = dbtrain("export", tmp_path / "c.yaml", "train.steps=1", "hub.repo=me/dog", HF_TOKEN="")
    assert nobody.returncode == 2 and "there is no Hub token" in nobody.stderr
    early = dbtrain(
        "train", tmp_path / "c.yaml", f"run_dir={tmp_path / 'new'}", "hub.repo=me/dog", HF_TOKEN=""
    )
    assert early.returncode == 2 and "there is no Hub token" in early.stderr
    assert not (tmp_path / "new").exists(), "it says so before it trains"


@pytest.mark.parametrize(
    ("offline", "token", "told"),
    [(False, None, "there is no Hub token"), (True, TOKEN, "set HF_HUB_OFFLINE=0"), (False, TOKEN, None)],
)
def test_what_keeps_a_push_from_the_hub_is_said_before_training(
    make: Make, monkeypatch: pytest.MonkeyPatch, offline: bool, token: str | None, told: str | None
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    publishing.check(make())
    with pytest.raises(ConfigError, match=told) if told else nullcontext():
        publishing.check(make(hub__repo="me/dog"))
