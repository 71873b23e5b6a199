"""What does it take to run a big text encoder whole, and layer by layer: memory, time, bytes read?

    python -m benchmarks.text_encoders --layers 4

Encodes one prompt in bf16 with a T5 of T5-XXL's layers and random weights, each time in a process of its own.
RAM is what the process holds beyond what it held before, as Linux counts it: all of it, which includes pages
of the files that are mapped, and what is not a file's, which cannot be dropped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import T5Config, T5EncoderModel

from benchmarks import bases, common
from benchmarks.common import Measure, Result, Row
from benchmarks.host_memory import held, peak
from dbtrain.config import Model
from dbtrain.models import encoder_plan, text_encoders
from dbtrain.models.base import Base
from dbtrain.runtime import console
from dbtrain.runtime.memory import GIB

MIB = 2**20
SHARES = {"whole": None, "layer by layer, half": 0.5, "layer by layer, least": 0.0}  # of the memory to spare
PROMPT = "a photo of a small dog on the grass"


def base_of(work: Path, layers: int, smoke: bool) -> Path:
    """A Chroma without its other weights, whose T5 has so many layers."""
    place = bases.outline("chroma", work)
    about = place / "text_encoder" / "config.json"
    settings = json.loads(about.read_text()) | {"num_layers": layers}
    settings |= {"d_model": 64, "d_ff": 128, "num_heads": 4, "d_kv": 16} if smoke else {}
    about.write_text(json.dumps(settings))
    transformer = place / "transformer" / "config.json"
    joint = {"joint_attention_dim": settings["d_model"]}
    transformer.write_text(json.dumps(json.loads(transformer.read_text()) | joint))
    made = bases.randomized(lambda: T5EncoderModel(T5Config(**settings)), "text_encoder", torch.bfloat16)
    made.tie_weights()  # type: ignore[operator]  # drawn apart
    made.save_pretrained(place / "text_encoder")  # type: ignore[operator]
    return place


def measured(folder: Path, share: float | None) -> dict[str, Any]:
    """One prompt encoded in this process, which has imported everything before it is measured."""
    torch.set_num_threads(1)
    base = Base.find(Model(path=str(folder)))
    [plan] = encoder_plan.plans_of(base, torch.bfloat16)
    read, least = encoder_plan.to_read([plan]), encoder_plan.size(plan.rest, plan.parts[0])
    limit = 2.0 * read if share is None else least + share * (read - least)
    ids = base.family.tokenize({"text_encoder": base.load("tokenizer")}, [PROMPT])
    before = held("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    began = time.process_time()
    with torch.no_grad(), peak() as anonymous:
        found = text_encoders.encoded(
            base, torch.bfloat16, limit / GIB, lambda it: partial(base.family.embed, it, ids)
        )
    seconds = time.process_time() - began
    return {
        "seconds": seconds, "sum": found["prompt_embeds"].double().sum().item(), "weights": read,
        "limit": None if share is None else limit, "all": held("VmHWM") - before,
        "anonymous": anonymous[0],
    }  # fmt: skip


def alone(folder: Path, share: float | None) -> dict[str, Any]:
    """`measured` in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as process:
        return process.apply(measured, (folder, share))


def run(args: argparse.Namespace, work: Path) -> Result:
    place = base_of(work, 2 if args.smoke else args.layers, args.smoke)
    rows, sums = [], set()
    repeats = 1 if args.smoke else args.repeats
    with console.bar(len(SHARES) * repeats, "text encoders", "run") as bar:
        for label, share in SHARES.items():
            samples = []
            for _ in range(repeats):
                samples.append((measured if args.smoke else alone)(place, share))
                bar.update()
            sums |= {one["sum"] for one in samples}
            first = samples[0]
            measures = {
                "RAM": Measure.of("MiB", [one["all"] / MIB for one in samples]),
                "RAM, not a file's": Measure.of("MiB", [one["anonymous"] / MIB for one in samples]),
                "CPU time": Measure.of("s", [one["seconds"] for one in samples]),
            }
            counts = {"weights, MiB": round(first["weights"] / MIB), "limit, MiB": None}
            if first["limit"]:
                counts["limit, MiB"] = round(first["limit"] / MIB)
            rows.append(Row(label=label, config={"share": share}, counts=counts, measures=measures))
    assert len(sums) == 1, "layer by layer gives other embeddings"
    return common.result(args, "text_encoders", f"t5-{args.device}", rows)


def parser() -> argparse.ArgumentParser:
    words = common.parser(__doc__)
    words.add_argument("--layers", type=int, default=4, help="of T5-XXL's 24, 370 MiB each")
    return words


if __name__ == "__main__":
    common.main(run, parser())
