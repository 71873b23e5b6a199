"""How much quantized base linears change a layer, the loss and the adapter's gradient; on a GPU, their speed.

    python -m benchmarks.quantization

Errors are relative, in fp32, against full precision on the same batch: of a layer's weight, of its output and
of the gradient that it passes on, each for the median and the worst layer; of the losses of a batch; and of
the gradient of a LoRA of rank 8 whose factors are both random. `tiny` is the embedded base; `flux block` is
a single block of FLUX.1 with normally distributed weights and inputs, without the outliers of real ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from benchmarks import common, memory, trainer
from benchmarks.common import Measure, Result, Row
from dbtrain.models.quantization import NF4_FP32, STORAGE, WIDTH, QuantizedLinear, quantize
from dbtrain.runtime import console
from dbtrain.tiny import world

STORAGES = [storage for storage in STORAGE if storage != NF4_FP32]
WIDE, TOKENS, ROWS = 3072, 128, 4  # the block's width; of its input


class Block(nn.Module):
    """A block of FLUX.1; the loss of each row is the mean square of what the block adds to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.denoiser = FluxSingleTransformerBlock(width, width // 128, 128).requires_grad_(False)
        for name, parameter in self.denoiser.named_parameters():
            if name.endswith("weight") and parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        targets = ["to_q", "to_k", "to_v", "proj_mlp", "proj_out"]
        inject_adapter_in_model(LoraConfig(r=8, target_modules=targets), self.denoiser)

    def forward(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        image, text, time = batch
        added = torch.cat(self.denoiser(image, text, time), 1) - torch.cat((text, image), 1)
        return added.float().square().flatten(1).mean(1)


def cases(work: Path, smoke: bool) -> Iterator[tuple[str, Any, Any]]:
    """(label, model with a `denoiser`, its batch)."""
    cfg = memory.configured("tiny", work, work, 64, ["train.global_batch=4", "train.micro_batch=4"])
    world.main(Path(cfg.prepare.photos), "mug")  # type: ignore[union-attr]
    trainer.prepare(cfg)
    with trainer.steps(cfg) as steps:
        yield "tiny", steps.model.cpu(), next(steps.stream)
    width = 256 if smoke else WIDE
    shapes = ((TOKENS, width), (TOKENS // 4, width), (width,))
    yield "flux block", Block(width), tuple(torch.randn(ROWS, *shape).requires_grad_() for shape in shapes)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def backward(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """(losses, the adapter's gradient, flat)."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses = model(batch)
    grads = torch.autograd.grad(losses.mean(), trained)
    return losses.detach(), torch.cat([grad.flatten() for grad in grads])


def watched(model: Any, batch: Any) -> dict[nn.Linear, tuple[Tensor, Tensor]]:
    """(input, gradient of the output) of each wide frozen linear layer."""
    found: dict[nn.Linear, tuple[Tensor, Tensor]] = {}

    def keep(layer: nn.Linear, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda grad: found.update({layer: (args[0].detach(), grad.detach())}))

    wide = [m for m in model.denoiser.modules() if type(m) is nn.Linear and min(m.weight.shape) >= WIDTH]
    hooks = [layer.register_forward_hook(keep) for layer in wide]
    model(batch).mean().backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    return found


def of_layer(layer: nn.Linear, x: Tensor, grad: Tensor, storage: str) -> dict[str, float]:
    """A layer's errors, and its bits a weight."""
    quantized = QuantizedLinear(layer, storage)
    x = x.requires_grad_()
    (wanted, wanted_grad), (found, found_grad) = (
        (y.detach() if m.bias is None else y.detach() - m.bias, *torch.autograd.grad(y, x, grad))
        for m in (layer, quantized)
        for y in [m(x)]
    )
    return {
        "bits": 8 * (quantized.codes.nbytes + quantized.scale.nbytes) / layer.weight.numel(),
        "weight": relative(quantized.weight, layer.weight),
        "output": relative(found, wanted),
        "gradient": relative(found_grad, wanted_grad),
    }


def seconds(model: Any, batch: Any, repeats: int) -> Measure:
    """Time of a forward and a backward pass in bf16 on the GPU, in milliseconds."""
    model = deepcopy(model).to("cuda", torch.bfloat16)
    batch, now, samples = tuple(part.to("cuda", torch.bfloat16) for part in batch), common.clock("cuda"), []
    for _ in range(3 + repeats):
        start = now()
        backward(model, batch)
        samples.append(1000 * (now() - start))
    return Measure.of("ms", samples[3:])


def run(args: argparse.Namespace, work: Path) -> Result:
    rows = []
    torch.manual_seed(0)
    for label, model, batch in cases(work, args.smoke):
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.02)
        losses, gradient = backward(model, batch)
        layers = watched(model, batch)
        with console.bar(len(STORAGES), label, "storage") as bar:
            for storage in STORAGES:
                each = [of_layer(layer, *seen, storage) for layer, seen in layers.items()]
                copy = deepcopy(model)
                quantize(copy.denoiser, storage)
                found, found_gradient = backward(copy, batch)
                counts: dict[str, Any] = {"layers": len(each)}
                counts["bits a weight"] = round(median(one["bits"] for one in each), 2)
                for part in ("weight", "output", "gradient"):
                    values = [100 * one[part] for one in each]
                    counts[f"{part}, %"] = f"{median(values):.2f} (worst {max(values):.2f})"
                counts["losses, %"] = round(100 * relative(found, losses), 3)
                counts["adapter's gradient, %"] = round(100 * relative(found_gradient, gradient), 2)
                times = {}
                if args.device == "cuda" and isinstance(model, Block):
                    times = {"full": seconds(model, batch, args.repeats)}
                    times["quantized"] = seconds(copy, batch, args.repeats)
                rows.append(Row(label=f"{label}, {storage}", counts=counts, measures=times))
                bar.update()
    return common.result(args, "quantization", args.device, rows)


if __name__ == "__main__":
    common.main(run, common.parser(__doc__))
