"""evaluate: the paper's scores computed a second way, words for subjects, ranks, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel, ViTModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dbtrain.config import Config, Evaluation, Prepare, Subject, subject_words
from dbtrain.config.subject_words import SubjectWords
from dbtrain.evaluate import dino_clip, encoders, evaluate, tiny_judge
from dbtrain.evaluate import prompts as subject
from dbtrain.evaluate import scores as fidelity
from dbtrain.models.base import Base
from dbtrain.prepare.prepare import prepare
from dbtrain.runtime.errors import ConfigError
from dbtrain.runtime.run_folder import RunFolder
from dbtrain.sample.sample import Kept
from dbtrain.tiny import world
from tests import eyes
from tests.conftest import ROOT, Make, config_in, dbtrain, draw_photo, train

pytestmark = pytest.mark.xdist_group("evaluate")  # they share what takes long to make

PROMPTS = ["a {} in the snow", "a photo of sks dog on a beach", "a {} at night"]
WITHOUT = ["a dog in the snow", "a photo of dog on a beach", "a dog at night"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, photos: Path, class_dir: Path) -> Config:
    """A run of a random base, with two checkpoints, and small random models to look at it."""
    cfg = config_in(
        tmp_path_factory.mktemp("ran"), photos, class_dir, evaluation__dino=str(eyes.dino()),
        evaluation__clip=str(eyes.clip()), evaluation__prompts=PROMPTS, evaluation__images=3,
        evaluation__class_images=4, evaluation__batch=5, optim__lr=0.02,
    )  # fmt: skip
    prepare(cfg)
    train(cfg)
    return cfg


def square(picture: Image.Image, resize: int) -> np.ndarray:
    """The middle 32 px of a picture, its short side resized first; (32, 32, 3) in [0, 1]."""
    width, height = picture.size
    size = (resize, resize * height // width) if width < height else (resize * width // height, resize)
    pixels = np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BICUBIC), dtype=np.float64)
    top, left = (pixels.shape[0] - 32) // 2, (pixels.shape[1] - 32) // 2
    return pixels[top : top + 32, left : left + 32] / 255


its_dino = cache(lambda: ViTModel.from_pretrained(eyes.dino(), add_pooling_layer=False).eval())
its_clip = cache(lambda: CLIPModel.from_pretrained(eyes.clip()).eval())
its_words = cache(lambda: AutoTokenizer.from_pretrained(eyes.clip()))


@cache
def by_dino(path: Path) -> np.ndarray:
    values = (square(Image.open(path), 36) - eyes.DINO_MEAN) / eyes.DINO_STD
    with torch.no_grad():
        out = its_dino()(torch.tensor(values, dtype=torch.float32).permute(2, 0, 1)[None])
    return out.last_hidden_state[0, 0].double().numpy()


@cache
def by_clip(path: Path) -> np.ndarray:
    values = (square(Image.open(path), 32) - eyes.CLIP_MEAN) / eyes.CLIP_STD
    pixels = torch.tensor(values, dtype=torch.float32).permute(2, 0, 1)[None]
    ids = its_words()(["a dog"], return_tensors="pt")
    with torch.no_grad():
        return its_clip()(input_ids=ids.input_ids, pixel_values=pixels).image_embeds[0].double().numpy()


@cache
def read_by_clip(text: str) -> np.ndarray:
    ids = its_words()([text], return_tensors="pt")
    with torch.no_grad():
        return (
            its_clip()(input_ids=ids.input_ids, pixel_values=torch.zeros(1, 3, 32, 32)).text_embeds[0].numpy()
        )


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def scored_by_dino_and_clip(cfg: Config, adapter: str, out: Path) -> fidelity.Scores | None:
    return dino_clip.score(dino_clip.draw(cfg, adapter, out, None, Kept()))


def mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found)


@pytest.mark.slow
def test_scores_equal_a_direct_computation(ran: Config, photos: Path) -> None:
    """Picture by picture, pair by pair, with the models' own forward passes."""
    done = dbtrain("evaluate", Path(ran.run_dir).parent / "c.yaml")
    assert done.returncode == 0 and "DINO, adapter: subject fidelity" in done.stdout
    out = Path(ran.run_dir) / "scores"
    values = json.loads((out / "scores.json").read_text())
    real = sorted(photos.glob("*.jpg"))
    groups = {
        "": [sorted((out / "subject").glob(f"00-{p:02d}-*.png")) for p in range(3)],
        "_base": [sorted((out / "base" / "subject").glob(f"00-{p:02d}-*.png")) for p in range(3)],
    }
    for end, prompts in groups.items():
        pictures = [path for prompt in prompts for path in prompt]
        assert len(pictures) == 9
        for name, embed in (("dino", by_dino), ("clip_i", by_clip)):
            seen, true = [embed(path) for path in pictures], [embed(path) for path in real]
            expected = mean(cosine(a, b) for a in seen for b in true)
            assert values[name + end] == pytest.approx(expected, abs=1e-5), name + end
            ceiling = mean(cosine(a, b) for a, b in combinations(true, 2))
            assert values[f"{name}_real"] == pytest.approx(ceiling, abs=1e-5)
        told = mean(cosine(by_clip(path), read_by_clip(text))
                    for text, prompt in zip(WITHOUT, prompts, strict=True) for path in prompt)  # fmt: skip
        assert values["clip_t" + end] == pytest.approx(told, abs=1e-5)
        varied = mean(1 - cosine(by_dino(a), by_dino(b)) for p in prompts for a, b in combinations(p, 2))
        assert values["diversity" + end] == pytest.approx(varied, abs=1e-5)
    for end, folder in (("", out / "class"), ("_base", out / "base" / "class")):
        drawn = sorted(folder.glob("*seed*.png"))
        assert len(drawn) == 4
        expected = mean(cosine(by_dino(a), by_dino(b)) for a in drawn for b in real)
        assert values["preservation" + end] == pytest.approx(expected, abs=1e-5)
    assert values["dino"] != values["dino_base"] and values["clip_t"] != values["clip_t_base"]
    assert (values["prompts"], values["images"], values["photos"]) == (3, 3, len(real))
    assert values["labels"]["clip_t"] == "CLIP-T, adapter: prompt fidelity"
    assert (
        "short side 36 px bicubic antialiased, centre 32 px, mean 0.4/0.5/0.6" in values["dino_preprocessing"]
    )
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.height > 4 * 128


@pytest.mark.slow
def test_a_second_call_does_nothing_and_two_ranks_score_alike(ran: Config, tmp_path: Path) -> None:
    config, out = Path(ran.run_dir).parent / "c.yaml", Path(ran.run_dir) / "scores"
    list(evaluate.evaluate(ran))
    before = (out / "scores.json").read_bytes()
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
    assert "expected" in "".join(evaluate.evaluate(ran, out / "scores.json"))
    assert stamps == {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
    (out / "scores.json").unlink()
    (out / "subject" / "00-01-seed1001.png").unlink()
    assert dbtrain("evaluate", config, ranks=2).returncode == 0
    assert (out / "scores.json").read_bytes() == before, "two ranks, and one picture drawn again"


@pytest.mark.slow
def test_other_models_or_photos_are_scored_anew(ran: Config) -> None:
    run = Path(ran.run_dir)
    assert scored_by_dino_and_clip(ran, ran.run_dir, run / "scores")
    first = json.loads((run / "scores" / "scores.json").read_text())
    narrow = ran.evaluation.model_copy(update={"prompts": ("a {} in the rain", *PROMPTS[1:])})
    assert scored_by_dino_and_clip(ran.model_copy(update={"evaluation": narrow}), ran.run_dir, run / "scores")
    second = json.loads((run / "scores" / "scores.json").read_text())
    assert second["key"] != first["key"] and second["clip_t"] != first["clip_t"]
    assert scored_by_dino_and_clip(ran, ran.run_dir, run / "scores") == fidelity.Scores.of(first)


def test_one_photo_has_no_ceiling() -> None:
    one, several = torch.eye(3)[:1], torch.eye(3)
    assert fidelity.among(one) is None and fidelity.among(several) == 0
    drawn = several[None].expand(2, 3, 3)
    seen = fidelity.Seen(one, drawn, drawn, several, several)
    scores = fidelity.scored(seen, seen, several[:2])
    assert scores.dino_real is None and scores.diversity == 1 and scores.dino == pytest.approx(1 / 3)
    assert "-" in next(
        line for line in fidelity.table(fidelity.shown(scores)).splitlines() if "DINO, photos" in line
    )


def test_clip_sees_pictures_as_its_own_processor_does() -> None:
    eye = encoders.clip(str(eyes.clip()))
    own = CLIPImageProcessorPil.from_pretrained(eyes.clip())
    for size in ((90, 61), (40, 200), (32, 32), (33, 32), (20, 31)):
        pixels = np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        picture = Image.fromarray(pixels)
        theirs = own(picture, return_tensors="pt")["pixel_values"][0]
        assert torch.allclose(eye.view(picture), theirs, atol=1e-5), size


# The embedded base: its own judge.


@pytest.mark.slow
def test_without_class_images_the_class_becomes_the_subject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the judge sees it. With them it stays: see the quickstart in tests/test_readme.py."""
    monkeypatch.setattr(tiny_judge, "CLASS_IMAGES", 12)
    monkeypatch.setattr(tiny_judge, "SUBJECT_IMAGES", 2)
    world.main(tmp_path / "photos", "mug")
    cfg = Config.load(ROOT / "configs" / "quickstart.yaml", [
        f"run_dir={tmp_path / 'run'}", f"data.shards={tmp_path / 'shards'}", "train.steps=16",
        f"prepare.photos={tmp_path / 'photos'}", "prepare.class_prompt=null", "loss.prior=none",
        "sample.steps=4", "sample.batch=8", "train.checkpoint_every=16", "train.micro_batch=4",
        "validation.prompts=[]",
    ])  # fmt: skip
    prepare(cfg)
    train(cfg)
    scores = tiny_judge.score(
        tiny_judge.draw(cfg, cfg.run_dir, tmp_path / "scores", tmp_path / "base", Kept())
    )
    assert scores
    assert scores.likeness > scores.likeness_base + 0.05
    assert scores.drift > scores.drift_base + 0.2
    assert scores.diversity < scores.diversity_base


def test_the_embedded_base_has_its_own_judge_unless_a_dino_is_asked_for(make: Make) -> None:
    assert evaluate.judge_of(make(model__path="tiny")) is evaluate.CLASSIFIER
    assert evaluate.judge_of(make(model__path="tiny", evaluation__dino="d")) is evaluate.DINO_AND_CLIP
    assert evaluate.judge_of(make()) is evaluate.DINO_AND_CLIP


# Checkpoints.


@pytest.mark.slow
def test_checkpoints_are_scored_and_one_is_suggested(ran: Config) -> None:
    config, run = Path(ran.run_dir).parent / "c.yaml", Path(ran.run_dir)
    done = dbtrain("evaluate", config, "--checkpoints", ranks=2)
    assert done.returncode == 0
    rows = json.loads((run / "scores" / "checkpoints.json").read_text())
    assert [(row["step"], row["exported"]) for row in rows] == [(2, False), (4, True)]
    assert sum(row["suggested"] for row in rows) == 1
    chosen = next(row for row in rows if row["suggested"])
    assert f"suggested: {chosen['name']}, with the highest dino" in done.stdout
    assert "only 2 to choose from" in done.stdout
    for row in rows:
        alone = fidelity.Scores.load(run / "scores" / f"step-{row['step']:06d}" / "scores.json")
        assert fidelity.Scores.of(row) == alone
    assert rows[0]["dino"] != rows[1]["dino"] and rows[0]["dino_base"] == rows[1]["dino_base"]
    plain = scored_by_dino_and_clip(ran, ran.run_dir, run / "scores")
    assert plain == fidelity.Scores.of(rows[1]), "the export is the last checkpoint"
    with Image.open(run / "scores" / "checkpoints.png") as plot:
        assert np.asarray(plot).std() > 10
    shutil.rmtree(run / "checkpoints")
    names = [(one.name, one.step) for one in evaluate.candidates(ran, Base.find(ran.model), RunFolder(run))]
    assert names == [("export", None)], "an export of a checkpoint that is not kept stays a candidate"


def test_a_run_that_was_not_trained_is_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a checkpoint nor an export"):
        list(evaluate.checkpoints(make()))
    with pytest.raises(ConfigError, match="neither a file nor a run folder with an export"):
        list(evaluate.evaluate(make(evaluation__dino=str(eyes.dino()), evaluation__clip=str(eyes.clip()))))
    assert not (tmp_path / "run").exists(), "refused before anything is drawn"


def test_without_matplotlib_there_is_a_message_and_no_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"name": "a", "dino": 0.5, "clip_t": 0.3, "suggested": True}]
    path = tmp_path / "checkpoints.png"
    with monkeypatch.context() as absent:
        absent.setitem(sys.modules, "matplotlib.figure", None)
        assert "run: pip install 'dbtrain[benchmarks]'" in evaluate._plot(
            rows, evaluate.DINO_AND_CLIP.rule, path
        )
    assert not path.exists()
    assert evaluate._plot(rows, evaluate.DINO_AND_CLIP.rule, path) == f"plot: {path}"
    with Image.open(path) as plot:
        assert np.asarray(plot).std() > 10


# Words.


def words(instance: str, of_class: str | None = None, **settings: str) -> SubjectWords:
    prompts = Prepare(photos="p", instance_prompt=instance, class_prompt=of_class)
    return subject_words.of(prompts, Subject(**settings))


@pytest.mark.parametrize(
    ("about", "token", "kind", "of_class"),
    [
        (words("a photo of sks dog", "a photo of a dog"), "sks", "dog", "a photo of a dog"),
        (words("a sks stuffed animal", "a stuffed animal"), "sks", "stuffed animal", "a stuffed animal"),
        (words("a drawing of zwx fox toy", "a drawing of a toy"), "zwx fox", "toy", "a drawing of a toy"),
        (words("a photo of sks dog", token="sks"), "sks", "dog", "a photo of a dog"),
        (words("a photo of sks owl", token="sks"), "sks", "owl", "a photo of an owl"),
        (words("a photo of sks", token="sks", class_word="dog"), "sks", "dog", "a photo of a dog"),
        (words("sks", "dog", class_word="dog"), "sks", "dog", "dog"),
    ],
)
def test_the_words_for_a_subject_are_read_from_the_prompts(
    about: SubjectWords, token: str, kind: str, of_class: str
) -> None:
    assert (about.token, about.kind, about.class_prompt) == (token, kind, of_class)


@pytest.mark.parametrize(
    ("instance", "of_class", "settings", "told"),
    [
        ("a photo of sks dog", None, {}, "set subject.token"),
        ("a photo of a dog", "a photo of a dog", {}, "set subject.token"),
        ("my photo of sks dog", "a photo of a dog", {}, "set subject.token"),
        ("a photo of sks", "a photo of a dog", {}, "set subject.class_word"),
        ("a photo of sks dog", None, {"token": "zwx"}, "subject.token is 'zwx'"),
    ],
)
def test_words_that_cannot_be_told_are_asked_for(
    instance: str, of_class: str | None, settings: dict[str, str], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        words(instance, of_class, **settings)


def test_prompts_without_the_token_are_what_clip_reads() -> None:
    about = words("a photo of sks dog", "a photo of a dog")
    assert about.put("a {} in a box") == ("a sks dog in a box", "a dog in a box")
    assert about.put("a red sks dog") == ("a red sks dog", "a red dog")
    for prompt in ("a dog in a box", "asks dogs"):
        with pytest.raises(ConfigError, match="is not about the subject"):
            about.put(prompt)
    assert len(subject.prompts(about, Evaluation())) == 10


def test_likeness_is_of_the_images_and_not_of_their_sheet(make: Make, tmp_path: Path) -> None:
    cfg = make(evaluation__dino=str(eyes.dino()), evaluation__clip=str(eyes.clip()))
    (tmp_path / "subject").mkdir()
    for number, name in enumerate(("00-00-seed0", "00-01-seed0", "sheet")):
        draw_photo(tmp_path / "subject" / f"{name}.png", number)
    assert dino_clip.likeness(cfg, tmp_path, [cfg, cfg, cfg]).shape == (2, 3)


# What is refused.


def told(cfg: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        scored_by_dino_and_clip(cfg, cfg.run_dir, Path(cfg.run_dir) / "scores")
    assert not (Path(cfg.run_dir) / "scores").exists(), "refused before anything is drawn"
    return "\n".join(caught.value.problems)


def test_models_that_are_none_are_refused(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = {"evaluation__dino": str(eyes.dino()), "evaluation__clip": str(eyes.clip())}
    assert "neither a local folder nor a model that could be" in told(
        make(**good | {"evaluation__dino": "no/way"})
    )
    pickled = shutil.copytree(eyes.dino(), tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "has no safetensors" in told(make(**good | {"evaluation__dino": str(pickled)}))
    assert "a clip, not a ViT" in told(make(**good | {"evaluation__dino": str(eyes.clip())}))
    assert "not a CLIP" in told(make(**good | {"evaluation__clip": str(eyes.dino())}))
    (wordless := shutil.copytree(eyes.clip(), tmp_path / "wordless")).joinpath("tokenizer.json").unlink()
    assert "has no vocabulary" in told(make(**good | {"evaluation__clip": str(wordless)}))
    assert "not about the subject" in told(make(**good, evaluation__prompts=["a dog in the snow"]))


def test_a_pickle_on_the_hub_is_refused(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"  # what the Hub's client keeps of a repository, all but the pickle
    kept = cache / "models--org--old" / "snapshots" / ("0" * 40)
    kept.mkdir(parents=True)
    (cache / "models--org--old" / "refs").mkdir()
    (cache / "models--org--old" / "refs" / "main").write_text("0" * 40)
    shutil.copy(eyes.dino() / "config.json", kept)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    assert "use another model, or a revision that has them" in told(
        make(evaluation__dino="org/old", evaluation__clip=str(eyes.clip()))
    )


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(eyes.dino(), tmp_path / "cut")
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if "layernorm.weight" in name)
    save_file({k: v for k, v in tensors.items() if k != lost}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 weights are missing or of another shape, e\.g\. .*layernorm"):
        encoders.dino_images(encoders.dino(str(folder)))


def test_scores_of_the_other_judge_are_not_shown_beside(ran: Config, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"likeness": 0.5}))
    with pytest.raises(ConfigError, match="has no scores of DINO and CLIP: no dino_base"):
        list(evaluate.evaluate(ran, path))


@pytest.mark.parametrize("load", [fidelity.Scores.load, tiny_judge.JudgeScores.load], ids=["clip", "tiny"])
@pytest.mark.parametrize(
    ("text", "told"),
    [("[]", "is not a JSON object"), ("null", "is not a JSON object"), ("{", "cannot read"),
     ('{"likeness": "a", "dino_base": "a"}', "has no scores")],
)  # fmt: skip
def test_what_has_no_scores_is_refused(
    tmp_path: Path, load: Callable[[Path], object], text: str, told: str
) -> None:
    path = tmp_path / "s.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told):
        load(path)


def test_photos_and_a_prepare_section_are_needed(make: Make, tmp_path: Path) -> None:
    cfg = make()
    with pytest.raises(ConfigError, match="no prepare section"):
        scored_by_dino_and_clip(cfg.model_copy(update={"prepare": None}), "none", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"prepare\.photos: no photos"):
        scored_by_dino_and_clip(make(prepare__photos=str(tmp_path / "empty")), "none", tmp_path / "out")
    draw_photo(tmp_path / "empty" / "a.png", 1)
