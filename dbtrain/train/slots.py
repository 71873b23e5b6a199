"""Train several runs at once on one frozen base, each in a slot of its own.

A slot's run has its own seed, data, loss, gradient norm, learning rate, step, and folder; only the forward
and backward passes are shared. What it computes depends on the number of slots, but neither on its companions
nor on the slot that it is in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from dbtrain.adapters import batched
from dbtrain.adapters.inject import silence_dropout
from dbtrain.config import Config
from dbtrain.data.batch import Batch
from dbtrain.models import kernels
from dbtrain.models.families.family import Family
from dbtrain.models.precision import PRECISIONS
from dbtrain.runtime import dist
from dbtrain.runtime.errors import ConfigError, fixable
from dbtrain.runtime.hashing import content_key
from dbtrain.runtime.memory import trim
from dbtrain.train import cuda_graph, joint_images, slot_inputs, training_adapter, validation
from dbtrain.train.adapted import attach, start_anew
from dbtrain.train.dreambooth import DreamBooth
from dbtrain.train.inputs import Inputs
from dbtrain.train.lockstep import Lockstep
from dbtrain.train.metrics import Outcome
from dbtrain.train.seat import Seat, SlotAdapter
from dbtrain.train.setup import read_table, start, swap_blocks
from dbtrain.train.step import Tally, begin, update
from dbtrain.train.validation import eval_mode

CPU = torch.device("cpu")


class Slots:
    """One model, and the runs in its slots."""

    def __init__(
        self, count: int, cfgs: Sequence[Config], inputs: Sequence[Inputs], lockstep: Lockstep | None = None
    ) -> None:
        """Load the base. `cfgs`: all runs that may come, whose `inputs` these are.

        `lockstep`: with the ranks that hold the denoiser together, with `train.shard`.
        Raises ConfigError for settings that slots do not have.
        """
        self.cfg, self.base, self.count, self.lockstep = cfgs[0], inputs[0].base, count, lockstep
        self.micro_batches = inputs[0].share.micro_batches
        self.seats: dict[int, Seat] = {}  # the runs, by slot
        self.modules: dict[int, tuple[str, dict[str, nn.Module]]] = {}  # PEFT's, by slot, with their settings
        check(self.cfg)
        tables = [read_table(*pair) for pair in zip(cfgs, inputs, strict=True)]
        self.prompts = max(map(slot_inputs.prompts, tables))  # of a slot
        encoded = validation.encode(cfgs, inputs[0])
        self.encoded = {cfg.run_dir: found for cfg, found in zip(cfgs, encoded, strict=True)}
        training = training_adapter.read(self.base, self.cfg.model)
        self.stack = batched.Stack(count, PRECISIONS[self.cfg.train.precision].dtype)

        def put(components: Mapping[str, nn.Module], family: Family, cfg: Config) -> None:
            """Put the slots' adapters on the components, as wide as the widest run needs them."""
            ranks: dict[str, dict[str, int]] = {name: {} for name in components}
            for one in {_key(one): one for one in cfgs}.values():
                for name, module in self._skeletons(one).items():
                    for layer, rank in batched.ranks(module).items():
                        ranks[name][layer] = max(rank, ranks[name].get(layer, 0))
            for name, module in components.items():
                silence_dropout(module.requires_grad_(False).train())
                self.stack.add(name, module, ranks[name])
            self.stack.allocate(dist.device())

        table = slot_inputs.blank_table(tables, count * self.prompts)
        mesh = lockstep.mesh if lockstep else None
        self.model = DreamBooth.build(self.base, inputs[0].manifest, table, self.cfg, training, mesh, put=put)
        self.model.working_copies = self.stack
        if lockstep:
            lockstep.watch(self.model, self._accompany)
        self.blank = slot_inputs.blank_batch(cfgs, inputs)
        self.scales = torch.ones(count, device=dist.device())  # of the losses, for fp16
        self.passes: Callable[[Sequence[Batch]], list[Tensor]] = self._passes
        if self.cfg.train.cuda_graph:
            if self.model.on_host:
                raise ConfigError(
                    "train.cuda_graph is true, but in slots, this base's prompts can differ in length, or "
                    "are too many for the GPU's memory; set it to false"
                )
            self.passes = partial(cuda_graph.Recorder[list[Tensor]](), self._passes)
        swap_blocks(self.cfg, self.base, self.model)
        self.model.to(dist.device())
        trim()  # what the weights took in RAM

    @contextmanager
    def open(self) -> Iterator[None]:
        """Train in the block; at its end, close the files of all runs."""
        train, device = self.cfg.train, dist.device()
        with (
            kernels.attention(train.attention, device), dist.training(self.cfg.faults.timeout_s),
            cuda_graph.on_side_stream(train.cuda_graph),
        ):  # fmt: skip
            if train.compile:
                memory = train.activation_memory
                kernels.compile_module(self.model.denoiser, train.compile, activation_memory=memory)
            try:
                yield
            finally:
                for slot in list(self.seats):
                    self.leave(slot)

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do, for no rank that this one has to keep company either."""
        return not self.seats and not self.lockstep

    def part(self) -> None:
        """Stop the ranks that this one would have to keep company."""
        if self.lockstep:
            self.lockstep.stop()

    def free(self) -> int | None:
        """The number of an empty slot; None if there is none."""
        return next((slot for slot in range(self.count) if slot not in self.seats), None)

    def enter(self, slot: int, cfg: Config, inputs: Inputs) -> None:
        """Put a run into an empty slot, at its newest checkpoint.

        Raises ConfigError, with the slot empty as before, for anything a user can fix.
        """
        with ExitStack() as held:
            held.callback(self.stack.clear, slot)
            adapter = SlotAdapter(self._adapters(slot, cfg), self.stack.row(slot))
            slot_inputs.write_prompts(self.model, slot, self.prompts, read_table(cfg, inputs))
            if cfg.run_dir not in self.encoded:
                (self.encoded[cfg.run_dir],) = validation.encode([cfg], inputs)
            validator = validation.Validator.of(cfg, inputs, self.model, self.encoded.pop(cfg.run_dir))
            job = start(cfg, inputs, self.model, adapter, validator, CPU, among_others=True)
            held.enter_context(closing(job.stream))
            held.enter_context(job.metrics)
            self.seats[slot] = Seat(job, job.start, held.pop_all())

    def leave(self, slot: int, problem: Exception | None = None) -> None:
        """Take the run out of a slot, whose adapter becomes zero; `problem`: why, if it went wrong."""
        self.seats.pop(slot).held.__exit__(type(problem) if problem else None, problem, None)

    def step(self) -> dict[int, Outcome | ConfigError] | None:
        """One optimizer step of each run: its outcome, or what it ran into, by slot.

        None if there is no run, nor on any other rank that this one has to wait for. Raises Preempted if such
        a rank stops.
        """
        # The data of each run.
        found: dict[int, Outcome | ConfigError] = {}
        data: dict[int, list[Batch]] = {}
        before = time.perf_counter()
        for slot, seat in self.seats.items():
            try:
                with fixable():
                    data[slot] = [next(seat.job.stream) for _ in range(self.micro_batches)]
            except ConfigError as problem:
                found[slot] = problem
        wait_s = time.perf_counter() - before
        jobs = {slot: self.seats[slot].job for slot in data}
        if self.lockstep:
            if not self.lockstep.meet(bool(self.seats)):
                return {} if self.lockstep.endless else None
        elif not jobs:
            return found or None
        rates = {slot: begin(job.progress, self.seats[slot].step, job.cfg) for slot, job in jobs.items()}

        # Forward and backward passes of all at once. Empty slots have rows too, which no loss counts.
        device = dist.device()
        for slot, job in jobs.items():
            self.scales[slot] = job.progress.scaler.scale(torch.ones((), device=device))
        with self.lockstep.step() if self.lockstep else nullcontext():
            blank = [self.blank] * self.micro_batches
            parts = zip(*(data.get(slot, blank) for slot in range(self.count)), strict=True)
            batches = [Batch.joined(some, self.prompts).to(device) for some in parts]
            losses = self.passes(batches)

        # Each clips its own gradient, and steps.
        for slot, job in jobs.items():
            tally = Tally.zero(device)
            for per_image, batch in zip(losses, batches, strict=True):
                u, position = (values.view(self.count, -1)[slot] for values in (batch.u, batch.position))
                tally.add(per_image[slot], u, position, job.cfg)
            outcome = tally.outcome(job.progress, update(job.progress, job.cfg), data[slot])
            found[slot] = outcome._replace(lr=rates[slot], wait_s=wait_s)
        return found

    def _passes(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Forward and backward passes; the losses of each micro-batch, (slots, rows). See `Stack.grads`."""
        found = []
        self.stack.grads.zero_()
        with self.model.working_copies.in_place():
            redraws = any(batch.redraws for batch in batches)
            if self.cfg.loss.prior == "prediction":  # else no rank redraws
                redraws = bool(self.model.most(redraws))
            for batch in batches:
                batch = replace(batch, redraws=redraws)
                with PRECISIONS[self.cfg.train.precision].forward(batch.weight.device):
                    per_image = self.model(batch).view(self.count, -1)
                weight = batch.weight.view_as(per_image) * self.scales[:, None]
                (weight * per_image).sum().backward()
                found.append(per_image.detach())
        return found

    def record(self, slot: int, outcome: Outcome | ConfigError) -> None:
        """Record a step of the run in a slot. Raises ConfigError if it went wrong."""
        if isinstance(outcome, ConfigError):
            raise outcome
        seat = self.seats[slot]
        seat.step, seat.saved = seat.step + 1, False
        seat.job.metrics.step(seat.step, outcome, seat.job.progress.skipped)

    def shares_images(self, slot: int) -> bool:
        """Whether the run in a slot needs images for validation, which can share batches.

        Those whose scores decide about the run cannot: in other batches they are rounded differently.
        Raises ConfigError for what a user can fix.
        """
        seat, validator = self.seats[slot], self.seats[slot].job.validation
        able = validator.generator and not validator.scoring and not self.base.family.texts_as_one
        return bool(able) and validator.lacks_images(seat.step)

    def generate_ahead(self, slots: Sequence[int]) -> None:
        """Generate the images of these slots' runs in common batches, before `settle` writes them."""
        if len(slots) > 1:  # else `settle` generates them
            jobs = {slot: self.seats[slot].job for slot in slots}
            joint_images.generate(self.model, self.stack, jobs)

    def settle(self, slot: int) -> None:
        """Save and validate the run in a slot if that is due. Raises ConfigError for what a user can fix."""
        seat = self.seats[slot]
        if not seat.saved and seat.job.is_save_step(seat.step):
            seat.save()
        # All rows are of this slot.
        self.model.here = slice(slot * self.prompts, (slot + 1) * self.prompts)
        try:
            with self.stack.only(slot):
                seat.job.validate(seat.step, seat.saved)
        finally:
            self.model.here = slice(None)

    def save(self, slot: int) -> None:
        """Save the run in a slot. Raises ConfigError for what a user can fix."""
        if not self.seats[slot].saved:
            self.seats[slot].save()

    def _adapters(self, slot: int, cfg: Config) -> dict[str, nn.Module]:
        """The components with the adapters of a new run, whose weights are those of the slot."""
        key, modules = self.modules.get(slot, ("", {}))
        if key != _key(cfg):
            modules = self._skeletons(cfg)
            self.modules.pop(slot, None)  # or half of the layers would be another's if this fails
            for name, module in modules.items():
                self.stack.bind(slot, name, module)
            self.modules[slot] = (_key(cfg), modules)
        with batched.on_the_cpu(modules.values()):
            start_anew(modules, cfg)
        return modules

    def _accompany(self) -> None:
        """Call the denoiser once, without gradients, for other ranks that gather its weights now."""
        batch = replace(self.blank, preserved=0).to(dist.device())
        precision = PRECISIONS[self.cfg.train.precision]
        with eval_mode(self.model, self.cfg), self.stack.only(0), precision.forward(dist.device()):
            self.model(batch)

    def _skeletons(self, cfg: Config) -> dict[str, nn.Module]:
        """The components that take part in training, with adapters, all on the meta device."""
        names = self.base.family.adaptable if cfg.adapter.text_encoder else (self.base.family.denoiser,)
        found = {name: self.base.skeleton(name) for name in names}
        for name, module in found.items():
            self.base.drop_unread(name, module)
        attach(found, self.base.family, cfg)
        return found


def check(cfg: Config) -> None:
    """Raise ConfigError for settings that slots do not have."""
    batched.check(cfg.adapter)
    if cfg.prepare and (cfg.prepare.buckets or len(cfg.prepare.resolutions) > 1):
        raise ConfigError(
            "prepare.buckets and several resolutions do not go with slots, whose batches have one size; "
            "leave prepare.buckets at false, and set prepare.resolution to one number"
        )
    if cfg.train.wandb:
        raise ConfigError("train.wandb does not go with slots; leave it out")
    if cfg.train.shard != "none" and cfg.model.training_adapter and cfg.validation.prompts:
        raise ConfigError(
            "with train.shard, slots cannot take model.training_adapter out of the weights for images: other "
            "ranks train with them; set validation.prompts to []"
        )


def _key(cfg: Config) -> str:
    return content_key(cfg.adapter.model_dump(mode="json", exclude={"start"}))
