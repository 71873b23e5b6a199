"""Push an export to the Hugging Face Hub: the adapter, its model card, and its images, nothing else."""

from __future__ import annotations

import io
from pathlib import Path

from dbtrain.config import Config
from dbtrain.runtime import console, dist
from dbtrain.runtime.errors import ConfigError, reason
from dbtrain.runtime.run_folder import PREVIEW, SAMPLES, RunFolder, name_of


def push(cfg: Config, folder: Path | None = None, adapter: Path | None = None) -> str | None:
    """Push `folder`, by default the run's export, to `cfg.hub.repo`; return its URL, or None without a repo.

    `adapter`: what `folder` was converted from, if not from the run.

    Uses the token from `hf auth login` or HF_TOKEN. Raises ConfigError if there is none or if the Hub
    refuses; the export on disk is not affected.
    """
    dist.init()
    folder = folder or RunFolder(cfg.run_dir).export
    url = None
    with dist.agreed():
        if cfg.hub.repo and dist.is_main():
            url = _push(cfg, cfg.hub.repo, folder, name_of(adapter or cfg.run_dir))
            console.say(f"pushed {folder} to {url}")
    return dist.from_main(url)


def check(cfg: Config) -> None:
    """Raise ConfigError if `hub.repo` is set, but nothing can be pushed. Call it before training."""
    if cfg.hub.repo:
        _token()


def _token() -> str:
    from huggingface_hub import get_token
    from huggingface_hub.constants import is_offline_mode

    token = get_token()
    if not token:
        raise ConfigError("hub.repo is set, but there is no Hub token; run hf auth login, or set HF_TOKEN")
    if is_offline_mode():
        raise ConfigError(
            "hub.repo is set, but so is HF_HUB_OFFLINE; set HF_HUB_OFFLINE=0 where the Hub can be reached, "
            "or hub.repo=null, and push later, elsewhere: dbtrain export CONFIG hub.repo=..."
        )
    return token


def uploaded(folder: Path, name: str) -> list[Path]:
    """The files of the export of an adapter called `name` that are pushed, relative to the folder."""
    from dbtrain.adapters.formats import peft_folder, word_file
    from dbtrain.adapters.formats.registry import FORMATS  # slow to import, and `check` does not need it

    weights = {form.path(folder, name) for form in FORMATS.values()}
    peft = [path for part in (peft_folder.WEIGHTS, peft_folder.CONFIG) for path in folder.glob(f"*/{part}")]
    found = [
        *weights,
        *folder.glob(f"{word_file.FOLDER}/*.safetensors"),
        folder / "README.md",
        folder / SAMPLES,
        folder / PREVIEW.format(name=name),
    ]
    return [path.relative_to(folder) for path in sorted([*peft, *found]) if path.is_file()]


def _push(cfg: Config, repo: str, folder: Path, name: str) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi

    token = _token()
    names = uploaded(folder, name)
    if not any(path.suffix == ".safetensors" for path in names):
        raise ConfigError(f"{folder} contains no export to push; run dbtrain export first")
    api = HfApi(token=token)
    try:
        created = api.create_repo(repo, private=cfg.hub.private, exist_ok=True)
        operations = [
            CommitOperationAdd(str(path), io.BytesIO((folder / path).read_bytes())) for path in names
        ]
        with console.bar(len(names), "upload", "file") as bar:
            api.create_commit(created.repo_id, operations, commit_message="Adapter trained with dbtrain")
            bar.update(len(names))
    except Exception as error:  # the Hub client raises dozens of types, including httpx's
        said = reason(error).replace(token, "***")
        raise ConfigError(f"hub.repo is '{repo}', but the push failed: {said}") from None
    return str(created)
