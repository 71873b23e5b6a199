"""Photos that are not a folder: tables, WebDataset tars, and data sets of the Hub.

`prepare` unpacks such a source once, into a folder of the cache that is named by what the source is. All that
comes after sees an ordinary folder, with the captions in text files.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl

from dbtrain.data import tables, unpack
from dbtrain.runtime import console, dist, files, lock
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.hashing import content_key

HUB = "hub:"
OPTIONS = {
    "hub": ("image", "caption", "split", "config", "revision"),
    "table": ("image", "caption"),
    "tars": (),
}  # that may follow a source's name after `?`
VERSION = 1  # of the files that are unpacked


@dataclass(frozen=True)
class Source:
    """A source that `prepare.photos` names."""

    text: str  # as it is written
    kind: str  # of OPTIONS
    location: str
    options: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, text: str) -> Source | None:
        """The source that a setting names; None for a folder. Raises ConfigError for an unknown option."""
        location, _, query = text.partition("?")
        if location.startswith(HUB):
            kind = "hub"
        elif location.endswith(".tar"):
            kind = "tars"
            location, query = (text, "") if files.scheme_of(text) else (location, query)
        elif location.lower().endswith(tables.SUFFIXES) and not files.expand(location).is_dir():
            kind = "table"
        else:
            return None
        options = dict(parse_qsl(query, keep_blank_values=True))
        if unknown := sorted(options.keys() - set(OPTIONS[kind])):
            known = ", ".join(OPTIONS[kind]) or "none"
            raise ConfigError(f"prepare.photos: '{text}' has the option '{unknown[0]}'; known are: {known}")
        return cls(text, kind, location.removeprefix(HUB), options)

    @property
    def files(self) -> list[str]:
        """The paths and URLs of its files; none of a data set of the Hub."""
        if self.kind == "hub":
            return []
        names = [self.location]
        if self.kind == "tars":
            from webdataset.shardlists import expand_urls

            names = expand_urls(self.location)
        return [name if files.scheme_of(name) else str(files.expand(name).absolute()) for name in names]

    @property
    def is_remote(self) -> bool:
        return self.kind == "hub" or any(files.scheme_of(name) for name in self.files)

    def folder(self) -> Path:
        """Where its photos are, or will be."""
        return self._versions() / self._identity() / "photos"

    def has_changed(self) -> bool:
        """Whether it was unpacked on this machine, but as it was before."""
        return self._versions().is_dir() and not self.folder().is_dir() and not self._missing()

    def ensure(self) -> None:
        """Unpack it on rank 0 unless that is done; other ranks wait. Raises ConfigError on all or none."""
        with dist.agreed():
            if missing := self._missing():
                raise ConfigError(f"prepare.photos: '{missing}' does not exist")
            folder = self.folder()
        if dist.from_main(folder.is_dir()):
            return
        with lock.held(folder.parent, "the unpacked photos in", wait=True), dist.agreed():
            if dist.is_main() and not folder.is_dir():
                self._unpack(folder)
        with dist.agreed():
            if not folder.is_dir():
                raise ConfigError(
                    f"prepare.photos: '{self.text}' was unpacked into {folder}, which this node lacks; "
                    "set XDG_CACHE_HOME to a folder that all nodes share"
                )

    def _unpack(self, folder: Path) -> None:
        """Write all photos, then give them their folder's name. What a killed run wrote is kept."""
        part = folder.with_name("part")
        part.mkdir(parents=True, exist_ok=True)
        readers = {"hub": tables.of_hub, "table": tables.of_file, "tars": unpack.of_tars}
        count = unpack.write(readers[self.kind](self.files or [self.location], self.options), part)
        if not count:
            raise ConfigError(f"prepare.photos: '{self.text}' has no photos")
        os.replace(part, folder)
        files.sync(folder.parent)
        for other in self._versions().iterdir():
            if other != folder.parent:
                shutil.rmtree(other, ignore_errors=True)  # of what the source was before
        console.say(f"{self.text}: unpacked {count} photos into {folder}")

    def _versions(self) -> Path:
        return (
            files.cache()
            / "photos"
            / content_key([VERSION, self.kind, self.files, self.location, self.options])[:16]
        )

    def _identity(self) -> str:
        """What its files are now. A URL or a data set counts as the same for ever: its revision names it."""
        return content_key([_stat(name) for name in tables.read_too(self.files, self.options)])[:16]

    def _missing(self) -> str | None:
        """The first of its local files that does not exist."""
        local = (name for name in self.files if not files.scheme_of(name))
        return next((name for name in local if not Path(name).is_file()), None)


def folder_of(text: str) -> Path:
    """The folder of the photos that `prepare.photos` names, which may not exist."""
    source = Source.of(text)
    return source.folder() if source else files.expand(text)


def _stat(name: str) -> list[str | int]:
    path = Path(name)
    if files.scheme_of(name) or not path.is_file():
        return [name]
    about = path.stat()
    return [name, about.st_size, about.st_mtime_ns]
