"""The embedded base model: an ordinary Diffusers folder of 14 MB."""

from pathlib import Path


def path() -> Path:
    """Folder of the embedded model."""
    return Path(__file__).parent / "model"
