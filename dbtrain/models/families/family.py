"""The definition of a model family, and functions that families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dbtrain.config.adapter import PRESETS
from dbtrain.data.sizes import Size
from dbtrain.models.ddpm import DDPM
from dbtrain.models.families.space import LatentSpace
from dbtrain.models.objectives import Objective
from dbtrain.models.pretrained import Pretrained
from dbtrain.runtime.console import say
from dbtrain.runtime.errors import ConfigError

if TYPE_CHECKING:
    from dbtrain.data.batch import Batch


Sees = Callable[[Tensor, Tensor, Tensor, "Batch", DDPM | None], dict[str, Tensor]]
"""(x0, x_t, t (rows,), batch, noising) -> further conditions of the denoiser, (rows, ...) each."""


@dataclass(frozen=True)
class Family:
    """Everything that differs between model families: constants and a few functions.

    Other code uses these fields and never branches on the family.
    """

    name: str  # "sd"
    pipeline: str  # Diffusers class: "StableDiffusionPipeline"
    denoiser: str  # the trained component: "unet"
    classes: Mapping[str, tuple[str, ...]]  # component -> the classes that it may be, but for schedulers
    text_encoders: Mapping[str, str]  # text encoder -> its tokenizer
    tokenize: Callable[[Mapping[str, Any], Sequence[str]], dict[str, Tensor]]
    """(tokenizers, prompts) -> token ids of each text encoder, (prompts, L) int64."""
    embed: Callable[[Mapping[str, nn.Module], Mapping[str, Tensor]], dict[str, Tensor]]
    """(text encoders, ids) -> condition: tensors, (prompts, ...) each.

    Where only some encoders are trained, they get those alone, and with their ids the condition of all
    encoders as it was before training, of which they return what they change.

    Where prompts have lengths of their own, `lengths`, (prompts,) int64, says how many rows of the others are
    text. It stays on the CPU."""
    space: Callable[[Pretrained, Size], LatentSpace]
    """(base, size) -> the denoiser's space. Raises ConfigError if the VAE cannot divide the size."""
    grids: Callable[[Pretrained], tuple[int, ...]]
    """(base) -> px that divide the sides of images of other shapes than squares, the best first."""
    encode_images: Callable[[nn.Module | None, Tensor], dict[str, Tensor]]
    """(vae, images (B, 3, H, W) in [-1, 1]) -> the tensors to store in shards, (B, C, H, W) each."""
    sample_posterior: Callable[[Mapping[str, Tensor], Tensor], Tensor]
    """(stored tensors, normal noise (rows, C, H, W)) -> unscaled x0, (rows, C, H, W) fp32."""
    conditions: Callable[[Pretrained], dict[str, tuple[int | None, ...]]]
    """The shape of each tensor that `embed` returns, per prompt; None: any number."""
    check: Callable[[Pretrained], None]
    """Raises ConfigError if the components of a base do not fit together. Reads only their configs."""
    denoise: Callable[[nn.Module, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
    """(denoiser, x_t, t (rows,), condition) -> prediction, shaped like x_t."""
    objective: type[Objective] = DDPM
    patch: int = 1  # latent cells per token, in each direction
    text_dtype: torch.dtype = torch.float32  # of the text encoders in `prepare`, and of what they return
    trained_text: tuple[str, ...] | None = None  # text encoders that can have an adapter; None: all of them
    unread: tuple[str, ...] = ()  # modules of the text encoders that prompts do not pass, such as for images
    hidden: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Text encoder -> its hidden states that are read, as transformers counts them; not listed: all."""
    presets: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: PRESETS["denoiser"])
    """The denoiser's modules by preset of `adapter.targets`, as suffixes of their names."""
    stored: tuple[str, ...] = ("mean", "std")  # the names of the tensors that `encode_images` returns
    vae: str | None = "vae"  # None: the denoiser works on pixels
    row: Callable[[Mapping[str, Any], Size], dict[str, Tensor]] = lambda meta, size: {}
    """(a row's description, its size) -> further conditions of the row."""
    noising: str | None = None  # scheduler that adds noise to the input image of an upscaler
    sees: Mapping[str, Sees] = field(default_factory=dict)  # input of an upscaler, by model.low_res
    enlarges: int = 1  # output side / input side of an upscaler
    lora_loads: tuple[str, ...] | None = None  # components whose LoRA the pipeline loads; None: all
    loads_words: bool = False  # whether the pipeline has `load_textual_inversion`
    lora_mixin: str = "StableDiffusionLoraLoaderMixin"  # base class of the pipeline that writes LoRA files
    kohya: Mapping[str, str] = field(default_factory=dict)  # component -> its prefix in kohya's files
    header: Callable[[Pretrained], dict[str, str]] = lambda base: {}
    """(base) -> the entries in the header of kohya's files that say which models an adapter is for."""
    sgm: bool = False  # kohya's files name the denoiser's modules as the original code does
    original: tuple[tuple[str, str], ...] = ()
    """(pattern, name) of the denoiser's modules in the original code, whose files ComfyUI loads. Modules with
    the same name are one there, with their outputs one after the other; each has a pattern of its own."""
    keeps_names: bool = False  # ComfyUI loads Diffusers' names too; its file has them
    comfyui_prefix: str = "diffusion_model"
    """How names begin in ComfyUI's file. `transformer`, with Diffusers' names, where Diffusers' loader skips
    the original ones without a word."""
    sampler: Mapping[str, Any] = field(default_factory=dict)  # overrides of the scheduler's config
    encode_prompt: Callable[[Any, str, bool], dict[str, Tensor]] = lambda pipe, prompt, guided: encode_guided(
        pipe, prompt, guided
    )
    """(pipeline, prompt, whether guidance is used) -> arguments of the pipeline's call, (1, ...) each."""
    arguments: Callable[[Sequence[Mapping[str, Tensor]], float], dict[str, Any]] = lambda rows, guidance: (
        side_by_side(rows, guidance)
    )
    """(encoded prompts, one per image; guidance) -> arguments of the pipeline's call."""
    generated: Callable[[Tensor, LatentSpace], Tensor] = lambda latents, space: latents
    """(the latents that the pipeline returns, its space) -> x0, (rows, C, H, W)."""
    decode: Callable[[Any, Tensor], Tensor] = lambda vae, latents: vae.decode(latents, return_dict=False)[0]
    """(vae, unscaled x0 (rows, C, H, W)) -> images, (rows, 3, H, W) in [-1, 1]."""
    needs_vae: bool = False  # whether the pipeline needs its VAE even to return latents
    distilled: Callable[[Pretrained], str | None] = lambda base: None
    """(base) -> the model to train instead, if it was distilled to few steps."""
    texts_as_one: tuple[str, ...] = ()
    """The denoiser's modules that take the texts of all rows, of lengths of their own, as one sequence."""
    pad_to_multiple_of: int = 0
    """Not 0 where texts are padded to the longest: in slots, all rows pass once for each length of prompts.

    Lengths are rounded up to multiples of it. Otherwise a run's rounding would depend on others' prompts.
    With 1, `denoise` itself takes one length at a time, in as many passes as `passes` in the condition says.
    """
    idle: Callable[[str, nn.Module], tuple[str, ...]] = lambda name, component: ()
    """(name, component) -> its modules that get no gradient, because nothing uses their output."""

    fitted: Callable[[Family, Pretrained], Family] = lambda family, base: family
    """(the family, base) -> the family as this base has it, for bases that may lack a component."""

    single_file: tuple[str, ...] = ()  # how Diffusers' names for the kinds of its models in one file begin

    @property
    def adaptable(self) -> tuple[str, ...]:
        """The components that can have an adapter."""
        return (self.denoiser, *self.adaptable_text)

    @property
    def adaptable_text(self) -> tuple[str, ...]:
        """The text encoders that can have an adapter. They are trained together."""
        return tuple(self.text_encoders) if self.trained_text is None else self.trained_text

    def tokens(self, shape: Sequence[int]) -> int:
        """How many tokens the denoiser has for x0 of this shape, (C, H, W)."""
        return (shape[1] // self.patch) * (shape[2] // self.patch)

    @property
    def allowed(self) -> dict[str, tuple[str, ...]]:
        """Component -> the classes that it may be; schedulers are those of the objective."""
        schedulers = [part for part in ("scheduler", self.noising) if part]
        return {**dict.fromkeys(schedulers, self.objective.SCHEDULERS), **self.classes}

    @property
    def models(self) -> tuple[str, ...]:
        """The components with weights."""
        return (self.denoiser, *([self.vae] if self.vae else []), *self.text_encoders)

    @property
    def parts(self) -> tuple[str, ...]:
        """The components of a base that generated images depend on."""
        optional = [part for part in (self.vae, self.noising) if part]
        return (self.denoiser, "scheduler", *optional, *self.text_encoders, *self.text_encoders.values())


def matching(base: Pretrained, pairs: Sequence[tuple[str, str, str, str]]) -> None:
    """Raise ConfigError unless both settings of each (component, setting, component, setting) are equal."""
    for one, name, other, its_name in pairs:
        here, there = base.setting(one, name, int), base.setting(other, its_name, int)
        if here != there:
            raise ConfigError(
                f"base model {base.name} does not fit together: {name} of its {one} is {here}, "
                f"but {its_name} of its {other} is {there}"
            )


def known_as(architecture: str, version: str) -> Callable[[Pretrained], dict[str, str]]:
    """A `header` of one model: its names in the model specification and in kohya's trainers."""
    return lambda base: {
        "modelspec.architecture": f"{architecture}/lora", "ss_base_model_version": version,
    }  # fmt: skip


# Arguments of a pipeline's call, in the order in which `encode_prompt` returns them (SD: the first two).
ENCODED = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def encode_guided(pipe: Any, prompt: str, guided: bool, **more: Any) -> dict[str, Tensor]:
    """A prompt and the empty one, encoded by a pipeline that encodes both at once.

    `more`: further arguments of its `encode_prompt`.
    """
    tensors = pipe.encode_prompt(
        prompt=prompt, device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=guided, **more
    )
    return {name: tensor for name, tensor in zip(ENCODED, tensors, strict=False) if tensor is not None}


def encode_apart(
    pipe: Any,
    prompt: str,
    guided: bool,
    names: Sequence[str] = ("prompt_embeds",),
    negative: str = "",
    **more: Any,
) -> dict[str, Tensor]:
    """A prompt and the negative one, encoded by a pipeline that encodes them one by one.

    `names`: the arguments of its call, in the order in which `encode_prompt` returns them. `more`: further
    arguments of that.
    """
    found: dict[str, Tensor] = {}
    for start, text in (("", prompt), *([("negative_", negative)] if guided else [])):
        tensors = pipe.encode_prompt(prompt=text, device=pipe.device, num_images_per_prompt=1, **more)
        found |= {f"{start}{name}": tensor for name, tensor in zip(names, tensors, strict=False)}
    return found


def encode_by_family(pipe: Any, prompt: str, guided: bool, family: Family) -> dict[str, Tensor]:
    """A prompt and the empty one, as the prompt table has them, by the family's own functions."""
    found: dict[str, Tensor] = {}
    for start, text in (("", prompt), *([("negative_", "")] if guided else [])):
        ids = family.tokenize({name: getattr(pipe, w) for name, w in family.text_encoders.items()}, [text])
        on_device = {name: tokens.to(pipe.device) for name, tokens in ids.items()}
        rows = family.embed({name: getattr(pipe, name) for name in family.text_encoders}, on_device)
        found |= {f"{start}{name}": values for name, values in rows.items()}
    return found


def side_by_side(rows: Sequence[Mapping[str, Tensor]], guidance: float) -> dict[str, Any]:
    """Encoded prompts stacked, (rows, ...) each, and the guidance scale."""
    stacked = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    return stacked | {"guidance_scale": guidance}


# The classes of tokenizers, which transformers stores under several names.
CLIP_WORDS = ("CLIPTokenizer", "CLIPTokenizerFast")
T5_WORDS = ("T5Tokenizer", "T5TokenizerFast")
QWEN_WORDS = ("Qwen2Tokenizer", "Qwen2TokenizerFast")


def padded(tokenizer: Any, prompts: Sequence[str], length: int) -> Any:
    """The tokenizer's output, padded to (prompts, length) int64. Reports prompts that it truncates."""
    for prompt, ids in zip(prompts, tokenizer(list(prompts)).input_ids, strict=True):
        if len(ids) > length:
            say(f"prompt '{prompt}' has {len(ids)} tokens; the model reads the first {length}")
    return tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )


def tokenize_clip(tokenizers: Mapping[str, Any], prompts: Sequence[str]) -> dict[str, Tensor]:
    """CLIP token ids of each text encoder, (prompts, L) int64, padded to the tokenizer's maximum length."""
    return {
        name: padded(tokenizer, prompts, tokenizer.model_max_length).input_ids
        for name, tokenizer in tokenizers.items()
    }


def encode_moments(vae: nn.Module | None, images: Tensor) -> dict[str, Tensor]:
    """Mean and standard deviation of the VAE's posterior, (B, C, h, w) fp32 each, unscaled.

    Storing these instead of a sample allows a new sample each time a row is trained on.
    Kingma & Welling 2013, "Auto-Encoding Variational Bayes", arXiv:1312.6114.
    """
    assert vae is not None
    parameter = next(vae.parameters())
    posterior = vae.encode(images.to(parameter.device, parameter.dtype)).latent_dist  # type: ignore[operator]
    logvar = posterior.logvar.float()  # clamped to [-30, 20] by Diffusers
    return {"mean": posterior.mean.float(), "std": torch.exp(0.5 * logvar)}


def sampled_moments(x0: Tensor, space: LatentSpace) -> dict[str, Tensor]:
    """The tensors to store for a generated latent, (C, h, w): itself, unscaled, with standard deviation 0."""
    return {"mean": space.unscaled(x0), "std": torch.zeros_like(x0)}


def sample_moments(stored: Mapping[str, Tensor], posterior: Tensor) -> Tensor:
    """A sample of the VAE's posterior, unscaled, (rows, C, h, w)."""
    return stored["mean"] + stored["std"] * posterior
