"""Train several runs at once on one frozen base, each in a slot of its own.

A slot's run has its own seed, data, loss, gradient norm, learning rate, step, and folder; only the forward
and backward passes are shared. What it computes depends on the number of slots, but neither on its companions
nor on the slot that it is in.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

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
from dbtrain.train import joint_images, training_adapter, validation
from dbtrain.train.adapted import Adapted, attach, start_anew
from dbtrain.train.dreambooth import DreamBooth
from dbtrain.train.inputs import Inputs
from dbtrain.train.metrics import Outcome
from dbtrain.train.setup import Job, read_table, start, swap_blocks
from dbtrain.train.step import Tally, begin, update

CPU = torch.device("cpu")


class SlotAdapter(Adapted):
    """The adapter in a slot, as its run sees it: PEFT's modules, without the base's weights."""

    def __init__(self, modules: dict[str, nn.Module], row: tuple[Tensor, Tensor]) -> None:
        self.modules, self.row = modules, row

    @property
    def trained(self) -> dict[str, nn.Module]:
        return {name: module for name, module in self.modules.items() if hasattr(module, "peft_config")}


@dataclass
class Seat:
    """A run in a slot."""

    job: Job
    step: int  # steps so far
    held: ExitStack  # its files and its place
    saved: bool = True  # whether the step has a checkpoint

    def save(self) -> None:
        self.job.save(self.step)
        self.saved = True

    @property
    def ended(self) -> bool:
        return self.step >= self.job.cfg.train.steps or self.job.validation.stopped


class Slots:
    """One model, and the runs in its slots."""

    def __init__(self, count: int, cfgs: Sequence[Config], inputs: Sequence[Inputs]) -> None:
        """Load the base. `cfgs`: all runs that may come, whose `inputs` these are.

        Raises ConfigError for settings that slots do not have.
        """
        self.cfg, self.base, self.count = cfgs[0], inputs[0].base, count
        self.seats: dict[int, Seat] = {}  # the runs, by slot
        self.modules: dict[int, tuple[str, dict[str, nn.Module]]] = {}  # PEFT's, by slot, with their settings
        check(self.cfg)
        tables = [read_table(*pair) for pair in zip(cfgs, inputs, strict=True)]
        self.prompts = max(map(_length, tables))  # of a slot
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

        table = _blank(tables, count * self.prompts)
        self.model = DreamBooth.build(self.base, inputs[0].manifest, table, self.cfg, training, put=put)
        self.model.working_copies = self.stack
        swap_blocks(self.cfg, self.base, self.model)
        self.model.to(dist.device())
        trim()  # what the weights took in RAM

    @contextmanager
    def open(self) -> Iterator[None]:
        """Train in the block; at its end, close the files of all runs."""
        train, device = self.cfg.train, dist.device()
        with kernels.attention(train.attention, device), dist.training(self.cfg.faults.timeout_s):
            if train.compile:
                memory = train.activation_memory
                kernels.compile_module(self.model.denoiser, train.compile, activation_memory=memory)
            try:
                yield
            finally:
                for slot in list(self.seats):
                    self.leave(slot)

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
            self._write_prompts(slot, read_table(cfg, inputs))
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

    def step(self) -> dict[int, Outcome | ConfigError]:
        """One optimizer step of each run: its outcome, or what it ran into, by slot."""
        # The data of each run.
        found: dict[int, Outcome | ConfigError] = {}
        data: dict[int, list[Batch]] = {}
        before = time.perf_counter()
        for slot, seat in self.seats.items():
            try:
                with fixable():
                    data[slot] = [next(seat.job.stream) for _ in range(seat.job.stream.share.micro_batches)]
            except ConfigError as problem:
                found[slot] = problem
        wait_s = time.perf_counter() - before
        jobs = {slot: self.seats[slot].job for slot in data}
        if not jobs:
            return found
        rates = {slot: begin(job.progress, self.seats[slot].step, job.cfg) for slot, job in jobs.items()}

        # Forward and backward passes of all at once. Empty slots have rows too, which no loss counts.
        device = dist.device()
        tallies = {slot: Tally.zero(device) for slot in jobs}
        self.stack.grads.zero_()
        with self.model.working_copies.in_place():
            for micro, some in enumerate(next(iter(data.values()))):
                parts = [data[slot][micro] if slot in data else some.blank() for slot in range(self.count)]
                batch = Batch.joined(parts, self.prompts).to(device)
                with PRECISIONS[self.cfg.train.precision].forward(device):
                    per_image, weight, u, position = (
                        values.view(self.count, -1)
                        for values in (self.model(batch), batch.weight, batch.u, batch.position)
                    )
                losses = [
                    job.progress.scaler.scale((weight[slot] * per_image[slot]).sum())
                    for slot, job in jobs.items()
                ]
                torch.stack(losses).sum().backward()
                for slot, job in jobs.items():
                    tallies[slot].add(per_image[slot], u[slot], position[slot], job.cfg)

        # Each clips its own gradient, and steps.
        for slot, job in jobs.items():
            outcome = tallies[slot].outcome(job.progress, update(job.progress, job.cfg), data[slot])
            found[slot] = outcome._replace(lr=rates[slot], wait_s=wait_s)
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
        if len(slots) < 2:
            return  # `settle` generates them
        jobs = {slot: self.seats[slot].job for slot in slots}
        with ExitStack() as held:
            for job in jobs.values():
                held.enter_context(job.metrics.interrupted("validation"))
                held.enter_context(job.progress.averaged(job.cfg.export.ema))
            generators = {slot: job.validation.generator for slot, job in jobs.items()}
            joint_images.generate(self.model, self.stack, {k: one for k, one in generators.items() if one})

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

    def _skeletons(self, cfg: Config) -> dict[str, nn.Module]:
        """The components that take part in training, with adapters, all on the meta device."""
        names = self.base.family.adaptable if cfg.adapter.text_encoder else (self.base.family.denoiser,)
        found = {name: self.base.skeleton(name) for name in names}
        for name, module in found.items():
            self.base.drop_unread(name, module)
        attach(found, self.base.family, cfg)
        return found

    def _write_prompts(self, slot: int, table: Mapping[str, Tensor]) -> None:
        """Put the prompt table of a run into its slot's part of the model's."""
        if (count := _length(table)) > self.prompts:
            raise ConfigError(f"the shards have {count} prompts, but a slot has room for {self.prompts}; "
                              "start the fleet again")  # fmt: skip
        named = {name.partition(".")[2]: tensor for name, tensor in table.items()}
        buffers = {name: self.model.get_buffer(f"prompts_{name}") for name in self.model.prompt_names}
        for name, whole in (self.model.on_host | buffers).items():
            if any(here > room for here, room in zip(named[name].shape[1:], whole.shape[1:], strict=True)):
                raise ConfigError("the prompts are longer than slots have room for; start the fleet again")
            first = slot * self.prompts
            _write(whole[first : first + count], named[name])


def check(cfg: Config) -> None:
    """Raise ConfigError for settings that slots do not have."""
    batched.check(cfg.adapter)
    if cfg.prepare and (cfg.prepare.buckets or len(cfg.prepare.resolutions) > 1):
        raise ConfigError(
            "prepare.buckets and several resolutions do not go with slots, whose batches have one size; "
            "leave prepare.buckets at false, and set prepare.resolution to one number"
        )
    for key, needed in (("train.cuda_graph", False), ("train.shard", "none"), ("train.wandb", None)):
        if cfg.get(key) != needed:
            raise ConfigError(f"{key} does not go with slots; leave it at its default")


def _key(cfg: Config) -> str:
    return content_key(cfg.adapter.model_dump(mode="json", exclude={"start"}))


def _length(table: Mapping[str, Tensor]) -> int:
    """How many prompts a table has."""
    return len(next(iter(table.values())))


def _blank(tables: Sequence[Mapping[str, Tensor]], length: int) -> dict[str, Tensor]:
    """A table of `length` prompts that the text encoders can read, with room for each of `tables`."""
    found = {}
    for name, first in tables[0].items():
        shape = [max(sizes) for sizes in zip(*(table[name].shape[1:] for table in tables), strict=True)]
        found[name] = first.new_zeros(length, *shape)
        _write(found[name], first[:1].expand(length, *first.shape[1:]))
    return found


def _write(there: Tensor, values: Tensor) -> None:
    """Write `values` into the beginning of each dimension; zeros into the rest."""
    there.zero_()
    there[tuple(map(slice, values.shape))] = values.to(there.device, there.dtype)
