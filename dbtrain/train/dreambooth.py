"""The trained module: a denoiser with its adapter, the prompt table, and the objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dbtrain.adapters import inject as adapters
from dbtrain.adapters import tokens
from dbtrain.adapters.state import AdapterState
from dbtrain.adapters.switch import Switch
from dbtrain.config import Config
from dbtrain.data.batch import Batch
from dbtrain.data.shards import Manifest
from dbtrain.models import activation_checkpointing
from dbtrain.models.base import Base
from dbtrain.models.ddpm import DDPM
from dbtrain.models.families.family import Family, Sees
from dbtrain.models.families.space import LatentSpace
from dbtrain.models.objectives import Objective, losses
from dbtrain.models.precision import PRECISIONS, WorkingCopies
from dbtrain.runtime import console
from dbtrain.train import parallel
from dbtrain.train.left_out import LeftOut, merging

RESIDENT = 2**30  # bytes of a prompt table that is copied to the device, rather than row by row


class DreamBooth(nn.Module):
    """The module that DDP wraps. For every family, `forward` returns one loss per image.

    Ruiz et al. 2022, "DreamBooth", arXiv:2208.12242.
    """

    def __init__(
        self,
        family: Family,
        denoiser: nn.Module,
        text_encoders: Mapping[str, nn.Module],
        objective: Objective,
        prompts: Mapping[str, Tensor],
        space: LatentSpace,
        noising: DDPM | None = None,
        sees: Sees | None = None,
        dtype: torch.dtype = torch.float32,
        left_out: LeftOut | None = None,
        huber: float | None = None,
        learned: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.family = family
        self.denoiser = denoiser
        self.text_encoders = nn.ModuleDict(text_encoders)  # those with an adapter or a learned word
        self.learned = learned  # words
        self.objective = objective
        for name, values in (("latent_scale", space.scale), ("latent_shift", space.shift)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.noising = noising
        self.sees = sees
        # The prompt table, (prompts, ...) each. What is read on the host or large stays there.
        size = sum(table.nbytes for table in prompts.values())
        self.on_host = {name: t for name, t in prompts.items() if name == "lengths" or size > RESIDENT}
        self.prompt_names = tuple(name for name in prompts if name not in self.on_host)
        for name in self.prompt_names:
            self.register_buffer(f"prompts_{name}", prompts[name], persistent=False)
        self.dtype = dtype  # of the base, and of the denoiser's input
        self.huber = huber
        self.left_out = left_out or LeftOut(denoiser, [])  # what a training adapter changed
        self.adapter = Switch(denoiser, dtype)
        self.working_copies = WorkingCopies(self, adapters.trainable(self), dtype)

    @classmethod
    def build(
        cls,
        base: Base,
        manifest: Manifest,
        table: Mapping[str, Tensor],
        cfg: Config,
        training: AdapterState | None = None,
        ranks: parallel.DeviceMesh | None = None,
        kept: int = 0,
    ) -> DreamBooth:
        """Load the base's denoiser, and text encoders if they are trained, with new adapters, on the CPU.

        `table` is the shards' prompt table, with the ids of the learned word (`tokens.read_again`). Frozen
        text encoders need its embeddings, trained ones its token ids. `training`: an adapter that is part of
        the base in training only. `ranks`: those that hold the denoiser together, but for `kept` blocks; its
        weights are then on their devices.
        """
        # The denoiser, and the text encoders if they are trained, with their adapters.
        dtype = PRECISIONS[cfg.train.precision].dtype
        settings, token = cfg.adapter.text_encoder, cfg.adapter.token
        loaded = base.family.adaptable if settings or token else (base.family.denoiser,)
        console.say(f"loading {', '.join(loaded)} of {base.name}")
        family, name = base.family, base.family.denoiser
        changes = merging(base.skeleton(name, dtype), training) if training else {}
        denoiser = base.denoiser(cfg.train.base_linears, dtype)
        parallel.shard(denoiser, ranks, kept)
        plain = base.fill(name, denoiser, dtype, parallel.local, changes)
        left_out = LeftOut(denoiser, plain if cfg.validation.prompts else [])
        if cfg.train.channels_last:
            denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        adapters.attach(
            denoiser, cfg.adapter, "denoiser", cfg.seed, family.idle(name, denoiser), family.presets
        )
        encoders = {name: base.load(name, dtype) for name in loaded[1:]}
        for number, (name, encoder) in enumerate(encoders.items()):
            if settings:
                unused = base.family.idle(name, encoder)
                adapters.attach(encoder, settings, "text_encoder", cfg.seed + 1 + number, unused)
            if token:
                tokens.learn(encoder, base.load(family.text_encoders[name]), cfg.learned_words, token)
        activation_checkpointing.checkpoint_activations(
            denoiser, list(encoders.values()), cfg.train.gradient_checkpointing
        )

        # The objective, the prompts, and the latents' scale.
        length = base.family.tokens(manifest.latent_shape)
        objective = base.family.objective.of(base.config("scheduler"), cfg.loss, length)
        frozen = family.text_encoders.keys() - encoders
        asked = cfg.loss.prior == "prediction"  # the base, whose text encoders are not trained
        needed = {"condition": bool(frozen) or asked, "ids": bool(encoders)}
        unread = {f"ids.{name}" for name in frozen}
        prompts = {
            name.partition(".")[2]: tensor
            for name, tensor in table.items()
            if needed[name.partition(".")[0]] and name not in unread
        }
        space = LatentSpace(manifest.latent_shape, manifest.latent_scale, manifest.latent_shift)
        noising = DDPM.of(base.config(base.family.noising)) if base.family.noising else None
        sees = base.family.sees.get(cfg.model.low_res)
        return cls(
            family, denoiser, encoders, objective, prompts, space, noising, sees, dtype, left_out,
            cfg.loss.huber, cfg.learned_words,
        )  # fmt: skip

    @property
    def live(self) -> dict[str, nn.Module]:
        """The components that take part in training, by their name in the base's folder."""
        return {self.family.denoiser: self.denoiser, **self.text_encoders}

    @property
    def trained(self) -> dict[str, nn.Module]:
        """Those of them with an adapter."""
        return {name: module for name, module in self.live.items() if hasattr(module, "peft_config")}

    @property
    def words(self) -> dict[str, tokens.Rows]:
        """The embeddings of the learned words, by text encoder; {} if none is learned."""
        return tokens.trained(dict(self.text_encoders.items()))

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained parameters, as `<component>.<parameter>`."""
        found = {
            f"{component}.{name}": parameter
            for component, module in self.trained.items()
            for name, parameter in adapters.trainable(module).items()
        }
        return found | {f"{name}.{tokens.DIRECTION}": rows.direction for name, rows in self.words.items()}

    def states(self) -> dict[str, AdapterState]:
        """The adapters' weights, by component."""
        return {name: adapters.collect(module) for name, module in self.trained.items()}

    @property
    def follows_the_host(self) -> bool:
        """Whether a step depends on values on the host, so that no recorded one can stand for others."""
        lengths = self.on_host.get("lengths")
        uneven = lengths is not None and len(lengths.unique()) > 1
        return uneven or bool(self.on_host.keys() - {"lengths"})

    def forward(self, batch: Batch) -> Tensor:
        """Denoising loss of each image, (rows,) fp32."""
        x0 = self.x0(batch)
        t = self.objective.timesteps(batch.u)
        x_t = self.objective.corrupt(x0, batch.noise, t)
        given = batch.extra | (self.sees(x0, x_t, t, batch, self.noising) if self.sees else {})
        target = self.objective.target(x0, batch.noise, t)
        if batch.preserved:  # before the pass with gradients: FSDP's and block swap's hooks follow the last
            rows = slice(-batch.preserved, None)
            of_base = {name: values[rows] for name, values in (self.rows(batch) | given).items()}
            target = torch.cat([target[: rows.start], self.base_prediction(x_t[rows], t[rows], of_base)])
        prediction = self.family.denoise(self.denoiser, x_t.to(self.dtype), t, self.condition(batch) | given)
        error = prediction.float() - target
        return self.objective.weight(t) * losses(error, self.objective.signal(t), self.huber)

    @torch.no_grad()
    def base_prediction(self, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """What the base without the adapter predicts, shaped like `x_t`, fp32."""
        with self.adapter.off():
            return self.family.denoise(self.denoiser, x_t.to(self.dtype), t, condition).float()

    def x0(self, batch: Batch) -> Tensor:
        """The clean latents or pixels that are noised, (rows, C, H, W) fp32."""
        sample = self.family.sample_posterior(batch.stored, batch.posterior)
        return (sample - self.get_buffer("latent_shift")) * self.get_buffer("latent_scale")

    def condition(self, batch: Batch) -> dict[str, Tensor]:
        """The denoiser's conditioning, (rows, ...) each, by the rows' prompts."""
        table, encoders = self._table(), dict(self.text_encoders.items())
        if encoders and len(next(iter(table.values()))) <= len(batch.prompts):
            # Encode each prompt only once.
            return self.rows(batch, table | self.family.embed(encoders, table))
        rows = self.rows(batch)
        return rows | self.family.embed(encoders, rows) if encoders else rows

    def rows(self, batch: Batch, table: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The entries of the rows' prompts in the prompt table, or in another `table`, (rows, ...) each."""
        table = self._table() if table is None else table
        rows = {name: values[batch.prompt] for name, values in table.items()}
        for name, values in self.on_host.items():
            chosen = values[list(batch.prompts)]
            rows[name] = chosen if name == "lengths" else chosen.to(batch.prompt.device, non_blocking=True)
        return rows

    def _table(self) -> dict[str, Tensor]:
        return {name: self.get_buffer(f"prompts_{name}") for name in self.prompt_names}
