"""Runs in slots: each becomes what it does alone, whoever its companions are and whichever its slot is."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file
from torch._dynamo.backends.debugging import aot_eager

from dbtrain.config import Config
from dbtrain.models import kernels
from dbtrain.models.base import Base
from dbtrain.prepare.prepare import prepare
from dbtrain.runtime.errors import ConfigError, Preempted
from dbtrain.runtime.run_folder import RunFolder
from dbtrain.train import loop, many
from dbtrain.train.cuda_graph import Recorder
from dbtrain.train.inputs import Inputs
from dbtrain.train.slots import Slots, check
from dbtrain.train.validation import ImageGenerator, Validator
from tests import bases, eyes
from tests.conftest import Make, slow, thinned
from tests.runs import distance, tree
from tests.session import once
from tests.tape import Tape, recording

STEPS = 4


def configs_of(make: Make, base: str = "sd", **changes: Any) -> Callable[..., Config]:
    """Configs of runs on the same shards, by run folder and seed."""
    side = bases.SIDES[base]
    settings = partial(
        make, model__path=str(bases.OF_FAMILY[base]()), prepare__resolution=side, prepare__class_images=3,
        **{"train__steps": STEPS, "train__global_batch": 2, "train__micro_batch": 2,
           "train__checkpoint_every": 2, "optim__clip": 0.5} | changes,
    )  # fmt: skip
    asked = settings().prepare  # other sections change it too: some priors need no class images
    key = hashlib.sha256(asked.model_dump_json().encode()).hexdigest()[:12]  # type: ignore[union-attr]
    made = once(f"slots-{base}-{key}", lambda folder: prepare(settings(data__shards=str(folder / "shards"))))

    def config(folder: Path, seed: int, **more: Any) -> Config:
        return settings(data__shards=str(made / "shards"), run_dir=str(folder), seed=seed, **more)

    return config


def train(
    cfgs: Iterable[Config], count: int, until: int | None = None, after: Callable[[int], None] | None = None
) -> dict[str, ConfigError]:
    """Train runs in so many slots; stop after `until` steps. Returns what went wrong, by run folder.

    `after(steps)` is called after each step of all.
    """
    waiting = [(cfg, Inputs.find(cfg)) for cfg in cfgs]
    slots = Slots(count, *zip(*waiting, strict=True))  # type: ignore[arg-type]
    problems: dict[str, ConfigError] = {}
    steps = 0

    def ended(cfg: Config, problem: ConfigError | None) -> None:
        if problem:
            problems[Path(cfg.run_dir).name] = problem

    def stepped() -> None:
        nonlocal steps
        steps += 1
        if after:
            after(steps)
        if steps == until:
            raise Preempted("enough")

    many.train(slots, lambda idle: waiting.pop(0) if waiting else None, ended, stepped)
    return problems


def result(folder: Path, step: int = STEPS) -> dict[str, bytes]:
    """The checkpoint and the metrics of a run."""
    return tree(RunFolder(folder).checkpoint(step)) | {"metrics": (folder / "metrics.jsonl").read_bytes()}


def adapters(folder: Path, step: int) -> dict[str, torch.Tensor]:
    checkpoint = RunFolder(folder).checkpoint(step)
    return {f"{path.parent.name}.{name}": tensor for path in checkpoint.rglob("adapter_model.safetensors")
            for name, tensor in load_file(path).items()}  # fmt: skip


def apart(one: Path, other: Path, step: int = STEPS) -> float:
    """The distance of two runs' adapters."""
    return distance(adapters(one, step), adapters(other, step))


TEXT = {"adapter__text_encoder": {"rank": 2, "targets": "all"}}
NUMBERS = {
    "adapter__rslora": True, "adapter__alpha": 3, "adapter__ranks": {"mid_block.*": 7},
    "optim__lora_plus_ratio": 4.0,
}  # fmt: skip
CASES: list[Any] = [
    slow("sd", {"adapter__targets": "all", "loss__min_snr_gamma": 5.0} | TEXT),
    slow("sd", {"train__micro_batch": 1, "train__ema": 0.9, "loss__prior": "prediction"}),
    slow("sd", {"optim__name": "prodigy", "optim__lr": 1.0} | TEXT),
    ("sd", {"prepare__class_prompt": None, "prepare__weights": {"*[13579].jpg": 3}} | NUMBERS),
    ("sd", {"adapter__init": "orthogonal", "prepare__class_prompt": None}),
    slow("sd", {"train__precision": "bf16", "train__base_linears": "int8"}),
    slow("sd", {"train__precision": "fp16"}),
    slow("sd", {"train__gradient_checkpointing": "blocks", "train__swap_blocks": 3}),
    slow("sdxl", TEXT),
    slow("flux1", TEXT),
]
LOOSE = {"bf16": 0.1, "fp16": 0.1}  # relative distance from a run alone, by precision; it is of rounding


@pytest.mark.parametrize(("base", "settings"), CASES, ids=str)
def test_a_run_does_not_depend_on_its_companions_and_is_the_one_alone(
    make: Make, tmp_path: Path, base: str, settings: dict[str, Any]
) -> None:
    config = configs_of(make, base, **settings)
    assert not train([config(tmp_path / f"a{seed}", seed) for seed in (1, 2, 3)], 3)
    assert not train([config(tmp_path / f"b{seed}", seed) for seed in (4, 3, 1)], 3)
    for seed in (1, 3):
        assert result(tmp_path / f"a{seed}") == result(tmp_path / f"b{seed}")
    loop.train(config(tmp_path / "alone", 1))
    bound = LOOSE.get(settings.get("train__precision", ""), 1e-4)
    assert apart(tmp_path / "a1", tmp_path / "alone") < bound
    assert apart(tmp_path / "a2", tmp_path / "alone") > 0.01, "the bound tells subjects apart"


@pytest.mark.slow
@pytest.mark.parametrize(("base", "how"), [("sd", True), ("flux1", "regional")])
def test_compiled_code_serves_every_step_and_every_run(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str, how: bool | str
) -> None:
    graphs = 0

    def counting(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        nonlocal graphs
        graphs += 1
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    monkeypatch.setattr(kernels, "compile_module", partial(kernels.compile_module, backend=counting))
    config = configs_of(make, base, **TEXT)
    for name, compiled in (("eager", False), ("compiled", how)):
        runs = [config(tmp_path / f"{name}{seed}", seed, train__compile=compiled) for seed in (1, 2, 3)]
        assert not train(runs, 2)  # the third takes over a slot
    assert graphs == (1 if how is True else 3), "none for later steps and runs"
    for seed in (1, 2, 3):
        assert apart(tmp_path / f"eager{seed}", tmp_path / f"compiled{seed}") < 1e-4


# More than the room of the others' texts: for most, another pass.
LONG = {"chroma": "", **dict.fromkeys(("qwen-image", "krea2", "z-image"), ", very, very far away" * 4)}


@pytest.mark.slow
@pytest.mark.parametrize("base", LONG)
def test_prompts_differ_in_length(make: Make, tmp_path: Path, base: str) -> None:
    """As do those of a class and of a slot that no run is in. No run sees it of its companions by a bit."""

    def runs_of(place: str, prior: str = "images") -> list[Config]:
        texts = ("a photo of sks dog", "sks", "a large photo of one sks dog in the snow" + LONG[base])
        configs = (configs_of(make, base, prepare__instance_prompt=text, optim__lr=1e-2, loss__prior=prior)
                   for text in texts)  # fmt: skip
        return [config(tmp_path / f"{place}{number}", number) for number, config in enumerate(configs)]

    runs = runs_of("a")
    assert not train(runs, 4)
    for prior in ("images", "prediction"):
        places = [f"{prior}{pair}" for pair in "pq"]
        for place, others in zip(places, ((0, 1), (0, 2)), strict=True):
            assert not train([runs_of(place, prior)[number] for number in others], 2)
        one, other = (result(tmp_path / f"{place}0") for place in places)
        assert one == other
    for number, run in enumerate(runs):
        alone = tmp_path / f"alone{number}"
        loop.train(run.model_copy(update={"run_dir": str(alone)}))
        assert apart(tmp_path / f"a{number}", alone) < 1e-3


def test_a_late_run_whose_prompts_are_longer_is_refused(make: Make, tmp_path: Path) -> None:
    """By itself: the slot is free for the next one."""
    runs = []
    for number, text in enumerate(("a photo of sks dog", "a large photo of one sks dog in the snow", "sks")):
        config = configs_of(make, "qwen-image", prepare__instance_prompt=text)
        cfg = config(tmp_path / str(number), number)
        runs.append((cfg, Inputs.find(cfg)))
    slots = Slots(1, *zip(runs[0], strict=True))
    with slots.open():
        with pytest.raises(ConfigError, match="the prompts are longer than slots have room for"):
            slots.enter(0, *runs[1])
        slots.enter(0, *runs[2])


DIFFERENT: list[dict[str, Any]] = [
    {"adapter__rank": 4}, {"adapter__rank": 2, "train__steps": 3}, {"optim__lr": 2e-4},
    {"adapter__rank": 6, "adapter__alpha": 1}, {"optim__schedule": "cosine"},
]  # fmt: skip


def test_runs_differ_in_rank_rate_and_steps_and_take_turns(make: Make, tmp_path: Path) -> None:
    """So that the photos of some are redrawn while those of others are not."""
    config = configs_of(make, loss__prior="prediction")

    def each(name: str) -> list[Config]:
        return [config(tmp_path / f"{name}{k}", k, **changes) for k, changes in enumerate(DIFFERENT)]

    assert not train(each("a"), 2)
    assert not train(reversed(each("b")), 2)
    for number, cfg in enumerate(each("c")):
        steps = cfg.train.steps
        assert result(tmp_path / f"a{number}", steps) == result(tmp_path / f"b{number}", steps)
        if steps == STEPS:
            loop.train(cfg)
            assert apart(tmp_path / f"a{number}", tmp_path / f"c{number}") < 1e-3


@pytest.mark.parametrize("prior", ["images", slow("prediction")])
def test_recorded_steps_are_those_of_a_graph(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prior: str
) -> None:
    """Although runs come and go, each with its own rank, scale and prompts: see `tests.tape`."""
    config, replays = configs_of(make, loss__prior=prior, train__steps=6), 0

    class Counted(Tape):
        def replay(self) -> None:
            nonlocal replays
            replays += 1
            super().replay()

    def runs(name: str) -> list[Config]:
        return [config(tmp_path / f"{name}{k}", k, **changes) for k, changes in enumerate(DIFFERENT)]

    assert not train(runs("eager"), 2)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Counted)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    passes = Slots._passes
    recorder = Recorder[list[torch.Tensor]]()
    monkeypatch.setattr(Slots, "_passes", lambda slots, batches: recorder(partial(passes, slots), batches))
    assert not train(runs("recorded"), 2)
    assert replays > 6
    for number, cfg in enumerate(runs("eager")):
        steps = cfg.train.steps
        one, other = (result(tmp_path / f"{name}{number}", steps) for name in ("eager", "recorded"))
        assert one == other


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("prior", ["images", "prediction"])
def test_a_recorded_step_of_slots_is_the_unrecorded_one(make: Make, tmp_path: Path, prior: str) -> None:
    for name, recorded in (("eager", False), ("graph", True)):
        config = configs_of(make, loss__prior=prior, train__steps=8, train__cuda_graph=recorded)
        assert not train([config(tmp_path / f"{name}{seed}", seed) for seed in (1, 2, 3)], 2)
    for seed in (1, 2, 3):
        assert apart(tmp_path / f"eager{seed}", tmp_path / f"graph{seed}", 8) < 1e-5


def test_a_run_that_fails_leaves_the_others_as_they_are(make: Make, tmp_path: Path) -> None:
    config = configs_of(make, train__log_every=1)
    good = [config(tmp_path / f"a{seed}", seed) for seed in (1, 2, 3)]
    assert not train(good, 2)
    bad = config(tmp_path / "bad", 4, optim__lr=1e30)
    problems = train([config(tmp_path / "b1", 1), bad, *(config(tmp_path / f"b{k}", k) for k in (2, 3))], 2)
    assert problems.keys() == {"bad"} and "NaN or infinite at step" in str(problems["bad"])
    for seed in (1, 2, 3):
        assert result(tmp_path / f"a{seed}") == result(tmp_path / f"b{seed}")


def test_a_run_whose_folder_disappears_stops_no_other(make: Make, tmp_path: Path) -> None:
    config = configs_of(make, train__log_every=1)
    runs = [config(tmp_path / f"a{seed}", seed) for seed in (1, 2)]

    def remove(steps: int) -> None:
        if steps == 1:
            shutil.rmtree(runs[0].run_dir)

    problems = train(runs, 2, after=remove)
    assert problems.keys() == {"a1"} and "No such file or directory" in str(problems["a1"])
    assert RunFolder(runs[1].run_dir).checkpoint(STEPS).is_dir()


@pytest.mark.parametrize(
    "settings", [{"train__ema": 0.9}, slow({"optim__name": "prodigy", "optim__lr": 1.0})], ids=str
)
def test_a_stopped_run_goes_on_with_others_elsewhere(
    make: Make, tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = configs_of(make, **settings, **TEXT)
    assert not train([config(tmp_path / f"a{seed}", seed) for seed in (1, 2)], 2)
    with pytest.raises(Preempted, match=r"enough \(2 runs saved\)"):
        train([config(tmp_path / f"b{seed}", seed) for seed in (1, 2)], 2, until=3)
    assert not train([config(tmp_path / "c", 7), config(tmp_path / "b1", 1)], 2)
    assert not train([config(tmp_path / "b2", 2)], 2)
    for seed in (1, 2):
        assert result(tmp_path / f"a{seed}") == result(tmp_path / f"b{seed}")
    # It is an ordinary run, and goes on alone as well.
    with pytest.raises(Preempted):
        train([config(tmp_path / "d", 1), config(tmp_path / "e", 2)], 2, until=2)
    loop.train(config(tmp_path / "d", 1))
    assert apart(tmp_path / "d", tmp_path / "a1") < 1e-3


@pytest.mark.slow
def test_validation_is_that_of_the_run(make: Make, tmp_path: Path) -> None:
    """Images and held-out losses in slots are those of the same adapter alone."""
    config = configs_of(
        make, prepare__held_out=1, validation__prompts=["a photo of sks dog"], validation__images=2,
        validation__every=2, train__ema=0.5, export__ema=True, **TEXT,
    )  # fmt: skip
    assert not train([config(tmp_path / f"a{seed}", seed) for seed in (1, 2)], 2)
    loop.train(config(tmp_path / "alone", 2))
    assert_alike(tmp_path / "a2" / "validation", tmp_path / "alone" / "validation")
    for ours, theirs in zip(
        *(
            (folder / "validation.jsonl").read_text().splitlines()
            for folder in (tmp_path / "a2", tmp_path / "alone")
        ),
        strict=True,
    ):
        one, other = json.loads(ours), json.loads(theirs)
        assert one["held_out_instance"] == pytest.approx(other["held_out_instance"], rel=1e-4)


def batches_of_images(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of validation images that are generated together, from now on."""
    batches: list[int] = []
    original = ImageGenerator.latents

    def counted(generator: ImageGenerator, encoded: Any, *rest: Any) -> Any:
        batches.append(len(encoded))
        return original(generator, encoded, *rest)

    monkeypatch.setattr(ImageGenerator, "latents", counted)
    return batches


@pytest.mark.slow
def test_images_that_decide_when_to_stop_have_batches_of_their_own(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others would round them differently, and a run's end would depend on its companions."""
    batches = batches_of_images(monkeypatch)
    config = configs_of(
        make, train__stop="best", train__patience=2, train__steps=2, validation__every=1,
        validation__prompts=["a photo of sks dog"], validation__images=1,
        evaluation__dino=str(eyes.dino()), evaluation__clip=str(eyes.clip()),
    )  # fmt: skip
    assert not train([config(tmp_path / f"a{seed}", seed) for seed in (1, 2)], 2)
    assert not train([config(tmp_path / "b1", 1)], 2)
    scores = [(tmp_path / name / "validation.jsonl").read_bytes() for name in ("a1", "a2", "b1")]
    assert scores[0] == scores[2] != scores[1]
    assert set(batches) == {1}


@pytest.mark.parametrize(
    ("owner", "work"), [(Validator, "lacks_images"), (ImageGenerator, "encode")], ids=["lookup", "images"]
)
def test_a_run_that_cannot_be_validated_stops_no_other(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, work: str
) -> None:
    config = configs_of(make, validation__prompts=["a photo of sks dog"], validation__images=1)
    runs = [config(tmp_path / f"a{seed}", seed) for seed in (1, 2, 3)]
    original = getattr(owner, work)

    def failing(one: Any, *args: Any) -> Any:
        if one.cfg.seed == 2 and RunFolder(one.cfg.run_dir).checkpoints():
            raise FileNotFoundError(errno.ENOENT, "its disk is gone", "a2")
        return original(one, *args)

    monkeypatch.setattr(owner, work, failing)
    problems = train(runs, 3)
    assert {name: str(problem) for name, problem in problems.items()} == {"a2": "a2: its disk is gone"}
    assert all(RunFolder(run.run_dir).validation_sheet(STEPS).is_file() for run in (runs[0], runs[2]))


def assert_alike(one: Path, other: Path, most: int = 2) -> None:
    """The same images, whose values differ by no more than this, of 255."""
    images = [path.relative_to(one) for path in sorted(one.rglob("*.png"))]
    assert images == [path.relative_to(other) for path in sorted(other.rglob("*.png"))] and images
    for name in images:
        difference = ImageChops.difference(Image.open(one / name), Image.open(other / name))
        assert max(high for _, high in difference.getextrema()) <= most, name


@pytest.mark.slow
@pytest.mark.parametrize("base", thinned([name for name in bases.OF_FAMILY if name != "deepfloyd-2"], 12))
def test_images_for_validation_share_batches(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    """They and the run are those alone, and do not depend on whose else are in the batch: in every family."""
    batches = batches_of_images(monkeypatch)
    config = configs_of(
        make, base, validation__prompts=["a photo of sks dog", "a dog"], validation__images=2,
        validation__every=2, train__steps=2, optim__lr=0.02, sample__guidance=2.0, sample__batch=6,
    )  # fmt: skip
    cfg = config(tmp_path / "alone", 1)
    text = Base.find(cfg.model).family.texts_as_one
    loop.train(cfg)
    assert set(batches) == {2}, "a prompt's images"
    batches.clear()
    assert not train([config(tmp_path / f"a{seed}", seed) for seed in (1, 2)], 3)
    assert set(batches) == ({2} if text else {6}), "of each slot, two, also of the idle one"
    assert not train([config(tmp_path / f"b{seed}", seed) for seed in (4, 1)], 3)
    assert result(tmp_path / "a1", 2) == result(tmp_path / "b1", 2)
    one, two, again, alone = (tmp_path / name for name in ("a1", "a2", "b1", "alone"))
    assert apart(one, alone, 2) < 1e-4 and apart(two, alone, 2) > 0.01
    assert_alike(one / "validation", alone / "validation")
    assert_alike(one / "validation", again / "validation", 0)
    with pytest.raises(AssertionError, match="png"):
        assert_alike(one / "validation", two / "validation")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"adapter__kind": "loha"}, "adapter.kind is 'loha'"),
        ({"adapter__dropout": 0.1}, "adapter.dropout is 0.1"),
        ({"adapter__dora": True}, "adapter.dora is True"),
        ({"adapter__text_encoder": {"rank": 2, "bias": "all"}}, "adapter.text_encoder.bias is 'all'"),
        ({"train__wandb": "pets"}, "train.wandb does not go with slots"),
        (
            {"train__shard": "all", "model__training_adapter": "a/b", "validation__prompts": ["a dog"]},
            "model.training_adapter out of the weights",
        ),
    ],
    ids=str,
)
def test_what_slots_do_not_have_is_refused(
    make: Make, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        check(configs_of(make)(tmp_path / "a", 1, **settings))
