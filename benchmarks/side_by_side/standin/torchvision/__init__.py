"""A stand-in for torchvision where it cannot be imported: the seven transforms that a training script uses.

torchvision's wheels are built for one build of torch; with another (a CPU build, say) the import
fails. Same pictures, bit for bit: PIL resizes, torch does the rest, as in torchvision.
"""

from . import transforms

__all__ = ["transforms"]
__version__ = "0.0+standin"
