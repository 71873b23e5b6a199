"""One call of the command line, watched: `python -m tests.probe REPORT VERB ...` writes REPORT as JSON.

`loaded`: components of the base, in order; `hashed`: files of weights that were read whole to hash
them, and their bytes; `modules`: what was imported.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

# Of a base: the names that Diffusers and transformers give them, and the Hub's cache.
WEIGHTS = re.compile(r"/(diffusion_pytorch_model|model)\.safetensors$|/blobs/[0-9a-f]{64}$")


def main() -> None:
    report = Path(sys.argv.pop(1))
    seen: dict[str, Any] = {"loaded": [], "hashed": {}}

    def opened(event: str, args: tuple[Any, ...]) -> None:
        # safetensors opens files outside of Python: what is left are those who hash.
        if event == "open" and WEIGHTS.search(str(args[0])):
            seen["hashed"][str(args[0])] = Path(args[0]).stat().st_size

    from dbtrain.__main__ import entry

    sys.addaudithook(opened)
    try:
        if sys.argv[1] != "--help":
            _watch(seen)
        entry()
    finally:
        seen["modules"] = sorted(sys.modules)
        report.write_text(json.dumps(seen))


def _watch(seen: dict[str, Any]) -> None:
    """Record the components that are loaded; bases of the tests are small, and just made."""
    from dbtrain.models.pretrained import Pretrained
    from dbtrain.runtime import hashing

    hashing.SMALL, hashing.REST_S = 0, -1.0

    def noting(method: Any) -> Any:
        def noted(base: Pretrained, component: str, *args: Any, **options: Any) -> Any:
            if component not in seen["loaded"]:  # to load a Diffusers model is to fill its skeleton
                seen["loaded"].append(component)
            return method(base, component, *args, **options)

        return noted

    for name in ("load", "fill"):
        setattr(Pretrained, name, noting(getattr(Pretrained, name)))


if __name__ == "__main__":
    main()
