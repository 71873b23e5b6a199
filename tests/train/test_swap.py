"""Swapped blocks: the same bits as resident ones, in two buffers, with copies and work in order."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import trainer
from benchmarks.host_memory import held
from benchmarks.memory import measured
from dbtrain.config import Config
from dbtrain.models import block_swap, kernels
from dbtrain.models.base import Base
from dbtrain.models.block_swap import Ring, Swapped, count_that_saves, saved_bytes
from dbtrain.models.blocks import blocks
from dbtrain.models.quantization import QuantizedLinear
from dbtrain.prepare.prepare import prepare
from dbtrain.runtime.errors import ConfigError, Preempted
from dbtrain.runtime.memory import GIB
from dbtrain.train import memory
from dbtrain.train.dreambooth import DreamBooth
from tests import bases
from tests.conftest import Make, dbtrain, slow, train
from tests.networks import Dispatched, awake
from tests.runs import tree
from tests.session import once

BASES: dict[str, tuple[Callable[[], Path], int]] = {  # and how many blocks each has
    "sd": (lambda: bases.sd(size="whole"), 12), "sdxl": (bases.sdxl, 12),
    "flux1": (lambda: bases.flux1(heads=4), 3), "z-image": (bases.z_image, 4),
    "qwen-image": (lambda: bases.qwen_image(layers=5, heads=4), 5),
}  # fmt: skip


def configs_of(make: Make, name: str = "sd") -> Callable[..., Config]:
    """Configs of a base with checkpointed blocks and two micro-batches a step, whose shards are there."""
    path, _ = BASES[name]
    settings = partial(
        make, model__path=str(path()), prepare__class_prompt=None, train__micro_batch=2,
        train__gradient_checkpointing="blocks",
    )  # fmt: skip
    made = once(f"swap-{name}", lambda folder: prepare(settings(data__shards=str(folder / "shards"))))
    return partial(settings, data__shards=str(made / "shards"))


def ring_of(model: DreamBooth) -> Ring:
    return next(block.ring for block in blocks(model.denoiser) if isinstance(block, Swapped))


def swapped(model: DreamBooth) -> int:
    return sum(isinstance(block, Swapped) for block in blocks(model.denoiser))


def outcome(cfg: Config, steps: int = 3) -> list[Tensor]:
    """Losses, adapters and gradients after some steps."""
    with trainer.steps(cfg) as job:
        every = awake(job.model).trainable().values()
        losses = [job.take(number).losses.clone() for number in range(steps)]
        return [*losses, *every, *(p.grad for p in every if p.grad is not None)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


CASES: list[Any] = [
    ("sd", {}, 5),
    slow("sd", {"adapter__dropout": 0.3}, 12),
    slow("sd", {"train__base_linears": "int8", "adapter__dora": True}, 12),
    slow("sd", {"train__gradient_checkpointing": "transformer"}, 12),  # which recomputes no residual block
    ("sd", {"adapter__targets": "mid_block.*to_q", "train__channels_last": True}, 7),  # a short backward pass
    slow("sd", {"train__precision": "bf16", "train__base_linears": "fp8", "adapter__bias": "all"}, 12),
    slow("sd", {"adapter__kind": "loha"}, 12),
    slow("sd", {"adapter__kind": "lokr"}, 3),
    slow("sdxl", {"train__base_linears": "int8"}, 12),
    slow("sdxl", {}, 5),
    slow("flux1", {"train__base_linears": "nf4"}, 3),
    slow("flux1", {"train__base_linears": "int8"}, 3),
    slow("flux1", {"adapter__dora": True}, 3),
    ("qwen-image", {"train__base_linears": "int8", "adapter__dora": True}, 5),
    slow("qwen-image", {"train__base_linears": "nf4", "train__precision": "bf16"}, 4),
    slow("z-image", {"train__base_linears": "int8"}, 4),
    slow("z-image", {}, 3),
]


@pytest.mark.parametrize(("name", "settings", "count"), CASES, ids=str)
def test_swapped_blocks_train_as_resident_ones_do(
    make: Make, name: str, settings: dict[str, Any], count: int
) -> None:
    """Each loss, weight and gradient, to the bit."""
    configs = configs_of(make, name)
    with trainer.steps(configs(**settings, train__swap_blocks=count)) as job:
        assert swapped(job.model) == count
    assert same(outcome(configs(**settings)), outcome(configs(**settings, train__swap_blocks=count)))


@pytest.mark.slow
def test_prompts_of_several_lengths_pass_the_blocks_once_for_each(make: Make) -> None:
    settings = partial(
        make, model__path=str(bases.chroma()), prepare__class_prompt="a large photo of one dog in the snow",
        train__micro_batch=2, train__gradient_checkpointing="blocks",
    )  # fmt: skip
    prepare(settings())
    with trainer.steps(settings(train__swap_blocks=3)) as job:
        passes: list[object] = []
        job.model.denoiser.register_forward_hook(lambda *_: passes.append(None))
        job.take(0)
        assert len(passes) == 4 and swapped(job.model) == 3, "two micro-batches of two lengths each"
    assert same(outcome(settings()), outcome(settings(train__swap_blocks=3)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "flux1"])  # every base: above
def test_a_run_is_the_same_to_the_byte(make: Make, tmp_path: Path, name: str) -> None:
    """Checkpoints, export, pictures and held-out losses, also if only the end of a run swaps blocks."""
    count = BASES[name][1]
    runs: dict[str, dict[str, Any]] = {}
    for label, counts in (("resident", (0, 0)), ("swapped", (count, count)), ("mixed", (0, 3))):
        settings = partial(
            make, model__path=str(BASES[name][0]()), run_dir=str(tmp_path / label / "run"), train__steps=8,
            train__micro_batch=2, train__gradient_checkpointing="blocks", prepare__class_prompt=None,
            prepare__held_out=1, validation__prompts=["a dog"], validation__images=1, validation__every=4,
            train__checkpoint_every=4, sample__steps=2,
        )  # fmt: skip
        if not runs:
            prepare(settings())
        with pytest.raises(Preempted):
            train(settings(train__swap_blocks=counts[0]), until=3)
        folder = train(settings(train__swap_blocks=counts[1]))
        kept = ("checkpoints", "export", "validation")
        runs[label] = {file: tree(folder)[file] for file in tree(folder) if file.startswith(kept)}
        lines = (folder / "validation.jsonl").read_text().splitlines()
        runs[label]["losses"] = [json.loads(line)["held_out_instance"] for line in lines]
    assert len(runs["resident"]) > 8
    assert runs["swapped"] == runs["resident"]
    assert runs["mixed"] == runs["resident"]


@pytest.mark.slow
def test_a_training_adapter_is_left_out_of_swapped_blocks_too(make: Make, tmp_path: Path) -> None:
    """Its layers are exchanged in host memory, and copied anew."""
    given = train(configs_of(make)(run_dir=str(tmp_path / "given"), train__steps=1, optim__lr=0.1))
    pictures = {}
    for count in (0, 12):
        cfg = configs_of(make)(
            run_dir=str(tmp_path / str(count)), model__training_adapter=str(given), train__swap_blocks=count,
            train__steps=2, validation__prompts=["a dog"], validation__images=1, validation__every=1,
            sample__steps=2, optim__lr=0.1,
        )  # fmt: skip
        folder = train(cfg)
        files = tree(folder)
        pictures[count] = {name: files[name] for name in files if name.endswith((".png", ".safetensors"))}
    assert len(pictures[0]) > 6 and pictures[12] == pictures[0]


class Stream:
    """A stream of `Clocks`: what is known to have run before the next operation on it."""

    def __init__(self) -> None:
        self.known: set[int] = set()

    def record_event(self) -> set[int]:
        return set(self.known)

    def wait_event(self, event: set[int]) -> None:
        self.known |= event


class Clocks(TorchDispatchMode):
    """Stands in for `torch.cuda`'s streams, and notes each access to a ring's buffers that could be a race.

    An operation is ordered after another one of its stream, and after those that an event passed on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.work = self.now = Stream()
        self.buffers: list[Tensor] = []
        self.last: dict[int, tuple[set[int], set[int]]] = {}  # by buffer: the last write, the reads since
        self.operations = self.races = self.copied = 0

    def Stream(self, device: torch.device) -> Stream:
        return Stream()

    def current_stream(self, device: torch.device) -> Stream:
        return self.now

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.now = stream
        yield
        self.now = self.work

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [tensor for tensor in tree_leaves([args, kwargs]) if isinstance(tensor, Tensor)]
        places = [tensor.untyped_storage().data_ptr() for tensor in given]
        for buffer in self.buffers:
            if (place := buffer.data_ptr()) in places:
                self.note(place, op._schema.is_mutable and places[0] == place, given[0].nbytes)
        return op(*args, **kwargs or {})

    def note(self, place: int, writes: bool, size: int) -> None:
        written, read = self.last.get(place, (set(), set()))
        self.races += not (written | read if writes else written) <= self.now.known
        self.operations += 1
        self.now.known.add(self.operations)
        self.last[place] = ({self.operations}, set()) if writes else (written, read | {self.operations})
        self.copied += size if writes else 0


@contextmanager
def clocked(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[trainer.Steps, Clocks, Ring]]:
    """Steps whose accesses to the ring's buffers are watched."""
    clocks = Clocks()
    with ExitStack() as stack:
        with monkeypatch.context() as patch:  # while the ring is made: others ask for the module too
            patch.setattr(torch, "get_device_module", lambda device: clocks)
            job = stack.enter_context(trainer.steps(cfg))
        ring = ring_of(job.model)
        clocks.buffers = ring.buffers
        with clocks:
            yield job, clocks, ring


WATCHED = [("sd", "full", 12), ("sd", "int8", 5), ("flux1", "full", 3), ("qwen-image", "full", 5)]


@pytest.mark.parametrize(("name", "linears", "count"), WATCHED)
def test_copies_and_work_wait_for_each_other(
    make: Make, monkeypatch: pytest.MonkeyPatch, name: str, linears: str, count: int
) -> None:
    cfg = configs_of(make, name)(train__swap_blocks=count, train__base_linears=linears)
    with clocked(cfg, monkeypatch) as (job, clocks, _):
        job.take(0), job.take(1)
        with torch.no_grad():
            job.model(job.stream.peek()), job.model(job.stream.peek())
    assert clocks.operations > 100 and clocks.races == 0


FAULTS: dict[str, Callable[[pytest.MonkeyPatch, Ring, Clocks], object]] = {
    "copies wait for no work": lambda patch, ring, clocks: patch.setattr(
        ring.stream, "wait_event", lambda event: None
    ),
    "work waits for no copy": lambda patch, ring, clocks: patch.setattr(
        clocks.work, "wait_event", lambda event: None
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_missing_wait_is_a_race(make: Make, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """The test above would see it."""
    with clocked(configs_of(make)(train__swap_blocks=12), monkeypatch) as (job, clocks, ring):
        FAULTS[fault](monkeypatch, ring, clocks)
        job.take(0)
    assert clocks.races > 10


@pytest.mark.slow
def test_a_refill_that_comes_too_early_changes_the_result(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison to the bit would see it."""
    configs, plain = configs_of(make), Ring._fill
    wanted = outcome(configs())

    def fill(ring: Ring, place: int, block: nn.Module) -> int:
        """Prefetches into the buffer of the block at work."""
        return plain(ring, place if ring.holds[place] is None else ring.current, block)

    monkeypatch.setattr(Ring, "_fill", fill)
    assert not same(wanted, outcome(configs(train__swap_blocks=12)))


@pytest.mark.parametrize("linears", ["full", "int8"])
def test_autograd_sees_that_a_buffer_was_refilled(make: Make, linears: str) -> None:
    """If a block were not recomputed, it would stop rather than go on with another block's weights."""
    with trainer.steps(configs_of(make)(train__swap_blocks=12, train__base_linears=linears)) as job:
        kind, ring = QuantizedLinear if linears == "int8" else nn.Linear, ring_of(job.model)
        block, layer = next((b, m) for b in ring.frozen for m in b.modules() if type(m) is kind)
        ring.turn_to(block)
        loss = layer(torch.ones(1, layer.in_features, requires_grad=True)).sum()
        ring.buffers[ring.current].zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize(("name", "linears", "count"), WATCHED)
def test_each_block_is_copied_twice_a_micro_batch_but_for_those_at_the_turns(
    make: Make, monkeypatch: pytest.MonkeyPatch, name: str, linears: str, count: int
) -> None:
    """Ahead of its call, in every step but the first, although UNets call blocks in an order of their own."""
    cfg = configs_of(make, name)(train__swap_blocks=count, train__base_linears=linears)
    with clocked(cfg, monkeypatch) as (job, clocks, ring):
        job.take(0)
        unforeseen, turn_to = 0, ring.turn_to

        def watched(block: nn.Module) -> None:
            nonlocal unforeseen
            unforeseen += ring._holding(block) is None
            turn_to(block)

        ring.turn_to = watched  # type: ignore[method-assign]
        clocks.copied = 0
        with Dispatched() as operators:
            job.take(1)
        sizes = [len(ring.frozen[block].memory) for block in ring.order]
    assert len(sizes) == count and unforeseen == 0
    assert clocks.copied == 2 * (2 * sum(sizes) - sum(sizes[:2]) - sum(sizes[-2:])), "of two micro-batches"
    assert operators.count["_local_scalar_dense"] == 0, "the host waits for nothing"


def test_two_blocks_are_on_the_device(make: Make) -> None:
    """At any moment of a step: all memory that a step takes is less by all other blocks."""
    configs = configs_of(make)
    with trainer.steps(configs()) as job:
        sizes = list(map(block_swap.frozen_bytes, blocks(job.model.denoiser)))
    less = measured(configs()) - measured(configs(train__swap_blocks=12))
    assert sum(sizes) > 4 * max(sizes)
    assert less == pytest.approx(saved_bytes(sizes, 12), rel=0.02)  # sizes are rounded up


def test_the_host_holds_swapped_weights_once() -> None:
    """Malloc would keep what they leave behind: freed 20 MiB are why it has 8 MiB in its heap."""
    del (freed := [torch.zeros(20 * 2**18)])[:]
    model = nn.Module()
    model._repeated_blocks = ["Linear"]  # type: ignore[assignment]
    for number in range(6):
        model.add_module(str(number), nn.Linear(1024, 2048).requires_grad_(False))
    before = held()
    moved = block_swap.swap(model, 6, torch.device("cpu"))
    taken = held() - before
    assert not freed and moved > 48 * 2**20
    assert taken < 0.5 * moved, "the two buffers"


@pytest.mark.slow
def test_compiled_blocks_can_be_swapped(make: Make) -> None:
    """With no graph break, and no recompilation for weights that are elsewhere in each call."""
    results = []
    for count in (0, 3):
        torch._dynamo.reset()
        compiled: list[Any] = []

        def backend(graph: Any, inputs: Any, compiled: list[Any] = compiled) -> Any:
            compiled.append(graph)
            return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

        with trainer.steps(configs_of(make, "flux1")(train__swap_blocks=count)) as job:
            awake(job.model)
            kernels.compile_module(job.model.denoiser, "regional", backend)
            losses, graphs = [job.take(0).losses.clone()], len(compiled)
            losses += [job.take(number).losses.clone() for number in (1, 2)]
            assert len(compiled) == graphs > 1
        results.append(torch.stack(losses))
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=0)


@pytest.mark.slow
def test_each_rank_swaps_for_itself(make: Make, tmp_path: Path) -> None:
    settings = {"train__steps": 4, "train__micro_batch": 1}
    folders = []
    for count in (0, 12):
        cfg = configs_of(make)(run_dir=str(tmp_path / str(count)), train__swap_blocks=count, **settings)
        assert dbtrain("train", tmp_path / "c.yaml", ranks=2).returncode == 0
        folders.append(Path(cfg.run_dir))
    checkpoints = [{n: b for n, b in tree(f).items() if n.startswith("checkpoints")} for f in folders]
    assert checkpoints[0] == checkpoints[1] and len(checkpoints[0]) > 4


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"train__swap_blocks": 2},
        "swap_blocks is 2, but two blocks are on the device at any time; use 3 or mo",
    ),
    ({"train__swap_blocks": 4, "train__gradient_checkpointing": "none"}, "set gradient_checkpointing to bl"),
    (
        {"train__swap_blocks": "auto", "train__compile": True},
        "but compile is true; set compile to regional, or swap",
    ),
    ({"train__swap_blocks": 4, "train__cuda_graph": True}, "set cuda_graph to false, or swap_blocks to 0"),
    ({"train__swap_blocks": -1}, "swap_blocks"),
    ({"train__swap_blocks": "some"}, "swap_blocks"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=str)
def test_what_it_does_not_go_with_is_refused_in_one_line(
    make: Make, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**{"train__gradient_checkpointing": "blocks", **settings})


def test_more_blocks_than_there_are_is_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"swap_blocks is 13, but the UNet2DConditionModel .* 12 blocks; use 12"
    ):
        train(configs_of(make)(train__swap_blocks=13))


def test_the_fewest_blocks_that_save_enough() -> None:
    sizes = [10, 10, 10, 10, 40]
    assert [saved_bytes(sizes, count) for count in range(6)] == [0, -10, -20 + 20, 10, 20, 0]
    assert [count_that_saves(sizes, missing) for missing in (-5, 0, 1, 10, 11, 20, 21)] == [
        0,
        0,
        3,
        3,
        4,
        4,
        5,
    ]
    assert count_that_saves([], 1) == 0


@pytest.mark.slow
def test_the_forecast_knows_what_swapping_saves(make: Make) -> None:
    configs = configs_of(make)
    base = Base.find(configs().model)
    resident = memory.predict(configs(train__swap_blocks="auto"), base, "cuda")
    assert len(resident.weights.blocks) == 12 and resident.in_host_memory == 0
    count = resident.blocks_to_swap(resident.needed - 10**5)
    assert 3 <= count < 12 and resident.blocks_to_swap(resident.needed) == 0
    swapped = memory.predict(configs(train__swap_blocks=count), base, "cuda")
    assert resident.base - swapped.base == saved_bytes(resident.weights.blocks, count) >= 10**5
    assert resident.needed - swapped.needed >= 10**5
    assert swapped.in_host_memory == sum(block_swap.spread(resident.weights.blocks, count))


def test_auto_swaps_nothing_on_a_cpu(make: Make) -> None:
    if not torch.cuda.is_available():
        with trainer.steps(configs_of(make)(train__swap_blocks="auto")) as job:
            assert swapped(job.model) == 0


def test_auto_swaps_what_is_missing_on_a_gpu(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    found = memory.Prediction(10 * GIB, 0, 0, 0, 0, weights=memory.Weights(blocks=(GIB,) * 12))
    monkeypatch.setattr(memory, "predict", lambda *_: found)
    for gib, count in ((6.0, 7), (11.0, 0), (2.0, 11), (0.5, 12)):
        monkeypatch.setattr(memory, "memory_of", lambda device, gib=gib: gib * GIB)
        with trainer.steps(configs_of(make)(train__swap_blocks="auto")) as job:
            assert swapped(job.model) == count


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "pure-bf16"])
@pytest.mark.parametrize("linears", ["full", "int8"])
def test_on_a_gpu_copies_run_beside_the_work(make: Make, linears: str, precision: str) -> None:
    """From page-locked memory, while the work that was queued before is slow; the bits are the same."""
    configs = partial(configs_of(make), train__base_linears=linears, train__precision=precision)
    wanted = outcome(configs(), steps=8)
    found = outcome(configs(train__swap_blocks=12), steps=8)
    if same(wanted, outcome(configs(), steps=8)):  # where the GPU's kernels repeat themselves
        assert same(found, wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    with trainer.steps(configs(train__swap_blocks=12)) as job:
        ring = ring_of(job.model)
        assert all(frozen.memory.is_pinned() for frozen in ring.frozen.values())
        job.take(0)
        torch.cuda._sleep(10**9)
        ring.turn_to(ring.order[0]), ring.turn_to(ring.order[1])  # queues copies; waits for none
        assert not torch.cuda.current_stream().query()
