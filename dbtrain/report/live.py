"""Serve the report page to a browser on this machine, and keep it up to date while a run or fleet goes on.

It is a process of its own, of the lowest priority, that only reads: it takes no lock and writes nothing.
Other users of the machine cannot see the page, which may show private photos, without its secret address.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

from dbtrain.report import report
from dbtrain.report.run import is_fresh
from dbtrain.runtime import fleet_status, lock
from dbtrain.runtime.errors import ConfigError, reason
from dbtrain.runtime.run_folder import RunFolder

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")  # by which a browser may call it: another site's name would be DNS rebinding
HEADERS = {
    "Cache-Control": "no-store", "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin", "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}  # fmt: skip
UNREAD = (lock.NAME, "report.html", "tb")  # in a run folder; the page does not show them


def serve(folders: Sequence[Path], port: int) -> Iterator[str]:
    """Serve the page about the runs in these folders, or the fleet in one, until Ctrl-C; yields its address.

    `port`: 0 for any that is free. Raises ConfigError if it is in use.
    """
    try:
        server = Server(folders, port)
    except OSError as error:
        raise ConfigError(f"port {port} of {HOST}: {reason(error)}; choose another with --port") from error
    os.nice(19)  # training comes first
    with server:
        yield server.url
        with suppress(KeyboardInterrupt):
            server.serve_forever()


class Server(ThreadingHTTPServer):
    """Answers requests for the page, whose secret address is `url`."""

    daemon_threads = True

    def __init__(self, folders: Sequence[Path], port: int) -> None:
        self.folders = [RunFolder(folder) for folder in folders]
        self.path = f"/{secrets.token_urlsafe(32)}/"
        self.busy = Lock()
        self.made = ("", b"")  # version and content of the last page
        super().__init__((HOST, port), Handler)

    @cached_property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}{self.path}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Of a browser that went away before it had its answer, say nothing."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    def version(self) -> str:
        """Changes when a file that the page shows does."""
        return hashlib.sha256(repr([list(_seen(folder)) for folder in self.folders]).encode()).hexdigest()[
            :32
        ]

    def page(self) -> tuple[str, bytes]:
        """The version and the HTML of the page, made anew if there is something new."""
        with self.busy:
            if (version := self.version()) != self.made[0]:
                self.made = (version, self._render(version).encode())
            return self.made

    def _render(self, version: str) -> str:
        absent = [str(one.path) for one in self.folders if not (one.config.is_file() or _is_fleet(one))]
        try:
            if not absent:
                return report.html_of([one.path for one in self.folders], None, live=version)
            title = "Waiting"
            problem = f"There is no run in {', '.join(absent)} yet. This page shows it once it begins."
        except ConfigError as error:
            title, problem = "This cannot be shown", str(error)
        return report.filled("waiting.html.jinja", 1, title=title, problem=problem, many=False, live=version)


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD of one address; with an ETag, by which the page finds out that it is outdated."""

    server: Server
    server_version, sys_version = "dbtrain", ""
    timeout = 30  # s, for a browser to send its request

    def do_GET(self) -> None:
        if self._is_allowed():
            version, page = self.server.page()
            self._answer(200, page, version)

    def do_HEAD(self) -> None:
        if self._is_allowed():
            self._answer(200, b"", self.server.version())

    def _is_allowed(self) -> bool:
        """Whether the request has the name and the secret of this server; if not, it is refused."""
        if self.headers.get("Host", "").partition(":")[0] not in NAMES:
            self._answer(403, b"not a name of this server\n")
        elif not hmac.compare_digest(self.path.encode(), self.server.path.encode()):
            self._answer(404, b"not found\n")
        else:
            return True
        return False

    def _refuse(self) -> None:
        self._answer(405, b"this page can only be read\n")

    do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = _refuse

    def _answer(self, code: int, content: bytes, version: str = "") -> None:
        self.send_response(code)
        kind = "text/html" if code == 200 else "text/plain"
        headers = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(content)), **HEADERS}
        headers |= {"ETag": f'"{version}"'} if version else {}
        headers |= {"Allow": "GET, HEAD"} if code == 405 else {}
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the address is a secret."""


def _is_fleet(folder: RunFolder) -> bool:
    return (folder.path / fleet_status.NAME).is_file()


def _seen(folder: RunFolder) -> Iterator[tuple[object, ...]]:
    """What tells that a run, or a fleet with its runs, has something new to show."""
    yield from _entries(folder.path, 2)
    yield (is_fresh(folder.path / lock.NAME),)
    if _is_fleet(folder):
        try:
            runs = [
                RunFolder(folder.path / one.run) for one in fleet_status.Status.read(folder.path).subjects
            ]
        except ConfigError:  # the page says why
            return
        for run in runs:
            yield from _seen(run)


def _entries(folder: Path, depth: int) -> Iterator[tuple[object, ...]]:
    """(path, size, time of the last change) of what lies in a folder, as deep as that."""
    try:
        found = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:  # not there yet, or not any more
        return
    for entry in found:
        if entry.name in UNREAD:
            continue
        try:
            stat = entry.stat()
        except OSError:  # a temporary file that is gone
            continue
        yield entry.path, stat.st_size, stat.st_mtime_ns
        if depth > 1 and entry.is_dir():
            yield from _entries(Path(entry.path), depth - 1)
