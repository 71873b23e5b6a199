"""`adapter.start`: at step 0 the function of the file's adapter, whatever its format, rank and alpha."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dbtrain.adapters import inject
from dbtrain.adapters.formats import diff_file, peft_folder
from dbtrain.adapters.formats import registry as formats
from dbtrain.adapters.state import AdapterState
from dbtrain.config import AdapterSettings, Config, Model
from dbtrain.models.base import Base
from dbtrain.runtime.errors import ConfigError, Preempted
from dbtrain.runtime.run_folder import RunFolder
from dbtrain.train import loop, start_adapter
from dbtrain.train.adapted import Adapted, attach
from tests import bases
from tests.conftest import Make, slow, thinned, train
from tests.train.test_slots import configs_of
from tests.train.test_slots import train as train_in_slots

TARGETS = r".*(to_q|to_k|conv1)"


class New(Adapted):
    """A new run's adapter."""

    def __init__(self, base: Base, cfg: Config) -> None:
        names = base.family.adaptable if cfg.adapter.text_encoder else (base.family.denoiser,)
        self.modules = {name: base.load(name) for name in names}
        attach(self.modules, base.family, cfg)

    @property
    def trained(self) -> dict[str, nn.Module]:
        return self.modules


def found() -> Base:
    return Base.find(Model(path=str(bases.sd())))


def random(settings: Mapping[str, Any], text: Mapping[str, Any] | None = None) -> dict[str, AdapterState]:
    """An adapter of random weights with settings of the denoiser's and the text encoder's adapter."""
    states = {}
    for name, own, part in (("unet", settings, "denoiser"), ("text_encoder", text, "text_encoder")):
        if own is not None:
            module = found().load(name)
            inject.attach(module, AdapterSettings(**own), part, 0)
            for parameter in inject.trainable(module).values():
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
            states[name] = inject.collect(module)
    return states


def written(folder: Path, states: Mapping[str, AdapterState], form: str = "peft") -> Path:
    path = formats.write(form, folder, found().family, states, found().module_names)
    return folder if form == "peft" else path


def changes(states: Mapping[str, AdapterState]) -> dict[tuple[str, str], Tensor]:
    return {
        (name, module): parts["diff"]
        for name, state in states.items()
        for module, parts in diff_file.changes(found().load(name), state).items()
    }


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # the file's settings, the run's
    "the same": ({"rank": 4}, {"rank": 4}),
    "more ranks": ({"rank": 4, "alpha": 8}, {"rank": 6, "alpha": 6}),
    "ranks by layer": ({"rank": 2, "ranks": {"to_q": 3}}, {"rank": 3, "alpha": 1, "ranks": {".*to_k": 5}}),
    "rsLoRA": ({"rank": 4, "rslora": True}, {"rank": 9}),
    "to rsLoRA": ({"rank": 4}, {"rank": 4, "rslora": True, "alpha": 2}),
    "DoRA": ({"rank": 2, "dora": True}, {"rank": 4, "dora": True}),
    "orthogonal": ({"rank": 2}, {"rank": 4, "init": "orthogonal", "targets": ["to_q", "to_k"]}),
    "LoHa": ({"kind": "loha", "rank": 4, "alpha": 8}, {"kind": "loha", "rank": 4, "alpha": 2}),
    "LoKr": ({"kind": "lokr", "rank": 4, "alpha": 8}, {"kind": "lokr", "rank": 4}),
    "LoKr of whole factors": ({"kind": "lokr", "rank": 64}, {"kind": "lokr", "rank": 64, "alpha": 32}),
    "LoHa to LoRA": ({"kind": "loha", "rank": 2}, {"rank": 4}),
}


@pytest.mark.parametrize("case", thinned(CASES, 4))
def test_a_run_starts_at_the_function_of_the_file(make: Make, tmp_path: Path, case: str) -> None:
    given, wanted = CASES[case]
    targets = {"targets": wanted.get("targets", TARGETS)}
    text = {"kind": given.get("kind", "lora"), "rank": given["rank"]}
    states = random({**given, **targets}, text)
    path = written(tmp_path / "file", states)
    own_text = {"kind": wanted.get("kind", "lora"), "rank": max(wanted["rank"], 4), "alpha": 3}
    cfg = make(adapter={**wanted, **targets, "start": str(path), "text_encoder": own_text})
    new = New(found(), cfg)
    before = new.states()
    start_adapter.start_from(found(), cfg, new)
    started, truth = changes(new.states()), changes(states)
    assert started.keys() == truth.keys()
    for place, change in truth.items():
        assert (started[place] - change).norm() <= 2e-6 * change.norm(), place
    if case == "more ranks":  # which training can use: A is random there, and B zero
        for name, tensor in new.states()["unet"].tensors.items():
            rest = tensor[4:] if "lora_A" in name else tensor[:, 4:]
            assert torch.equal(rest, before["unet"].tensors[name][4:] if "lora_A" in name else rest * 0)
            assert "lora_B" in name or rest.abs().min() > 0
    if case == "the same":
        for name, tensor in new.states()["unet"].tensors.items():
            assert torch.equal(tensor, states["unet"].tensors[name])


@pytest.mark.parametrize("form", ["diffusers", slow("kohya")])
def test_fewer_ranks_are_the_nearest(
    make: Make, tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    states = random({"rank": 6, "alpha": 3, "targets": TARGETS})
    cfg = make(adapter={"rank": 4, "targets": TARGETS, "start": str(written(tmp_path / "a", states, form))})
    new = New(found(), cfg)
    with caplog.at_level("INFO"):
        start_adapter.start_from(found(), cfg, new)
    assert "of rank 4, relative error 0." in caplog.text
    fits = start_adapter.check(found(), cfg)
    for place, change in changes(states).items():
        squares = torch.linalg.svdvals(change.double().flatten(1)).square()
        error = (changes(new.states())[place] - change).norm() / change.norm()
        assert error.item() == pytest.approx((squares[4:].sum() / squares.sum()).sqrt().item(), rel=1e-3)
        assert fits[place].relative == pytest.approx(error.item(), rel=1e-3)


LORA = {"rank": 2, "targets": ["to_q", "to_k"]}
PROJ = {"rank": 2, "targets": ["proj_in"]}
REFUSED: list[tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any], str]] = [
    ({**LORA, "targets": ["to_q"]}, None, LORA, r"it has no layer .*to_k, .* set adapter.targets=\[to_q\]"),
    ({**LORA, "targets": ["to_q", "to_out.0", "to_k"]}, None, LORA,
     r"it has the layer .*to_out.0, .* set adapter.targets=\[to_k, to_out.0, to_q\]"),
    (LORA, {"rank": 2}, LORA, "it is on the text_encoder too; set adapter.text_encoder"),
    (LORA, None, {**LORA, "text_encoder": {"rank": 2}}, "not on the text_encoder; remove"),
    ({**LORA, "dora": True}, None, LORA, "it is a DoRA, unlike the run's adapter; set adapter.dora=true"),
    (LORA, None, {**LORA, "dora": True}, "it is no DoRA, unlike the run's adapter; set adapter.dora=false"),
    (LORA, None, {**LORA, "kind": "loha"}, "it is a lora, the run's a loha; set adapter.kind=lora"),
    ({**LORA, "kind": "loha"}, None, {**LORA, "kind": "loha", "rank": 3}, "set adapter.rank and its other"),
    ({**PROJ, "bias": "lora_only"}, None, PROJ, "trained biases, e.g. .*, cannot be continued"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "text", "wanted", "said"), REFUSED, ids=[row[3] for row in REFUSED])
def test_what_cannot_go_on_says_what_to_set(
    make: Make,
    tmp_path: Path,
    given: dict[str, Any],
    text: dict[str, Any] | None,
    wanted: dict[str, Any],
    said: str,
) -> None:
    path = written(tmp_path / "file", random(given, text))
    cfg = make(adapter={**wanted, "start": str(path)})
    with pytest.raises(ConfigError, match=f"(?s)adapter.start: '.*file': .*{said}"):
        start_adapter.check(found(), cfg)


@pytest.mark.slow
def test_a_run_resumes_without_the_file_and_not_with_another(
    make: Make, tmp_path: Path, prepared: Path
) -> None:
    file, other = (
        written(tmp_path / name, random({"rank": rank, "targets": ["to_q"]}), "kohya")
        for name, rank in (("a", 2), ("b", 3))
    )

    def cfg(run: str, start: Path | None) -> Config:
        adapter = {"rank": 4, "targets": ["to_q"], "start": start and str(start)}
        return make(run_dir=str(tmp_path / run), data__shards=str(prepared), adapter=adapter)

    whole = RunFolder(train(cfg("whole", file)))
    with pytest.raises(Preempted):
        train(cfg("again", file), until=2)
    for wrong in (other, None):
        with pytest.raises(ConfigError, match=r"adapter\.start was 'content "):
            train(cfg("again", wrong))
    file.rename(tmp_path / "moved.safetensors")
    again = RunFolder(train(cfg("again", file)))
    last = "unet/adapter_model.safetensors"
    assert (whole.checkpoint(4) / last).read_bytes() == (again.checkpoint(4) / last).read_bytes()
    (again.checkpoint(4) / last).write_bytes(b"damaged")
    train(cfg("again", file))
    assert (whole.checkpoint(4) / last).read_bytes() == (again.checkpoint(4) / last).read_bytes()
    with pytest.raises(ConfigError, match=r"adapter\.start: adapter '.*' is neither"):
        train(cfg("new", file))

    # It trains on: the first loss is that of the file's function, and the weights have moved.
    zero = RunFolder(train(cfg("bare", None)))
    assert whole.read_metrics()[0]["loss"] != zero.read_metrics()[0]["loss"]
    weights = load_file(whole.checkpoint(4) / last)
    assert any(t[:, 2:].any() for n, t in weights.items() if "lora_B" in n), "the new ranks are trained"


@pytest.mark.slow
def test_subjects_of_a_fleet_start_from_files_of_their_own(make: Make, tmp_path: Path) -> None:
    config = configs_of(make, adapter__targets=["to_q"])
    paths = [
        written(tmp_path / f"file{rank}", random({"rank": rank, "targets": ["to_q"]})) for rank in (2, 3)
    ]
    starts = [{"adapter__start": str(path)} for path in paths] + [{}]
    cfgs = [config(tmp_path / f"slot{n}", 1, **start) for n, start in enumerate(starts)]
    assert not train_in_slots(cfgs, 3)
    for number, start in enumerate(starts):
        loop.train(config(tmp_path / f"alone{number}", 1, **start))
        one, other = (
            peft_folder.read(RunFolder(tmp_path / f"{kind}{number}").checkpoint(4) / "unet").tensors
            for kind in ("slot", "alone")
        )
        for name, tensor in one.items():
            assert (tensor - other[name]).norm() <= 1e-3 * other[name].norm(), name
    shutil.rmtree(tmp_path / "slot0")
    mixed = [config(tmp_path / "slot0", 1, adapter__start=str(tmp_path / "nothing"))]
    with pytest.raises(ConfigError, match=r"adapter\.start: adapter"):
        train_in_slots(mixed, 1)
