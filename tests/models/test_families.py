"""Every family, adapter kind and format: what was trained is what a stock loader of the format gives."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dbtrain.adapters import tokens
from dbtrain.adapters.formats import peft_folder, word_file
from dbtrain.adapters.formats import registry as formats
from dbtrain.adapters.formats.common import strength
from dbtrain.adapters.formats.diffusers_file import FILE as DIFFUSERS
from dbtrain.config import Config, Model
from dbtrain.data import prompt_table
from dbtrain.data.batch import Batch
from dbtrain.data.shards import Manifest
from dbtrain.models import kernels, sampler
from dbtrain.models.base import Base
from dbtrain.models.families import registry as families
from dbtrain.models.families.family import Family
from dbtrain.models.flow_matching import FlowMatching
from dbtrain.prepare.prepare import prepare
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.run_folder import RunFolder
from dbtrain.sample.pipeline import AdapterPipeline
from dbtrain.sample.sample import sample_run
from dbtrain.train.dreambooth import DreamBooth
from tests import bases
from tests.conftest import Make, at, dbtrain, draw_photo, slow, thinned, train
from tests.networks import first_batch

KINDS = ("lora", "loha", "lokr")
FLOW = [name for name in bases.OF_FAMILY if families.get(name).objective is FlowMatching]
TEXT = {"kind": "lora", "rank": 2}
CLIPS = ("clip_l", "clip_g")  # names of their embeddings
FROZEN_TEXT = [name for name in FLOW if not families.get(name).adaptable_text]


def configured(make: Make, tmp_path: Path, base: str, **changes: Any) -> Config:
    """A small run of this base; class images are drawn by us, which upscalers need."""
    folder = bases.ALL[base]()
    model = Model(path=str(folder))
    family = Base.find(model).family
    pictures = tmp_path / "class-of-ours"
    pictures.mkdir(exist_ok=True)
    for number in range(4):
        draw_photo(pictures / f"{number}.png", number)
    settings = {
        "model__path": str(folder), "prepare__resolution": bases.SIDES[family.name],
        "prepare__class_images": 4, "prepare__class_dir": str(pictures), "train__steps": 2,
        "train__micro_batch": 2, "train__global_batch": 2, "adapter__alpha": 8, "adapter__rank": 4,
        "optim__lr": 0.01,
    }  # fmt: skip
    return make(**settings | changes)


def network(cfg: Config) -> DreamBooth:
    """The trained module as `train` left it: built anew, weights from the last checkpoint."""
    from dbtrain.adapters import inject as adapters

    base = Base.find(cfg.model)
    folder = Path(cfg.data.shards)
    manifest = Manifest.read(at(folder))
    table = prompt_table.read(at(folder), manifest.prompts)
    table |= tokens.read_again(base, cfg.learned_words, cfg.adapter.token, manifest.prompts.texts)
    model = DreamBooth.build(base, manifest, table, cfg)
    newest = RunFolder(cfg.run_dir).checkpoints()[-1]
    for component, module in model.trained.items():
        adapters.restore(module, peft_folder.read(newest / component).tensors)
    if model.words:
        word_file.restore(newest / word_file.CHECKPOINT, model.words)
    return model.eval()


def prediction(
    model: DreamBooth, unet: nn.Module, encoders: dict[str, nn.Module], batch: Batch,
    ids: dict[str, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """What these modules predict for a batch, embeddings included. `ids`: instead of the model's."""
    family, x0 = model.family, model.x0(batch)
    t = model.objective.timesteps(batch.u)
    x_t = model.objective.corrupt(x0, batch.noise, t)
    condition = model.condition(batch)
    if model.text_encoders:
        table = {name: model.get_buffer(f"prompts_{name}") for name in model.prompt_names} | (ids or {})
        condition |= {name: rows[batch.prompt] for name, rows in family.embed(encoders, table).items()}
    condition |= batch.extra
    if model.sees:
        condition |= model.sees(x0, x_t, t, batch, model.noising)
    return family.denoise(unet, x_t, t, condition)


def stock(cfg: Config, folder: Path, form: str) -> Any:
    """The base with the exported adapter, loaded as the format's own users do."""
    base = Base.find(cfg.model)
    pipe = getattr(diffusers, base.family.pipeline).from_pretrained(cfg.model.path, dtype=torch.float32)
    if form == "peft":
        for component in base.family.adaptable:
            if (folder / component).is_dir():
                module = PeftModel.from_pretrained(getattr(pipe, component), folder / component)
                setattr(pipe, component, module)
    else:
        pipe.load_lora_weights(folder, weight_name=formats.FORMATS[form].path(folder, "run").name)
    if (file := folder / "embeddings" / "sks.safetensors").is_file():
        load_word(pipe, base.family, load_file(file))
    return pipe


def load_word(pipe: Any, family: Family, rows: dict[str, Tensor]) -> None:
    """Load a learned word with Diffusers' loader, or with transformers where the pipeline has none."""
    assert hasattr(pipe, "load_textual_inversion") == family.loads_words
    for encoder, name in zip(family.adaptable_text, ("sks",) if len(rows) == 1 else CLIPS, strict=True):
        found = rows[name]
        module, tokenizer = getattr(pipe, encoder), getattr(pipe, family.text_encoders[encoder])
        if family.loads_words:
            pipe.load_textual_inversion(found, token="sks", tokenizer=tokenizer, text_encoder=module)
            continue
        names = ["sks", *(f"sks_{number}" for number in range(1, len(found)))]
        tokenizer.add_tokens(names)
        module.resize_token_embeddings(len(tokenizer))
        module.get_input_embeddings().weight.data[tokenizer.convert_tokens_to_ids(names)] = found


TABLE = [
    ("sd", "lora", False, "diffusers"), ("sd", "lora", "word too", "diffusers"),
    ("sd", "lora", True, "kohya"),
    ("sd", "loha", True, "peft"), ("sd", "lokr", False, "peft"), ("sd-v", "lora", True, "peft"),
    ("sdxl", "lora", "word too", "diffusers"), ("sdxl", "lora", True, "kohya"),
    ("sdxl", "lora", False, "peft"),
    ("sdxl", "loha", True, "peft"), ("sdxl", "lokr", False, "peft"),
    ("if-1", "lora", "word", "diffusers"), ("if-1", "lora", True, "peft"), ("if-1", "loha", False, "peft"),
    ("if-1", "lokr", True, "peft"),
    ("if-2", "lora", False, "diffusers"), ("if-2", "lokr", True, "peft"),
    *((name, "lora", False, "diffusers peft comfyui") for name in FLOW),
    ("flux2-klein", "loha", False, "peft"), ("z-image", "lokr", False, "peft"),
    ("flux1", "lora", "word", "diffusers"), ("sd3", "lora", "word too", "diffusers"),
    ("sd3", "loha", True, "peft"),
    ("flux1", "lora", True, "comfyui"), ("sd3", "lora", True, "comfyui"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "kind", "text", "forms"), thinned(TABLE, 18))
def test_a_stock_loader_predicts_what_the_trained_module_does(
    make: Make, tmp_path: Path, base: str, kind: str, text: bool | str, forms: str
) -> None:
    """`text`: an adapter on the text encoders, a learned word, or the word too."""
    text_settings = {**TEXT, "kind": kind} if text in (True, "word too") else None
    word = isinstance(text, str)
    cfg = configured(
        make,
        tmp_path,
        base,
        adapter__kind=kind,
        adapter__text_encoder=text_settings,
        adapter__token={"vectors": 2} if word else None,
        subject__token="sks",
        optim__token_lr=0.1,
        export__formats=forms.split(),
    )
    table = prompt_table.read(at(prepare(cfg)), Manifest.read(at(Path(cfg.data.shards))).prompts)
    folder = train(cfg) / "export"
    model = network(cfg)
    family = model.family
    batch = first_batch(cfg, family)
    base_model = Base.find(cfg.model)
    plain = {name: base_model.load(name) for name in family.text_encoders}
    ids = {name: table[f"ids.{name}"] for name in model.prompt_names if f"ids.{name}" in table}
    with torch.no_grad():
        ours = prediction(model, model.denoiser, dict(model.text_encoders.items()), batch)
        bare = prediction(model, base_model.load(family.denoiser), plain, batch, ids)
    assert ours.shape == batch.noise.shape
    assert (bare - ours).abs().max() > 1e-3 * ours.abs().max(), "the adapter changes nothing"

    again = AdapterPipeline.load(cfg.model)  # our own loader reads every form of every kind
    for form in forms.split():
        pipe = stock(cfg, folder, form)
        encoders = {name: getattr(pipe, name) for name in family.text_encoders}
        file = formats.FORMATS[form].file.format(name="run")
        again.add("mine", folder / (file or ("" if text else family.denoiser)))
        again.use({"mine": 1.0})
        mine = {name: getattr(again.pipe, name) for name in family.text_encoders}
        if word:
            pipe.scheduler = again.pipe.scheduler
            written: dict[str, Any] = {"prompt": "a photo of sks dog"}
            if not family.loads_words:  # nor writes out what a word stands for
                written = {"prompt": "a photo of sks sks_1 dog"}
            if base == "sd3":
                written["prompt_3"] = "a photo of sks dog"
            stocks, drawn = (
                one(**each, num_inference_steps=2, generator=torch.Generator().manual_seed(0),
                    output_type="np", height=bases.SIDES[family.name], width=bases.SIDES[family.name]).images
                for one, each in ((pipe, written), (again.pipe, {"prompt": "a photo of sks dog"}))
            )  # fmt: skip
            assert abs(stocks - drawn).max() <= 1e-4
        with torch.no_grad():
            theirs = prediction(model, getattr(pipe, family.denoiser), encoders, batch)
            loaded = prediction(model, getattr(again.pipe, family.denoiser), mine, batch)
            again.remove("mine")
            off = prediction(model, getattr(again.pipe, family.denoiser), mine, batch, ids)
        assert (theirs - ours).abs().max() <= 1e-4 * ours.abs().max(), form
        assert (loaded - ours).abs().max() <= 1e-4 * ours.abs().max(), form
        assert torch.equal(off, bare)


MIDDLE = "mid_block.*to_q"
SWITCHES = [  # one that changes how, not what; inductor's own code is compared in train/test_modes.py
    slow("sdxl-slim", {"train__compile": True}, {"adapter__text_encoder": TEXT}),
    slow("sd-v-slim", {"train__compile": True}, {"adapter__kind": "lokr", "adapter__targets": MIDDLE}),
    ("sdxl", {"train__gradient_checkpointing": "blocks"}, {"adapter__text_encoder": TEXT}),
    slow("sdxl", {"train__gradient_checkpointing": "transformer"}, {}),
    slow("if-1", {"train__gradient_checkpointing": "blocks"}, {"adapter__text_encoder": TEXT}),
    slow("sd", {"train__gradient_checkpointing": "blocks"}, {"adapter__kind": "loha"}),
    slow("sd3", {"train__gradient_checkpointing": "blocks"}, {"adapter__text_encoder": TEXT}),
    *thinned([(name, {"train__gradient_checkpointing": "transformer"}, {}) for name in FLOW], 8),
    *(slow(name, {"train__compile": "regional"}, {"adapter__targets": "all"}) for name in FLOW),
]  # fmt: skip


@pytest.mark.parametrize(("base", "switch", "settings"), SWITCHES, ids=str)
def test_compiling_and_checkpointing_give_the_same_adapter(
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    base: str,
    switch: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    quick = partial(kernels.compile_module, backend="eager" if base in FLOW else "aot_eager")
    monkeypatch.setattr(kernels, "compile_module", quick)
    found = []
    for number, changes in enumerate(({}, switch)):
        cfg = configured(make, tmp_path, base, **settings, **changes, run_dir=str(tmp_path / f"run-{number}"))
        prepare(cfg)
        newest = sorted((train(cfg) / "checkpoints").iterdir())[-1]
        folders = [path.parent for path in newest.glob("*/adapter_config.json")]
        found.append({folder.name: peft_folder.read(folder) for folder in folders})
    assert found[0].keys() == found[1].keys()
    for component, state in found[0].items():
        for name, tensor in state.tensors.items():
            other = found[1][component].tensors[name]
            assert (tensor - other).abs().max() <= 2e-2 * tensor.abs().max() + 1e-6, (component, name)


def test_rows_have_their_own_prompt_size_and_crop(make: Make, tmp_path: Path) -> None:
    """The reference SDXL script gives half of a batch the other half's prompt."""
    cfg = configured(make, tmp_path, "sdxl")
    manifest = Manifest.read(at(prepare(cfg)))
    family = families.get("sdxl")
    batch = first_batch(cfg, family)
    assert batch.prompt.tolist() == [0, 0, 1, 1]
    table = prompt_table.read(at(Path(cfg.data.shards)), manifest.prompts)
    base = Base.find(cfg.model)
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(cfg.model.path, dtype=torch.float32)
    for number, text in enumerate(["a photo of sks dog", "a photo of a dog"]):
        embeds, _, pooled, _ = pipe.encode_prompt(text, device="cpu", do_classifier_free_guidance=False)
        torch.testing.assert_close(table["condition.prompt_embeds"][number], embeds[0])
        torch.testing.assert_close(table["condition.pooled"][number], pooled[0])
    rows = {tuple(ids.tolist()) for ids in batch.extra["time_ids"]}
    assert all(ids[4:] == (64, 64) for ids in rows)
    assert (80.0, 96.0) in {ids[:2] for ids in rows}, "class images have their own size"
    assert base.index["_class_name"] == family.pipeline


def test_the_unused_layer_of_sdxl_s_first_encoder_is_left_alone(make: Make, tmp_path: Path) -> None:
    cfg = configured(make, tmp_path, "sdxl", adapter__text_encoder={"kind": "lora", "targets": "all"})
    prepare(cfg)
    train(cfg)
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    first = {name.split("layers.")[1][0] for name in load_file(newest / "text_encoder" / peft_folder.WEIGHTS)}
    other = {
        name.split("layers.")[1][0] for name in load_file(newest / "text_encoder_2" / peft_folder.WEIGHTS)
    }
    assert (first, other) == ({"0"}, {"0", "1", "2"})


def test_a_kohya_file_has_the_true_alpha_and_the_names_its_readers_know(make: Make, tmp_path: Path) -> None:
    cfg = configured(
        make, tmp_path, "sdxl", adapter__text_encoder=TEXT, adapter__dora=True, export__formats=["kohya"]
    )
    prepare(cfg)
    tensors = load_file(train(cfg) / "export" / "run.safetensors")
    layers = {name.partition(".")[0] for name in tensors}
    assert {name.split("_")[1] for name in layers} == {"unet", "te1", "te2"}
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj" in layers
    assert "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_out_0" in layers
    alphas = {layer: tensors[f"{layer}.alpha"].item() for layer in layers}
    assert {alpha for layer, alpha in alphas.items() if "unet" in layer} == {8.0}
    assert {alpha for layer, alpha in alphas.items() if "te" in layer.split("_")[1]} == {2.0}
    q = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
    assert tensors[f"{q}.dora_scale"].shape == (32, 1)


@pytest.mark.parametrize(
    ("base", "settings"),
    [("sd", {}), slow("sdxl", {"adapter__dora": True}), slow("sd", {"adapter__rslora": True})],
    ids=str,
)
def test_conversions_between_all_formats_come_back_the_same(
    make: Make, tmp_path: Path, base: str, settings: dict
) -> None:
    cfg = configured(
        make, tmp_path, base, adapter__text_encoder=TEXT, adapter__targets="all", **settings,
        export__formats=["diffusers", "peft", "kohya"],
    )  # fmt: skip
    prepare(cfg)
    run = train(cfg)
    original = Base.find(cfg.model)
    family = original.family
    truth = {
        path.parent.name: peft_folder.read(path.parent) for path in run.glob("export/*/adapter_config.json")
    }
    assert truth.keys() == set(family.adaptable)
    out = run / "export"
    sources = {"diffusers": out / DIFFUSERS, "kohya": out / "run.safetensors", "peft": out}
    for source, path in sources.items():
        if source == "peft":
            path = tmp_path / "peft-only"
            formats.write("peft", path, family, truth)
        states = formats.read(path, family, original.skeleton)
        for form, able in formats.FORMATS.items():
            if not able.readable or able.lacks(family, truth):
                continue
            out = formats.write(form, tmp_path / f"{source}-{form}", family, states, original.module_names)
            back = formats.read(out, family, original.skeleton)
            for component, state in truth.items():
                assert back[component].tensors.keys() == state.tensors.keys()
                for name, tensor in state.tensors.items():
                    assert torch.equal(back[component].tensors[name], tensor), (source, form, name)
                _, scale = strength(back[component].config, "any")
                assert scale == pytest.approx(strength(state.config, "any")[1])


@pytest.mark.parametrize("kind", ["loha", "lokr"])
@pytest.mark.parametrize("targets", [slow("attention"), "all"])
def test_lycoris_files_round_trip(make: Make, tmp_path: Path, kind: str, targets: str) -> None:
    cfg = configured(
        make, tmp_path, "sd", adapter__kind=kind, adapter__targets=targets, adapter__effective_conv2d=True,
        adapter__rank=4, export__formats=["peft", "kohya"],
    )  # fmt: skip
    prepare(cfg)
    out = train(cfg) / "export"
    base = Base.find(cfg.model)
    family = families.get("sd")
    batch = first_batch(cfg, family)
    model = network(cfg)
    pipe = AdapterPipeline.load(cfg.model)
    pipe.add("kohya", out / "run.safetensors")
    with torch.no_grad():
        pipe.use({"kohya": 1.0})
        loaded = prediction(model, pipe.pipe.unet, {}, batch)
        ours = prediction(model, model.denoiser, {}, batch)
    assert (loaded - ours).abs().max() <= 1e-4 * ours.abs().max()
    # Another trainer's file has no settings in its header: they are told from its tensors.
    with safe_open(out / "run.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / "foreign.safetensors")
    states = formats.read(tmp_path / "foreign.safetensors", family, base.skeleton)
    assert states["unet"].config["peft_type"] == kind.upper()
    pipe.swap("kohya", tmp_path / "foreign.safetensors")
    with torch.no_grad():
        loaded = prediction(model, pipe.pipe.unet, {}, batch)
    assert (loaded - ours).abs().max() <= 1e-4 * ours.abs().max()


@pytest.mark.slow
def test_if_stage_2_sees_the_small_image_or_as_the_reference_itself(make: Make, tmp_path: Path) -> None:
    cfg = configured(make, tmp_path, "if-2")
    prepare(cfg)
    train(cfg)
    model = network(cfg)
    batch = first_batch(cfg, model.family)
    x0 = model.x0(batch)
    assert x0.shape == (4, 3, 32, 32) and x0.min() >= -1 and x0.max() <= 1
    t = model.objective.timesteps(batch.u)
    x_t = model.objective.corrupt(x0, batch.noise, t)
    seen = model.family.sees["image"](x0, x_t, t, batch, model.noising)
    level = (batch.level * 1000).long()
    assert torch.equal(seen["level"], level)
    calm = torch.zeros_like(batch.level)
    clear = model.family.sees["image"](
        x0, x_t, t, Batch(**{**vars(batch), "level": calm, "posterior": torch.zeros_like(x0)}), model.noising
    )["small"]
    assert (clear - x0).abs().mean() < 0.35 * x0.std() and not torch.equal(clear, x0)
    itself = model.family.sees["itself"](x0, x_t, t, batch, model.noising)
    assert torch.equal(itself["small"], x_t) and torch.equal(itself["level"], t)


def test_if_stage_2_draws_by_enlarging(make: Make, tmp_path: Path) -> None:
    small = [draw_photo(tmp_path / f"small{number}.png", number, (8, 8)) for number in range(2)]
    cfg = configured(make, tmp_path, "if-2", sample__prompts=["a photo of sks dog"], sample__steps=2,
                     sample__low_res=[str(path) for path in small])  # fmt: skip
    done = dbtrain("run", tmp_path / "c.yaml")
    assert done.returncode == 0
    pictures = [Image.open(path) for path in sorted((tmp_path / "run").glob("samples/*/01-00-seed*.png"))]
    assert [picture.size for picture in pictures] == [(32, 32)] * 2
    assert pictures[0].tobytes() != pictures[1].tobytes()
    with pytest.raises(ConfigError, match=r"sample\.low_res has 0 images, but a deepfloyd-2 model enlarges"):
        sample_run(make(model=cfg.model.model_dump(), sample__prompts=["a dog"]))
    with pytest.raises(ConfigError, match="cannot generate class images from a prompt"):
        prepare(configured(make, tmp_path, "if-2", prepare__class_images=5))


def test_an_sdxl_refiner_and_an_unknown_pipeline_are_refused(make: Make, tmp_path: Path) -> None:
    folder = shutil.copytree(bases.sdxl(), tmp_path / "refiner")
    index = json.loads((folder / "model_index.json").read_text())
    for changes, told in (
        ({"requires_aesthetics_score": True}, "is an SDXL refiner"),
        (
            {"_class_name": "StableDiffusionXLImg2ImgPipeline"},
            "is a StableDiffusionXLImg2ImgPipeline",
        ),
    ):
        (folder / "model_index.json").write_text(json.dumps(index | changes))
        with pytest.raises(ConfigError, match=told):
            prepare(make(model={"path": str(folder)}))


def test_t5_s_vocabulary_as_deepfloyd_publishes_it(make: Make, tmp_path: Path, monkeypatch: Any) -> None:
    """A SentencePiece model and no tokenizer.json; without either, transformers would make one up."""
    import sentencepiece

    folder = shutil.copytree(bases.if_1(), tmp_path / "if")
    words = folder / "tokenizer"
    (words / "tokenizer.json").unlink()
    base = Base.find(Model(path=str(folder)))
    with pytest.raises(ConfigError, match="has no vocabulary"):
        base.load("tokenizer")
    lines = [
        f"a photo of a {colour} {thing}" for colour in ("red", "green") for thing in ("dog", "cat", "mug")
    ]
    with (words / "spiece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=file, vocab_size=30, pad_id=0, eos_id=1, unk_id=2,
            bos_id=-1, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    ids = base.load("tokenizer")("a photo of a red dog").input_ids
    model = sentencepiece.SentencePieceProcessor(model_file=str(words / "spiece.model"))
    assert ids == [*model.encode("a photo of a red dog"), 1] and 2 not in ids
    before = base.key("tokenizer")
    (words / "spiece.model").write_bytes((words / "spiece.model").read_bytes() + b" ")
    assert base.key("tokenizer") != before, "another vocabulary gives other embeddings"
    monkeypatch.setattr("dbtrain.models.pretrained._installed", lambda package: package != "sentencepiece")
    with pytest.raises(ConfigError, match="pip install sentencepiece protobuf"):
        base.load("tokenizer")


def test_dropout_of_rows_and_layers_is_a_function_of_the_step(make: Make, tmp_path: Path) -> None:
    def trained(name: str, **changes: Any) -> dict[str, Tensor]:
        cfg = configured(make, tmp_path, "sd", adapter__kind="loha", run_dir=str(tmp_path / name), **changes)
        prepare(cfg)
        return peft_folder.read(train(cfg) / "export" / "unet").tensors

    dropping = {"adapter__rank_dropout": 0.3, "adapter__module_dropout": 0.3}
    one, again, without = trained("a", **dropping), trained("b", **dropping), trained("c")
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], without[name]) for name in one)


def test_the_table_of_families_is_complete() -> None:
    tested = {Base.find(m).family.name
              for m in (Model(path=str(make())) for make in bases.ALL.values())}  # fmt: skip
    assert tested == set(families.FAMILIES)
    assert {kind for _, kind, _, _ in TABLE} == set(KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["sdxl", "if-1", "flux1", "z-image"])
def test_the_whole_job_on_two_processes(make: Make, tmp_path: Path, base: str) -> None:
    """Text encoders and accumulation on two ranks: one process gives the same."""
    changes: dict[str, Any] = {
        "adapter__text_encoder": None if base in FROZEN_TEXT else TEXT, "train__global_batch": 4,
        "adapter__token": None if base in FROZEN_TEXT else {}, "subject__token": "sks",
        "train__micro_batch": 1, "sample__prompts": ["a photo of sks dog"], "sample__images": 2,
        "sample__steps": 2,
    }  # fmt: skip
    cfg = configured(make, tmp_path, base, **changes)
    done = dbtrain("run", tmp_path / "c.yaml", ranks=2)
    assert done.returncode == 0
    original = Base.find(cfg.model)
    family = original.family
    two = formats.read(formats.find(tmp_path / "run"), family, original.skeleton)
    assert (tmp_path / "run" / "samples" / "step-000002" / "sheet.png").is_file()
    alone = cfg.model_copy(update={"run_dir": str(tmp_path / "alone")})
    train(alone)
    one = formats.read(formats.find(tmp_path / "alone"), family, original.skeleton)
    for component, state in one.items():
        for name, tensor in state.tensors.items():
            difference = (tensor - two[component].tensors[name]).abs().max()
            assert difference <= 2e-2 * tensor.abs().max() + 1e-6, (component, name)
    words = [
        word_file.read(formats.find(tmp_path / run), family, original.skeleton) for run in ("run", "alone")
    ]
    assert len(words[0]) == len(words[1]) == (base not in FROZEN_TEXT)
    for learned, alike in zip(*words, strict=True):
        assert all((rows - alike.rows[name]).abs().max() <= 1e-4 for name, rows in learned.rows.items())
    for component in two:
        assert f" parameters of {component}" in done.stderr
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert ("PeftModel" in card) == (base == "if-1"), "no stock loader reads a T5's LoRA in Diffusers' file"
    assert ("fixed_small" in card) == (base == "if-1")


def test_a_base_without_a_text_encoder_that_it_can_lack_goes_the_whole_way(
    make: Make, tmp_path: Path
) -> None:
    cfg = configured(
        make, tmp_path, "sd3-without-t5", prepare__class_dir=None, prepare__sampling__steps=2, train__steps=1,
        prepare__sampling__guidance=3.0, sample__prompts=["a dog"], sample__steps=2, sample__images=1,
    )  # fmt: skip
    prepare(cfg)
    train(cfg)
    assert sample_run(cfg).is_file()


@pytest.mark.parametrize("base", ["flux1", slow("sd3")])
def test_clip_is_trained_beside_a_frozen_t5(make: Make, tmp_path: Path, base: str) -> None:
    """Its validation images are encoded by the CLIP of the step and by the base's T5, which is not loaded."""
    cfg = configured(
        make, tmp_path, base, adapter__text_encoder=TEXT, validation__prompts=["a sks"], validation__every=1,
        adapter__token={}, subject__token="sks",
        sample__steps=2, validation__images=1,
    )  # fmt: skip
    prepare(cfg)
    run = train(cfg)
    model, original = network(cfg), Base.find(cfg.model)
    family = original.family
    assert model.text_encoders.keys() == set(family.adaptable_text) < family.text_encoders.keys()
    for name, tensor in model.trainable().items():
        if name.startswith("text_encoder"):
            assert tensor.abs().max() > 0, f"{name} was not trained"
    assert len(list(run.glob("validation/step-*/*.png"))) >= 2

    old = sampler.encode_alone(original, ["a dog"], 3.0, torch.float32)[0]
    encoders = dict(model.text_encoders.items())
    tokenizers = {name: original.load(family.text_encoders[name]) for name in encoders}
    new = sampler.reencoded(family, encoders, tokenizers, "a dog", old)
    pipe = sampler.build(original, torch.float32, torch.device("cpu"), encoders)
    wanted = sampler.encode(pipe, family, ["a dog"], 3.0)[0]
    assert new.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(new[name], tensor, atol=1e-6, rtol=1e-5)
    assert not torch.equal(new["pooled_prompt_embeds"], old["pooled_prompt_embeds"])
