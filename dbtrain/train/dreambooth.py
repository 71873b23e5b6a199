"""The trained module: a denoiser with its adapter, the prompt table, and the objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dbtrain.adapters import inject as adapters
from dbtrain.adapters import tokens
from dbtrain.adapters.batched import Stack
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
from dbtrain.runtime import console, dist
from dbtrain.train import parallel
from dbtrain.train.adapted import Adapted, attach
from dbtrain.train.left_out import LeftOut, merging

RESIDENT = 2**30  # bytes of a prompt table that is copied to the device, rather than row by row


class DreamBooth(nn.Module, Adapted):
    """The module that DDP wraps. For every family, `forward` returns one loss per image.

    Ruiz et al. 2022, "DreamBooth", arXiv:2208.12242.
    """

    def __init__(
        self,
        family: Family,
        denoiser: nn.Module,
        text_encoders: Mapping[str, nn.Module],
        objectives: Mapping[int, Any],
        prompts: Mapping[str, Tensor],
        space: LatentSpace,
        noising: DDPM | None = None,
        sees: Sees | None = None,
        dtype: torch.dtype = torch.float32,
        left_out: LeftOut | None = None,
        huber: float | None = None,
        learned: Sequence[str] = (),
        drops_layers: bool = False,
    ) -> None:
        super().__init__()
        self.family = family
        self.denoiser = denoiser
        self.sharded = parallel.is_sharded(denoiser)
        # The largest of a number of each rank that holds the denoiser, where they do the same.
        self.most: Callable[[int], int] = lambda number: max(dist.gather_json(number))
        self.text_encoders = nn.ModuleDict(text_encoders)  # those with an adapter or a learned word
        self.learned = learned  # words
        # An `Objective` for each number of tokens, as larger images need more noise.
        self.objectives = nn.ModuleDict({str(tokens): one for tokens, one in objectives.items()})
        for name, values in (("latent_scale", space.scale), ("latent_shift", space.shift)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.noising = noising
        self.sees = sees
        # The prompt table, (prompts, ...) each. What is read on the host or large stays there.
        size = sum(table.nbytes for table in prompts.values())
        self.on_host = {name: t for name, t in prompts.items() if name == "lengths" or size > RESIDENT}
        self.prompt_names = tuple(name for name in prompts if name not in self.on_host)
        self.here = slice(None)  # the entries that batches count from
        for name in self.prompt_names:
            self.register_buffer(f"prompts_{name}", prompts[name], persistent=False)
        self.dtype = dtype  # of the base, and of the denoiser's input
        self.huber = huber
        self.drops_layers = drops_layers  # the adapters of layers, at random
        self.left_out = left_out or LeftOut(denoiser, [])  # what a training adapter changed
        self.adapter = Switch(denoiser, dtype)
        self.working_copies: WorkingCopies | Stack = WorkingCopies(self, adapters.trainable(self), dtype)

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
        put: Callable[[Mapping[str, nn.Module], Family, Config], None] = attach,
    ) -> DreamBooth:
        """Load the base's denoiser, and text encoders if they are trained, with new adapters, on the CPU.

        `table` is the shards' prompt table, with the ids of the learned word (`tokens.read_again`). Frozen
        text encoders need its embeddings, trained ones its token ids. `training`: an adapter that is part of
        the base in training only. `ranks`: those that hold the denoiser together, but for `kept` blocks; its
        weights are then on their devices. `put`: what gives the components their adapters.
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
        encoders = {name: base.load(name, dtype) for name in loaded[1:]}
        put({name: denoiser, **encoders}, family, cfg)
        for part, encoder in encoders.items():
            if token:
                tokens.learn(encoder, base.load(family.text_encoders[part]), cfg.learned_words, token)
        activation_checkpointing.checkpoint_activations(
            denoiser, list(encoders.values()), cfg.train.gradient_checkpointing
        )

        # The objective, the prompts, and the latents' scale.
        shapes = [manifest.latent_shape, *map(manifest.shape, manifest.sizes)]
        lengths = dict.fromkeys(map(base.family.tokens, shapes))
        objectives = {
            length: base.family.objective.of(base.config("scheduler"), cfg.loss, length) for length in lengths
        }
        frozen = family.text_encoders.keys() - encoders
        asked = cfg.loss.asks_the_base  # and its text encoders are not trained
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
            family, denoiser, encoders, objectives, prompts, space, noising, sees, dtype, left_out,
            cfg.loss.huber, cfg.learned_words,
            any(one.module_dropout for one in cfg.adapter.every),
        )  # fmt: skip

    @property
    def live(self) -> dict[str, nn.Module]:
        """The components that take part in training, by their name in the base's folder."""
        return {self.family.denoiser: self.denoiser, **self.text_encoders}

    @property
    def trained(self) -> dict[str, nn.Module]:
        return {name: module for name, module in self.live.items() if hasattr(module, "peft_config")}

    @property
    def words(self) -> dict[str, tokens.Rows]:
        return tokens.trained(dict(self.text_encoders.items()))

    @property
    def follows_the_host(self) -> bool:
        """Whether a step depends on values on the host, so that no recorded one can stand for others."""
        lengths = self.on_host.get("lengths")
        uneven = lengths is not None and len(lengths.unique()) > 1
        return uneven or bool(self.on_host.keys() - {"lengths"})

    @property
    def objective(self) -> Objective:
        """The objective for the largest squares."""
        return next(iter(self.objectives.values()))  # type: ignore[return-value]

    def forward(self, batch: Batch) -> Tensor:
        """Denoising loss of each image, (rows,) fp32."""
        x0 = self.x0(batch)
        objective: Any = self.objectives[str(self.family.tokens(x0.shape[1:]))]
        t = objective.timesteps(batch.u)
        x_t = objective.corrupt(x0, batch.noise, t)
        if batch.redraws:
            x_t = self.redrawn(objective, batch, x0, x_t, t)
        given = self.given(batch, x0, x_t, t)
        target = objective.target(x0, batch.noise, t)
        if batch.preserved:  # before the pass with gradients: FSDP's and block swap's hooks follow the last
            target = batch.with_preserved(target, self.base_prediction(batch, x_t, t, given))
        prediction = self.denoise(x_t.to(self.dtype), t, self.condition(batch) | given, batch.slots)
        error = prediction.float() - target
        per_image = objective.weight(t) * losses(error, objective.signal(t), self.huber, batch.places)
        if self.drops_layers:  # their gradient is 0, as DDP waits for one of every parameter
            per_image = per_image + 0.0 * sum(p.sum(dtype=torch.float32) for p in self.trainable().values())
        return per_image

    def given(self, batch: Batch, x0: Tensor, x_t: Tensor, t: Tensor) -> dict[str, Tensor]:
        """What the denoiser gets of each row beside x_t, t and its prompt, (rows, ...) each."""
        return batch.extra | (self.sees(x0, x_t, t, batch, self.noising) if self.sees else {})

    def redrawn(self, objective: Any, batch: Batch, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """`x_t`, with the batch's redrawn rows replaced by what the base makes of them.

        From a noise level higher by half of all levels, the base takes one sampling step to `t` with the
        class prompt. So the class is preserved for the base's own images of it, not for the photos alone.
        The step is DDIM's, with the row's noise for the predicted one: Song et al. 2020, arXiv:2010.02502.
        """
        noisier = objective.timesteps(batch.u + 0.5)
        before = objective.corrupt(x0, batch.noise, noisier)
        predicted = self.base_prediction(batch, before, noisier, self.given(batch, x0, before, noisier))
        image = objective.clean(batch.of_preserved(before), predicted, batch.of_preserved(noisier))
        after = objective.corrupt(image, batch.of_preserved(batch.noise), batch.of_preserved(t))
        return torch.where(batch.redrawn[:, None, None, None], batch.with_preserved(x_t, after), x_t)

    def denoise(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor], slots: int) -> Tensor:
        """What the denoiser predicts, shaped like `x_t`. Several `slots` have as many rows in every pass."""
        denoise = partial(self.family.denoise, self.denoiser, x_t, t)
        step = self.family.pad_to_multiple_of
        if self.sharded and step == 1 and slots == 1:
            # Ranks gather weights in each pass, so they need as many.
            passes = self.most(len(condition["lengths"].unique()))
            return denoise(condition | {"passes": torch.tensor(passes)})
        if slots == 1 or not step:
            return denoise(condition)
        # All rows pass once for each length of prompts, and those of this length are kept.
        lengths = condition["lengths"]
        padded = (lengths + step - 1) // step * step
        prediction = torch.zeros_like(x_t)
        each = padded.unique().tolist()
        passes = self.most(len(each)) if self.sharded else len(each)
        for length in each + each[-1:] * (passes - len(each)):
            fitted = {"lengths": lengths.clamp(length - step + 1, length), "padded_length": length}
            made = denoise(condition | fitted)
            prediction = torch.where((padded == length).to(x_t.device).view(-1, 1, 1, 1), made, prediction)
        return prediction

    @torch.no_grad()
    def base_prediction(self, batch: Batch, x_t: Tensor, t: Tensor, given: dict[str, Tensor]) -> Tensor:
        """What the base without the adapter predicts for the preserved rows, (rows, C, H, W) fp32."""
        condition = {name: batch.of_preserved(v) for name, v in (self.rows(batch) | given).items()}
        x_t, t = batch.of_preserved(x_t).to(self.dtype), batch.of_preserved(t)
        with self.adapter.off():
            return self.denoise(x_t, t, condition, batch.slots).float()

    def x0(self, batch: Batch) -> Tensor:
        """The clean latents or pixels that are noised, (rows, C, H, W) fp32."""
        sample = self.family.sample_posterior(batch.stored, batch.posterior)
        return (sample - self.get_buffer("latent_shift")) * self.get_buffer("latent_scale")

    def condition(self, batch: Batch) -> dict[str, Tensor]:
        """The denoiser's conditioning, (rows, ...) each, by the rows' prompts."""
        table, encoders = self._table(), dict(self.text_encoders.items())
        if encoders and table and len(next(iter(table.values()))) <= len(batch.prompts):
            # Encode each prompt only once.
            return self.rows(batch, table | self.family.embed(encoders, table))
        rows = self.rows(batch)
        return rows | self.family.embed(encoders, rows) if encoders else rows

    def rows(self, batch: Batch, table: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The entries of the rows' prompts in the prompt table, or in another `table`, (rows, ...) each."""
        table = self._table() if table is None else table
        rows = {name: values[batch.prompt] for name, values in table.items()}
        for name, values in self.on_host.items():
            chosen = values[self.here][list(batch.prompts)]
            rows[name] = chosen if name == "lengths" else chosen.to(batch.prompt.device, non_blocking=True)
        return rows

    def _table(self) -> dict[str, Tensor]:
        return {name: self.get_buffer(f"prompts_{name}")[self.here] for name in self.prompt_names}
