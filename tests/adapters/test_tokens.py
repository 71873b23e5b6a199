"""Learned words: trained along with an adapter, kept exactly, and read by everyone who is to read them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import embedding, normalize

from dbtrain.adapters import tokens
from dbtrain.adapters.formats import word_file
from dbtrain.adapters.tokens import Word
from dbtrain.config import Config, Model
from dbtrain.config.adapter import Token
from dbtrain.doctor.base_model import adapter
from dbtrain.doctor.case import Case
from dbtrain.export.export import export
from dbtrain.models.base import Base
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.hashing import sha256_of
from dbtrain.runtime.run_folder import RunFolder
from dbtrain.sample.pipeline import AdapterPipeline
from dbtrain.train import fingerprint, loop, segments
from tests import bases, runs
from tests.conftest import Make, train
from tests.networks import build, first_batch

PROMPT = "a photo of sks dog"


def base(name: str) -> Base:
    return Base.find(Model(path=str(bases.ALL[name]())))


def learning(name: str = "sd", vectors: int = 1, init: str | None = None) -> tuple[Any, Any, Any]:
    """A text encoder that learns `sks`, its tokenizer, and the table that it had."""
    found = base(name)
    encoder, tokenizer = found.load("text_encoder"), found.load("tokenizer")
    table = encoder.get_input_embeddings().weight
    tokens.learn(encoder, tokenizer, ["sks"], Token(vectors=vectors, init=init))
    return encoder, tokenizer, table


@pytest.mark.parametrize("name", ["sd", "if-1"])  # the table of a T5 has rows for more ids than its tokenizer
def test_only_the_word_is_learned_and_its_length_stays(name: str) -> None:
    encoder, tokenizer, table = learning(name, 2)
    rows = tokens.trained({"text_encoder": encoder})["text_encoder"]
    before = rows().detach().clone()
    optimizer = torch.optim.Adam([p for p in encoder.parameters() if p.requires_grad], lr=0.05)
    assert [p.shape for group in optimizer.param_groups for p in group["params"]] == [before.shape]
    ids = tokenizer([PROMPT], return_tensors="pt").input_ids
    encoder(ids)[0].square().mean().backward()
    optimizer.step()
    assert (rows() - before).norm() > 1e-2 * before.norm()
    torch.testing.assert_close(rows().norm(dim=1), before.norm(dim=1))

    new = torch.tensor(tokenizer.convert_tokens_to_ids(["sks", "sks_1"]))
    known = torch.arange(int(new[0]))
    read = encoder.get_input_embeddings()(torch.cat([known, new])[None])[0]
    torch.testing.assert_close(read[known], embedding(known, table), rtol=0, atol=0)
    torch.testing.assert_close(read[new], rows(), rtol=0, atol=0)


def test_the_embeddings_start_from_what_the_words_are_now() -> None:
    found = base("sd")
    now = found.load("tokenizer")("sks", add_special_tokens=False).input_ids
    assert len(now) == 3
    for vectors, init, shares in (
        (1, None, [now]), (2, None, [now[:1], now[1:]]), (4, None, [now[:1], now[:1], now[1:2], now[2:]]),
        (1, "sks", [now]), (1, "photo", [found.load("tokenizer")("photo").input_ids[1:-1]]),
    ):  # fmt: skip
        encoder, _, table = learning("sd", vectors, init)
        rows = tokens.trained({"text_encoder": encoder})["text_encoder"]()
        means = torch.stack([table[share].mean(0) for share in shares])
        torch.testing.assert_close(normalize(rows), normalize(means))
        lengths = torch.stack([table[share].norm(dim=1).mean() for share in shares])
        torch.testing.assert_close(rows.norm(dim=1), lengths)


def test_a_tokenizer_reads_the_word_and_nothing_else_as_its_tokens() -> None:
    tokenizer = base("sd").load("tokenizer")
    before = tokenizer("a photo of desks").input_ids
    new = tokens.teach(tokenizer, {"sks": 3, "<x>": 1})
    for text, expected in (
        ("sks", new[:3]), ("a SKS", new[:1]), ("sks sks_1 sks_2", new[:3]), ("<x> sks", [new[3], *new[:3]]),
        ("a photo of desks", []),
    ):  # fmt: skip
        for ids in (
            tokenizer(text).input_ids,
            tokenizer([text, text], return_tensors="pt").input_ids[1].tolist(),
        ):
            assert [number for number in ids if number in new] == expected, text
    assert tokenizer("a photo of desks").input_ids == before
    with pytest.raises(ConfigError, match="has a token 'sks_1' already"):
        tokens.teach(tokenizer, {"sks_1": 1})


def test_several_subjects_learn_a_word_each(tmp_path: Path) -> None:
    found = base("sd")
    encoder, tokenizer = found.load("text_encoder"), found.load("tokenizer")
    tokens.learn(encoder, tokenizer, ["sks", "ohwx"], Token(vectors=2))
    rows = tokens.trained({"text_encoder": encoder})
    (tmp_path / "tokens.safetensors").write_bytes(word_file.checkpoint(["sks", "ohwx"], rows))
    words = word_file.read(tmp_path, found.family, found.skeleton)
    assert [word.text for word in words] == ["sks", "ohwx"]
    assert torch.equal(torch.cat([word.rows["text_encoder"] for word in words]), rows["text_encoder"]())
    ids = tokens.teach(found.load("tokenizer"), {"sks": 2, "ohwx": 2})
    assert tokenizer("ohwx sks").input_ids[1:-1] == [*ids[2:], *ids[:2]]


def test_the_pooled_output_is_not_taken_at_the_word() -> None:
    """Older configs of CLIP tell it to take the token with the highest number."""
    outputs = []
    for end in (2, None):
        found = base("flux1")
        encoder, tokenizer = found.load("text_encoder"), found.load("tokenizer")
        encoder.eos_token_id = end or encoder.eos_token_id
        tokens.learn(encoder, tokenizer, ["sks"], Token())
        outputs.append(encoder(tokenizer([PROMPT], return_tensors="pt").input_ids).pooler_output)
    assert torch.equal(*outputs)


def configured(make: Make, prepared: Path, **changes: Any) -> Config:
    settings: dict[str, Any] = {
        "data__shards": str(prepared), "adapter__token": {"vectors": 2}, "optim__token_lr": 0.1,
        "train__global_batch": 2, "train__micro_batch": 2, "train__steps": 2, "train__checkpoint_every": 1,
    }  # fmt: skip
    return make(**settings | changes)


@pytest.fixture
def cfg(make: Make, prepared: Path) -> Config:
    return configured(make, prepared)


def test_a_run_resumes_exactly_and_shows_the_word(make: Make, prepared: Path, tmp_path: Path) -> None:
    pictures = {"validation__prompts": [PROMPT], "validation__images": 1, "sample__guidance": 1.0}
    cfg = configured(make, prepared, adapter__text_encoder={"rank": 2}, **pictures)
    whole = train(cfg)
    stopped = cfg.model_copy(update={"run_dir": str(tmp_path / "stopped")})
    with pytest.raises(Exception, match="as requested"):
        loop.train(stopped, until=1)
    train(stopped)
    folders = [RunFolder(run).checkpoints()[-1] for run in (whole, tmp_path / "stopped")]
    ours, again = map(runs.tree, folders)
    for name in ours.keys() - {"state.json"}:
        assert ours[name] == again[name], name
    first, last = (load_file(path / "tokens.safetensors") for path in RunFolder(whole).checkpoints())
    assert last.keys() == {"text_encoder.direction", "text_encoder.norm"}
    assert not torch.equal(first["text_encoder.direction"], last["text_encoder.direction"])
    assert torch.equal(first["text_encoder.norm"], last["text_encoder.norm"])
    shown = [RunFolder(whole).validation_sheet(step).parent / "00-seed0.png" for step in (0, 2)]
    assert shown[0].read_bytes() != shown[1].read_bytes()
    with pytest.raises(ConfigError, match=r"adapter\.token\.vectors was 2, is now 3"):
        loop.train(cfg.override("adapter.token.vectors=3"))


@pytest.mark.parametrize("precision", ["bf16", "pure-bf16", "fp16"])
def test_the_word_is_learned_in_every_precision(cfg: Config, prepared: Path, precision: str) -> None:
    grads = []
    for one in ("fp32", precision):
        settings = cfg.override(f"train.precision={one}")
        model = build(settings, prepared)
        with model.working_copies.in_place(), torch.autocast("cpu", torch.bfloat16, enabled=one == "bf16"):
            model(first_batch(settings, model.family)).sum().backward()
        grads.append(model.words["text_encoder"].direction.grad)
    assert grads[1] is not None and grads[1].dtype == torch.float32
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0.1 * grads[0].abs().max().item())


def test_runs_without_a_word_stay_what_they_were(make: Make) -> None:
    plain = make()
    assert not any("token" in name for name in fingerprint.of_settings(plain, {}))
    assert not any("token" in name for name in segments.settings(plain))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, photos: Path, class_dir: Path, prepared: Path) -> Path:
    """The run folder of a finished run."""
    from tests.conftest import config_in

    folder = tmp_path_factory.mktemp("words")
    make: Any = lambda **changes: config_in(folder, photos, class_dir, **changes)  # noqa: E731
    return train(configured(make, prepared, export__formats=["diffusers", "kohya", "peft"]))


def test_every_file_of_a_run_brings_the_word(exported: Path, tmp_path: Path) -> None:
    out, found = exported / "export", base("sd")
    shutil.copy(out / "run.safetensors", tmp_path)  # kohya's, with nothing beside it
    paths = [out / "pytorch_lora_weights.safetensors", out / "run.safetensors", tmp_path / "run.safetensors",
             out / "unet", out, RunFolder(exported).checkpoints()[-1]]  # fmt: skip
    words = [word for path in paths for word in word_file.read(path, found.family, found.skeleton)]
    assert [word.text for word in words] == ["sks"] * len(paths)
    for word in words[1:]:
        assert torch.equal(word.rows["text_encoder"], words[0].rows["text_encoder"])
    inside = load_file(out / "run.safetensors")
    assert inside["bundle_emb.sks.string_to_param.*"].shape == (2, bases.WIDTH)
    card = (out / "README.md").read_text()
    assert 'load_textual_inversion("embeddings/sks.safetensors", token="sks")' in card
    assert "`embedding:sks`" in card


def test_a_pipeline_knows_the_words_of_the_adapters_in_use(exported: Path) -> None:
    pipe = AdapterPipeline.load(str(bases.sd()))
    encoded = lambda: pipe.family.encode_prompt(pipe.pipe, PROMPT, False)["prompt_embeds"]  # noqa: E731
    bare = encoded()
    pipe.add("one", exported)
    pipe.add("other", exported / "checkpoints" / "step-000001")
    assert torch.equal(encoded(), bare)
    pipe.use("one")
    one = encoded()
    pipe.use({"one": 0.5})
    assert torch.equal(encoded(), one), "a word has no scale"
    pipe.use("other")
    assert not torch.equal(encoded(), one) and not torch.equal(encoded(), bare)
    with pytest.raises(ConfigError, match="two of the adapters have learned the word 'sks'"):
        pipe.use({"one": 1.0, "other": 1.0})
    pipe.swap("other", exported)
    assert torch.equal(encoded(), one)
    pipe.remove("other")
    assert torch.equal(encoded(), bare)


def test_converting_keeps_the_word(exported: Path, tmp_path: Path, make: Make) -> None:
    cfg = make(export__formats=["kohya"])
    export(cfg, adapter=exported / "export" / "pytorch_lora_weights.safetensors", out=tmp_path / "out")
    found = base("sd")
    word, *more = word_file.read(tmp_path / "out" / "run.safetensors", found.family, found.skeleton)
    assert not more and (tmp_path / "out" / "embeddings" / "sks.safetensors").is_file()
    expected = load_file(exported / "export" / "embeddings" / "sks.safetensors")["sks"]
    assert torch.equal(word.rows["text_encoder"], expected)


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [({"bundle_emb.sks.t5xxl": torch.ones(1, 64)}, "its tensor sks.t5xxl is for no text encoder of"),
     ({"bundle_emb./tmp/x.string_to_param.*": torch.ones(1, 64)}, "'/tmp/x' is not one word without"),
     ({"sks": torch.ones(1, 32)}, "have 32 values; those of the base's text_encoder have 64"),
     ({"sks": torch.full((1, 64), torch.nan)}, "are NaN or infinite"),
     ({"clip_g": torch.ones(1, 64)}, "its tensor clip_g is for no text encoder of sd models")],
)  # fmt: skip
def test_a_word_of_another_base_is_refused(tmp_path: Path, tensors: dict[str, Any], problem: str) -> None:
    (tmp_path / "embeddings").mkdir()
    adapter = tmp_path / "it.safetensors"
    save_file(tensors if "bundle" in min(tensors) else {"x": torch.ones(1)}, adapter)
    if "bundle" not in min(tensors):
        save_file(tensors, tmp_path / "embeddings/sks.safetensors", {word_file.ADAPTERS: sha256_of(adapter)})
    found = base("sd")
    with pytest.raises(ConfigError, match=problem):
        word_file.read(adapter, found.family, found.skeleton)


@pytest.mark.parametrize(
    ("name", "tensors"),
    [("easynegative", {"emb_params": torch.ones(8, 64)}), ("sks", {"sks": torch.ones(1, 32)}),
     ("sks", {"clip_l": torch.ones(1, 64), "clip_g": torch.ones(1, 64)}),
     ("a.b", {"a.b": torch.ones(1, 64)})],
)  # fmt: skip
def test_embeddings_that_are_no_words_of_the_base_are_not_the_adapter_s(
    tmp_path: Path, name: str, tensors: dict[str, Any]
) -> None:
    (tmp_path / "embeddings").mkdir()
    save_file(tensors, tmp_path / "embeddings" / f"{name}.safetensors")
    found, text = base("sd"), {"text_encoder": torch.ones(1, bases.WIDTH)}
    save_file({"x": torch.ones(1)}, adapter := tmp_path / "it.safetensors")
    assert word_file.read(adapter, found.family, found.skeleton) == []
    word_file.write(tmp_path, found.family, [Word("mine", text)])  # of no adapter in particular
    assert [word.text for word in word_file.read(adapter, found.family, found.skeleton)] == ["mine"]


def test_adapters_in_one_folder_have_words_of_their_own(tmp_path: Path, caplog: Any) -> None:
    """Programs list many adapters in one folder, and exports of several runs may have the same."""
    found, names = base("sd"), ("one", "two", "none")
    paths = {name: tmp_path / f"{name}.safetensors" for name in names}
    for number, path in enumerate(paths.values()):
        save_file({"x": torch.full((1,), float(number))}, path)

    def write(text: str, value: float, *names: str) -> None:
        word = Word(text, {"text_encoder": torch.full((1, bases.WIDTH), value)})
        word_file.write(tmp_path, found.family, [word], [paths[name] for name in names])

    def read() -> list[list[str]]:
        words = [word_file.read(path, found.family, found.skeleton) for path in paths.values()]
        return [[word.text for word in one] for one in words]

    write("sks", 1.0, "one"), write("ohwx", 1.0, "two")
    assert read() == [["sks"], ["ohwx"], []]
    write("sks", 1.0, "two")  # the same word in another format's file
    assert read() == [["sks"], ["ohwx", "sks"], []]
    assert not caplog.text
    write("sks", 2.0, "two")  # a word of its own
    assert read() == [[], ["ohwx", "sks"], []]
    assert f"was the word of {paths['one']}, which loses it" in caplog.text and "left out" not in caplog.text
    save_file({"x": torch.full((1,), 9.0)}, paths["two"])
    assert read() == [[], [], []]
    assert f"ohwx.safetensors is left out: {paths['two']} is not the file it is for" in caplog.text


def test_words_of_two_text_encoders_are_named_as_programs_name_them() -> None:
    family = base("sdxl").family
    word = Word("x", {"text_encoder": torch.ones(1, 64), "text_encoder_2": torch.zeros(1, 64)})
    found = word_file.bundled(family, [word])
    assert {name: rows.mean().item() for name, rows in found.items()} == {
        "bundle_emb.x.clip_l": 1.0, "bundle_emb.x.clip_g": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "problem"),
    [({"subject__token": None}, "learns the word in subject.token, which is not set"),
     ({"subject__token": "a b"}, "'a b'; use one word"),
     ({"subject__token": "sku"}, "'sku', which is not in prepare.instance_prompt")],
)  # fmt: skip
def test_a_word_that_cannot_be_learned_is_refused(make: Make, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        make(adapter__token={}, **changes)


def test_words_that_tokenizers_have_or_do_not_find_are_refused(make: Make) -> None:
    case = Case(make(adapter__token={}))
    case.base = base("sd")
    assert not [line for line in adapter(case) if line.level == "error"]
    known = next(word for word in case.base.load("tokenizer").get_vocab() if word.isalpha() and len(word) > 1)
    case.cfg = case.cfg.override(f"subject.token={known}", f"prepare.instance_prompt=a {known} dog")
    assert [line for line in adapter(case) if "already" in line.what]
    with pytest.raises(ConfigError, match=f"has a token '{known}' already"):
        tokens.read_again(case.base, [known], Token(), [f"a {known} dog"])
    with pytest.raises(ConfigError, match="of text_encoder finds the word 'xyz' in no prompt"):
        tokens.read_again(case.base, ["xyz"], Token(), ["a photo of xyzs", "xy z"])


def test_a_family_whose_text_encoders_stay_frozen_refuses_words() -> None:
    found = base("z-image")
    with pytest.raises(
        ConfigError, match=r"adapter\.token: the text encoders of z-image models are too large"
    ):
        found.check_trains(Config.model_fields["adapter"].default.model_copy(update={"token": Token()}))
