"""Host memory that loading a denoiser takes on each of two ranks, whole or sharded, quantized or not.

    python -m benchmarks.loading

The base is a FLUX.1 of 3 GB with random bf16 weights. Counted are anonymous pages, sampled every 2 ms, above
what the process had before: weights that stay in the mapped file are in the page cache, which all ranks
share. `share` is what a rank keeps of the weights; the goal is 1.15 times the share and one block.
`Diffusers` is its own loader in one process, without accelerate.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file

from benchmarks import common
from benchmarks.common import ROOT, Result, Row
from benchmarks.host_memory import peak
from dbtrain.models import quantization
from dbtrain.models.blocks import blocks
from dbtrain.models.pretrained import Pretrained
from dbtrain.runtime import dist
from dbtrain.train import parallel

CASES = [("Diffusers", "none", "full", 1)] + [
    (f"{how}, {linears}", how, linears, 2) for linears in ("full", "int8", "nf4") for how in ("none", "all")
]
MIB = 2**20


def base(folder: Path, smoke: bool) -> None:
    """Write a transformer with random weights."""
    heads, layers = (2, 1) if smoke else (16, 5)
    settings = {"num_layers": layers, "num_single_layers": 2 * layers + 2, "num_attention_heads": heads}
    with torch.device("meta"):
        model = FluxTransformer2DModel(**settings)  # type: ignore[arg-type]
    pool = torch.randn(max(p.numel() for p in model.parameters()), dtype=torch.bfloat16) * 0.02
    part = folder / "transformer"
    part.mkdir()
    model.save_config(part)
    tensors = {name: pool[: p.numel()].view(p.shape).clone() for name, p in model.named_parameters()}
    save_file(tensors, part / "diffusion_pytorch_model.safetensors")
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))


def load(folder: Path, label: str, how: str, linears: str) -> None:
    """Load it in this process, as training does; print the figures of this rank."""
    dist.init()
    ranks, found = parallel.mesh(how, 600), Pretrained("random", folder, None)
    kind = found._class("transformer")
    with peak() as most:
        if label == "Diffusers":
            model = kind.from_pretrained(
                folder, subfolder="transformer", dtype=torch.bfloat16, low_cpu_mem_usage=False
            )
        else:
            model = found.skeleton("transformer", torch.bfloat16)
            if linears != "full":
                quantization.quantize(model, linears)
            block = max(sum(p.nbytes for p in one.parameters()) for one in blocks(model))
            parallel.shard(model, ranks)
            found.fill("transformer", model, torch.bfloat16, parallel.local)
    share = sum(parallel.local(p)[0].nbytes for p in model.parameters())
    figures = {"share, MiB": share, "peak, MiB": most[0]}
    if label != "Diffusers":
        figures["goal, MiB"] = int(1.15 * share + block)
    everyone = dist.gather_json(figures)
    if dist.is_main():
        print(json.dumps({name: round(max(one[name] for one in everyone) / MIB) for name in figures}))
    dist.finish(0)


def run(args: argparse.Namespace, work: Path) -> Result:
    if args.case:
        load(Path(args.base), *CASES[args.case - 1][:3])
        raise SystemExit
    base(work, args.smoke)
    rows = []
    for number, (label, _, _, ranks) in enumerate(CASES, 1):
        launcher = [sys.executable, "-m"]
        if ranks > 1:
            launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
        line = [*launcher, "benchmarks.loading", "--base", str(work), "--case", str(number)]
        done = subprocess.run(line, capture_output=True, text=True, check=True, cwd=ROOT)
        rows.append(Row(label=label, counts=json.loads(done.stdout.splitlines()[-1])))
    return common.result(args, "loading", "cpu", rows)


def parser() -> argparse.ArgumentParser:
    words = common.parser(__doc__)
    words.add_argument("--case", type=int, default=0, help=argparse.SUPPRESS)  # in a process of its own
    words.add_argument("--base", help=argparse.SUPPRESS)
    return words


if __name__ == "__main__":
    common.main(run, parser())
