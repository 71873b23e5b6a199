"""The module that is trained: a denoiser with its adapter, the prompt table and the objective."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from dbtrain import adapters
from dbtrain.config import Config
from dbtrain.data.shards import Manifest
from dbtrain.data.stream import Batch
from dbtrain.families.base import Family, LatentScale
from dbtrain.objectives import DDPM
from dbtrain.pretrained import DTYPES, Pretrained


class DreamBooth(nn.Module):
    """One module for one DDP wrapper: `forward` gives one loss per image, for every family.

    Ruiz et al. 2022, "DreamBooth", arXiv:2208.12242.
    """

    def __init__(
        self,
        family: Family,
        denoiser: nn.Module,
        objective: DDPM,
        condition: Mapping[str, Tensor],
        scale: LatentScale,
    ) -> None:
        super().__init__()
        self.family = family
        self.denoiser = denoiser
        self.objective = objective
        self.scale = scale
        self.condition_names = tuple(condition)
        for name, table in condition.items():  # (prompts, ...), moved along with the module
            self.register_buffer(f"condition_{name}", table, persistent=False)

    @classmethod
    def build(
        cls, base: Pretrained, family: Family, manifest: Manifest, table: Mapping[str, Tensor], cfg: Config
    ) -> DreamBooth:
        """The base's denoiser with a new adapter, on the CPU. `table` is the shards' prompt table."""
        denoiser = base.load(family.denoiser, DTYPES[cfg.train.precision])
        adapters.attach(denoiser, cfg.adapter, family.targets, cfg.seed)
        if cfg.train.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        objective = DDPM.of(base.config("scheduler"), cfg.loss.min_snr_gamma)
        condition = {
            name.removeprefix("condition."): tensor
            for name, tensor in table.items()
            if name.startswith("condition.")
        }
        scale = LatentScale(manifest.latent_scale, manifest.latent_shift)
        return cls(family, denoiser.train(), objective, condition, scale)

    def compile_denoiser(self) -> None:
        """Compile the denoiser in place, before DDP wraps the module: state-dict keys keep their names."""
        from torch._dynamo import config as dynamo  # a second of imports that eager runs do not need
        from torch._inductor import config as inductor

        dynamo.optimize_ddp = False  # one graph: it would split at DDP's first bucket
        # With it, torch 2.13 on CPUs mixes memory formats in convolution_backward: layers below an
        # upsampler silently get no gradient. On GPUs its heuristics leave UNets alone anyway.
        inductor.layout_optimization = False
        self.denoiser.compile()

    @property
    def trained(self) -> dict[str, nn.Module]:
        """The components that carry an adapter, by the name they have in the base's folder."""
        return {self.family.denoiser: self.denoiser}

    def trainable(self) -> dict[str, nn.Parameter]:
        """What the optimizer works on, as `<component>.<parameter>`."""
        return {
            f"{component}.{name}": parameter
            for component, module in self.trained.items()
            for name, parameter in adapters.trainable(module).items()
        }

    def forward(self, batch: Batch) -> Tensor:
        """Denoising loss of each image, (rows,) fp32."""
        x0 = self.family.draw(batch.stored, batch.posterior, self.scale)  # (rows, C, H, W)
        t = self.objective.timesteps(batch.u)
        condition = {
            name: self.get_buffer(f"condition_{name}")[batch.prompt] for name in self.condition_names
        }
        x_t = self.objective.corrupt(x0, batch.noise, t)
        prediction = self.family.denoise(self.denoiser, x_t, t, condition)
        error = prediction.float() - self.objective.target(x0, batch.noise, t)
        return self.objective.weight(t) * error.square().flatten(1).mean(1)
