"""The base model that comes with the package: an ordinary Diffusers folder, a few MB small."""

from pathlib import Path


def path() -> Path:
    """Folder of the embedded model."""
    return Path(__file__).parent / "model"
