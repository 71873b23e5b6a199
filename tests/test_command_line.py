"""The command line as a user meets it: help, exit codes, one line an error, no traceback."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from dbtrain.__main__ import entry
from dbtrain.models.pretrained import Pretrained
from dbtrain.runtime.errors import ConfigError
from tests import bases, eyes
from tests.conftest import Make, dbtrain, draw_photo

Refused = Callable[..., None]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Checks that a verb ends with 2 and one error line that holds `told`; the real door, in this process."""

    def check(*args: object, told: str) -> None:
        monkeypatch.setattr(sys, "argv", ["dbtrain", *map(str, args)])
        with pytest.raises(SystemExit) as left:
            entry()
        said = capsys.readouterr().err
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert left.value.code == 2
        assert "Traceback" not in said
        assert any(told in line for line in errors), said

    return check


@pytest.fixture
def config(make: Make, tmp_path: Path) -> Path:
    make()
    return tmp_path / "c.yaml"


@pytest.fixture
def shards(config: Path, prepared: Path) -> Path:
    """This test's own copy of the shards."""
    return Path(shutil.copytree(prepared, config.parent / "shards"))


def test_help_and_config_errors_import_no_torch(config: Path) -> None:
    script = (
        "import sys; sys.argv = ['dbtrain', *sys.argv[1:]]\n"
        "import dbtrain.__main__ as m\n"
        "try: m.entry()\n"
        "finally: print('torch' in sys.modules)\n"
    )
    for args, code in ((["--help"], 0), (["train", str(config), "x.y=1"], 2)):
        done = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True)
        assert (done.returncode, done.stdout.split()[-1]) == (code, "False")


def test_version(config: Path) -> None:
    assert dbtrain("--version").stdout.strip() == "0.1.0"


def test_an_unknown_verb_is_refused() -> None:
    done = dbtrain("trian", "c.yaml")
    assert done.returncode == 2
    assert "train" in done.stderr


def test_unknown_key(refused: Refused, config: Path) -> None:
    refused("train", config, "optim.lrr=1", told="unknown key 'optim.lrr'; did you mean 'optim.lr'?")


def test_wrong_type(refused: Refused, config: Path) -> None:
    refused("train", config, "train.steps=x", told="train.steps is 'x'")


def test_unknown_adapter_kind(refused: Refused, config: Path) -> None:
    refused("train", config, "adapter.kind=lorax", told="adapter.kind is 'lorax'")


def test_batches_that_do_not_divide(refused: Refused, config: Path, shards: Path) -> None:
    refused("train", config, "train.global_batch=6", "train.micro_batch=4", told="micro_batch (4)")


def test_photos_are_looked_for_before_the_base(refused: Refused, config: Path) -> None:
    refused("run", config, "model.path=/no/such/model", "prepare.photos=/no/photos", told="/no/photos")


def test_fetch_says_where_the_models_are(config: Path) -> None:
    seen = {"dino": eyes.dino(), "clip": eyes.clip()}
    done = dbtrain(
        "fetch", config, "--scoring", *(f"evaluation.{name}={path}" for name, path in seen.items())
    )
    assert done.returncode == 0
    folders = [Path(line.rpartition(": ")[2]) for line in done.stdout.splitlines()]
    assert folders == [bases.sd(), *seen.values()]


def test_missing_model(refused: Refused, config: Path) -> None:
    refused("prepare", config, "model.path=/no/such/model", told="/no/such/model")


def test_unsupported_model(refused: Refused, config: Path, tmp_path: Path) -> None:
    model = shutil.copytree(bases.sd(), tmp_path / "other")
    index = model / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "KandinskyPipeline"))
    refused("prepare", config, f"model.path={model}", told="is a KandinskyPipeline")


def test_broken_model_weights(refused: Refused, config: Path, tmp_path: Path) -> None:
    model = shutil.copytree(bases.sd(), tmp_path / "broken")
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused("prepare", config, f"model.path={model}", "prepare.class_prompt=null", told="'vae'")


def test_pickled_weights_are_not_loaded(refused: Refused, config: Path, tmp_path: Path) -> None:
    model = shutil.copytree(bases.sd(), tmp_path / "pickled")
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    refused(
        "prepare",
        config,
        f"model.path={model}",
        "prepare.class_prompt=null",
        told="vae has its weights only as a pickle",
    )


def test_no_shards(refused: Refused, config: Path) -> None:
    refused("train", config, told="manifest.json; rerun: dbtrain prepare")


def test_missing_shard(refused: Refused, config: Path, shards: Path) -> None:
    gone = next(shards.glob("instance-*.tar"))
    gone.unlink()
    refused("train", config, told=f"{gone.name} is missing")


def test_truncated_shard(refused: Refused, config: Path, shards: Path) -> None:
    cut = next(shards.glob("class-*.tar"))
    cut.write_bytes(cut.read_bytes()[:-100])
    refused("train", config, told=f"{cut.name} has")


def test_altered_shard(refused: Refused, config: Path, shards: Path) -> None:
    path = next(shards.glob("instance-*.tar"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refused("train", config, told=f"{path.name} was altered")


def test_altered_prompt_table(refused: Refused, config: Path, shards: Path) -> None:
    path = next(shards.glob("prompts-*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused("train", config, told=f"{path.name} was altered")


def test_damaged_manifest(refused: Refused, config: Path, shards: Path) -> None:
    (shards / "manifest.json").write_text('{"version": 1}')
    refused("train", config, told="manifest.json is damaged")


def test_shards_made_for_another_model(refused: Refused, config: Path, shards: Path, tmp_path: Path) -> None:
    model = shutil.copytree(bases.sd(), tmp_path / "other")
    vae = model / "vae" / "config.json"
    vae.write_text(vae.read_text().replace("0.18215", "0.5"))
    refused("train", config, f"model.path={model}", told="was made for base model '")


def test_shards_made_with_another_prompt(refused: Refused, config: Path, shards: Path) -> None:
    refused("train", config, "prepare.instance_prompt=a photo of xyz cat", told="prepare.instance_prompt")


def test_empty_photo_folder(refused: Refused, config: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused("prepare", config, f"prepare.photos={tmp_path / 'empty'}", told="there are no photos")


def test_no_photo_folder(refused: Refused, config: Path) -> None:
    refused("prepare", config, "prepare.photos=/nowhere", told="'/nowhere' is not a directory")


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\xff\xd8\xff\xe0 cut short"])
def test_unreadable_photo(refused: Refused, config: Path, tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    draw_photo(folder / "good.png", 1)
    (folder / "bad.jpg").write_bytes(content)
    refused("prepare", config, f"prepare.photos={folder}", told="bad.jpg")


def test_truncated_photo(refused: Refused, config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    whole = draw_photo(folder / "cut.jpg", 1).read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    refused("prepare", config, f"prepare.photos={folder}", "prepare.class_prompt=null", told="cut.jpg")


def test_resolution_that_the_vae_cannot_divide(refused: Refused, config: Path) -> None:
    refused("prepare", config, "prepare.resolution=60", told="prepare.resolution is 60")


def test_targets_that_match_nothing(refused: Refused, config: Path, shards: Path) -> None:
    refused("train", config, "adapter.targets=[to_q, to_nothing]", told="'to_nothing'")


def test_targets_that_cannot_be_adapted(refused: Refused, config: Path, shards: Path) -> None:
    refused("train", config, "adapter.targets=[norm1]", told="adapter.targets")


def test_missing_prepare_section(refused: Refused, config: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.yaml"
    bare.write_text("run_dir: r\nmodel: {path: tiny}\ndata: {shards: s}\n")
    refused("prepare", bare, told="no prepare section")


def test_nothing_to_export(refused: Refused, config: Path) -> None:
    refused("export", config, told="has no checkpoint to export")


def test_missing_adapter(refused: Refused, config: Path) -> None:
    refused("sample", config, "--prompt", "x", "--adapter", "/no/adapter", told="/no/adapter")


def test_nothing_to_draw(refused: Refused, config: Path) -> None:
    refused("sample", config, told="no prompt")


def test_unwritable_run_folder(refused: Refused, config: Path, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused("train", config, f"run_dir={tmp_path / 'file' / 'run'}", told=f"{tmp_path / 'file'}")


def test_full_disk(refused: Refused, config: Path, shards: Path, tmp_path: Path) -> None:
    """A file size limit stands in for a full disk: the write fails half-way, by the same path."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        refused("train", config, told=".safetensors: File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "run" / "checkpoints").glob("*")), "a half-written checkpoint has a name"


def test_a_loss_that_explodes_stops_the_run_and_keeps_the_last_good_checkpoint(
    refused: Refused, config: Path, shards: Path, tmp_path: Path
) -> None:
    refused("train", config, "optim.lr=1e30", "train.checkpoint_every=1", told="NaN or infinite at step 2")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]
    assert not (tmp_path / "run" / "DONE").exists()


def test_non_finite_latents_are_an_error(refused: Refused, config: Path, tmp_path: Path) -> None:
    model = shutil.copytree(bases.sd(), tmp_path / "nan")
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["encoder.conv_in.bias"][:] = float("inf")
    save_file(tensors, weights)
    refused(
        "prepare", config, f"model.path={model}", "prepare.class_prompt=null", told="NaN or infinite latents"
    )


def test_a_model_folder_names_no_foreign_class(tmp_path: Path) -> None:
    model = shutil.copytree(bases.sd(), tmp_path / "foreign")
    index = model / "model_index.json"
    index.write_text(index.read_text().replace('"diffusers",\n    "AutoencoderKL"', '"os",\n    "system"'))
    with pytest.raises(ConfigError, match=r"os\.system"):
        Pretrained("foreign", model, None).load("vae")


def test_pictures_that_pillow_refuses_are_named(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "tiny.png")
    done = dbtrain("prepare", config, f"prepare.photos={folder}", "prepare.class_prompt=null")
    assert done.returncode == 0
    assert "will be enlarged" in done.stderr


HARM: dict[str, Callable[[Path], object]] = {
    "no tokenizer": lambda model: (model / "tokenizer" / "tokenizer.json").unlink(),
    "empty tokenizer": lambda model: (model / "tokenizer" / "tokenizer.json").write_text("{}"),
    "weights of other names": lambda model: rename_weights(model / "text_encoder" / "model.safetensors"),
    "cut weights": lambda model: cut(model / "text_encoder" / "model.safetensors"),
    "another class": lambda model: edit(model / "model_index.json", '"CLIPTextModel"', '"T5EncoderModel"'),
    "an unknown class": lambda model: edit(model / "model_index.json", '"AutoencoderKL"', '"Nonsense"'),
    "no index": lambda model: (model / "model_index.json").write_text("[]"),
    "no vae settings": lambda model: (model / "vae" / "config.json").write_text("{}"),
    "no scale": lambda model: edit(model / "vae" / "config.json", '"scaling_factor": 0.18215', '"x": 1'),
    "another width": lambda model: edit(
        model / "unet" / "config.json", '"cross_attention_dim": 64', '"cross_attention_dim": 48'
    ),
    "more channels": lambda model: edit(
        model / "unet" / "config.json", '"in_channels": 4', '"in_channels": 9'
    ),
    "null text encoder": lambda model: (model / "text_encoder" / "config.json").write_text("null"),
    "no token limit": lambda model: (model / "tokenizer" / "tokenizer_config.json").write_text("{}"),
}


def edit(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def rename_weights(path: Path) -> None:
    save_file({f"renamed.{name}": tensor for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("class_prompt", ["null", "a photo of a dog"])
def test_an_incomplete_or_mismatched_base_is_refused(
    refused: Refused, config: Path, tmp_path: Path, harm: str, class_prompt: str
) -> None:
    """With class images the whole pipeline is loaded, without them only what encodes."""
    model = shutil.copytree(bases.sd(), tmp_path / "base")
    HARM[harm](model)
    refused("prepare", config, f"model.path={model}", f"prepare.class_prompt={class_prompt}", told="base")
    assert not (tmp_path / "shards" / "manifest.json").exists()


def test_a_scheduler_that_makes_no_sense_is_refused(
    refused: Refused, config: Path, shards: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(bases.sd(), tmp_path / "base")
    edit(model / "scheduler" / "scheduler_config.json", '"scaled_linear"', '"foo"')
    refused("train", config, f"model.path={model}", told="scheduler_config.json")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seed=2024-99-99", "seed is '2024-99-99'"),
        ("seed=99999999999999999999", "seed is 99999999999999999999"),
        ("sample.steps=1500", "sample.steps is 1500"),
        ("prepare.photos=~nouser/x", "~nouser"),
        ("prepare.photos=$NOWHERE/x", "the environment variable NOWHERE is not set"),
        ("data.shards=/etc/passwd", "/etc/passwd"),
        ("train.learning_rate=1", "did you mean 'optim.lr'?"),
        ('run_dir="a\\0b"', "run_dir"),
    ],
)
def test_odd_values_are_refused(refused: Refused, config: Path, override: str, told: str) -> None:
    refused("prepare", config, override, told=told)


def test_a_photo_that_links_to_nowhere_is_named(refused: Refused, config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    draw_photo(folder / "good.png", 1)
    (folder / "gone.jpg").symlink_to("/nowhere.jpg")
    refused("prepare", config, f"prepare.photos={folder}", told="gone.jpg links to")


def test_a_photo_too_thin_to_crop_is_named(refused: Refused, config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (1, 30_000)).save(folder / "thin.png")
    refused("prepare", config, f"prepare.photos={folder}", told="thin.png is 1 x 30000 px")


def test_train_notices_other_photos(refused: Refused, config: Path, shards: Path) -> None:
    refused("train", config, "prepare.photos=/other", told="prepare.photos")


def test_train_notices_another_family(refused: Refused, config: Path, shards: Path) -> None:
    refused("train", config, "model.family=flux", told="model.family is 'flux'; choose from auto, sd")
    refused("train", config, "model.family=sdxl", told="of the family 'sd'; use auto")


@pytest.mark.parametrize("mix", ["x:abc", "x:nan", "x:", "+", "x:1+x:2", ":1"])
def test_mixes_that_make_no_sense_are_refused(refused: Refused, config: Path, mix: str) -> None:
    refused("sample", config, "--prompt", "x", "--adapter", mix, told=f"adapter '{mix}'")
