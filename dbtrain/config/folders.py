"""The folders of a config: what is written must not lie where something else is read or swept."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from dbtrain.runtime import files
from dbtrain.runtime.run_folder import RunFolder


def problems(run_dir: str, shards: str, inputs: Mapping[str, str | None]) -> list[str]:
    """One message for each pair of folders that would overwrite one another.

    `inputs`: config key -> folder that is read, or None.
    """
    outputs = {"run_dir": _resolved(run_dir), "data.shards": _resolved(shards)}
    read = {key: path for key, folder in inputs.items() if folder and (path := _resolved(folder))}
    found = []
    for key, folder in outputs.items():
        for other, source in read.items():
            above = [folder, *(folder.parents if other.endswith("photos") else ())] if folder else []
            if source in above:
                found.append(f"{key} is {folder}, in {other} ({source}); use a folder outside of it")
    run = outputs["run_dir"]
    if run and run == outputs["data.shards"]:
        found.append(f"data.shards and run_dir are both {run}; use two folders")
    swept = RunFolder(run).swept if run else ()
    for key, folder in ({"data.shards": outputs["data.shards"]} | read).items():
        inside = [each for each in swept if folder and each in (folder, *folder.parents)]
        found += [f"{key} is {folder}, in {each}, where a run deletes files; use another" for each in inside]
    return found


def check_apart(class_dir: str | None, inputs: Mapping[str, str | None]) -> None:
    """Raise ValueError if class images are in one of the folders, all of whose folders have photos."""
    there = _resolved(class_dir) if class_dir else None
    for key, folder in inputs.items():
        photos = _resolved(folder) if folder and key.endswith("photos") else None
        if there and photos in (there, *there.parents):
            raise ValueError(
                f"prepare.class_dir is {there}, in {key} ({photos}), whose folders are all read as prepare."
                "subfolders is true; use a folder outside of it"
            )


def _resolved(location: str) -> Path | None:
    """The folder on this machine, without links but those in a circle; None for a URL or a command."""
    folder = files.folder_of(location)
    return folder and Path(os.path.realpath(folder))
