"""Base models with random weights, small enough to train in a test, ordinary enough for Diffusers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaTransformer2DModel,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    Krea2Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
)

from benchmarks.architectures import mistral_words, qwen_words, t5_words
from benchmarks.tiny import parts
from dbtrain.models.families.transformer import MESSAGE
from dbtrain.runtime import rng
from dbtrain.tiny import world
from tests.session import once

TOKENS = 32
WIDTH = 64  # of every text encoder


def clip_words() -> CLIPTokenizer:
    """The same words for every base: what BPE learns differs by chance where two pairs are as frequent."""

    def fill(folder: Path) -> None:
        words = parts.tokenizer([world.caption(world.scene(number), number) for number in range(500)])
        words.model_max_length = TOKENS
        words.save_pretrained(folder)

    return CLIPTokenizer.from_pretrained(once("clip-words", fill))


def _clip(words: CLIPTokenizer, layers: int = 2) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(words), max_position_embeddings=TOKENS, hidden_size=WIDTH, intermediate_size=128,
        num_hidden_layers=layers, num_attention_heads=4, projection_dim=WIDTH,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip


def _vae(**changes: Any) -> Any:
    return AutoencoderKL(
        block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=8, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        **changes,
    )  # fmt: skip


def _unet(**changes: Any) -> Any:
    settings: dict[str, Any] = {
        "block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 8, "cross_attention_dim": WIDTH,
        "attention_head_dim": 4, "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    return UNet2DConditionModel(**settings | changes)


# Two levels of one width, one layer on the way up: attention in the middle and after it.
LEAN = {
    "block_out_channels": (64, 64), "layers_per_block": 0, "down_block_types": ("DownBlock2D", "DownBlock2D"),
}  # fmt: skip
# "slim" has attention in the middle only: few kernels to compile.
SIZES: dict[str, dict[str, Any]] = {
    "whole": {}, "lean": LEAN,
    "slim": {**LEAN, "block_out_channels": (32, 32), "up_block_types": ("UpBlock2D", "UpBlock2D")},
}  # fmt: skip


def _noise(**changes: Any) -> Any:
    settings = {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
        "clip_sample": False,
    }  # fmt: skip
    return DDPMScheduler(**settings | changes)


def _save(folder: Path, pipeline: str, components: dict[str, Any], **options: Any) -> None:
    """The components in fp16, as published bases are, as a Diffusers folder."""
    kind: Any = getattr(diffusers, pipeline)
    for part in components.values():
        if hasattr(part, "half"):
            part.half()
    kind(**components, **options).save_pretrained(folder)


@cache
def sd(prediction: str = "epsilon", size: str = "lean") -> Path:
    """A small Stable Diffusion: 64 px, latents (4, 8, 8), tokens (32,).

    Its sizes differ in the denoiser only: they take the same shards.
    """

    def fill(folder: Path) -> None:
        words = clip_words()
        with rng.seeded("tests", "sd"):
            components = {
                "vae": _vae(), "text_encoder": CLIPTextModel(_clip(words)), "tokenizer": words,
                "unet": _unet(**SIZES[size]), "scheduler": _noise(prediction_type=prediction),
                "safety_checker": None, "feature_extractor": None,
            }  # fmt: skip
        _save(folder, "StableDiffusionPipeline", components, requires_safety_checker=False)

    return once(f"sd-{prediction}-{size}", fill)


@cache
def sdxl(size: str = "whole") -> Path:
    """An SDXL of 64 px: two text encoders side by side, pooled embedding, size and crop."""

    def fill(folder: Path) -> None:
        words = clip_words()
        with rng.seeded("tests", "sdxl"):
            components = {
                "vae": _vae(), "text_encoder": CLIPTextModel(_clip(words)),
                "text_encoder_2": CLIPTextModelWithProjection(_clip(words, layers=3)),
                "tokenizer": words, "tokenizer_2": clip_words(), "scheduler": _noise(),
                "unet": _unet(
                    cross_attention_dim=2 * WIDTH, addition_embed_type="text_time", addition_time_embed_dim=8,
                    projection_class_embeddings_input_dim=WIDTH + 6 * 8, **SIZES[size],
                ),
            }  # fmt: skip
        _save(folder, "StableDiffusionXLPipeline", components)

    return once(f"sdxl-{size}", fill)


def _t5(number: str = "", width: int = WIDTH) -> dict[str, Any]:
    """A T5 and its tokenizer, as the components of this number: "" or, for example, "_2"."""
    words = t5_words(77)
    config = T5Config(
        vocab_size=128, d_model=width, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", dropout_rate=0.1,
    )  # fmt: skip
    return {f"tokenizer{number}": words, f"text_encoder{number}": T5EncoderModel(config)}


IF_UNET = {
    "out_channels": 6, "encoder_hid_dim": WIDTH, "encoder_hid_dim_type": "text_proj",
    "cross_attention_dim": 32, "addition_embed_type": "text", "addition_embed_type_num_heads": 2,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "only_cross_attention": False, "resnet_time_scale_shift": "scale_shift", "act_fn": "gelu",
}  # fmt: skip
IF_NOISE = {
    "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "squaredcos_cap_v2", "steps_offset": 0,
    "clip_sample": True, "variance_type": "learned_range", "thresholding": True, "sample_max_value": 1.5,
    "dynamic_thresholding_ratio": 0.95,
}  # fmt: skip
IF_EXTRAS = {"safety_checker": None, "feature_extractor": None, "watermarker": None}


@cache
def if_1() -> Path:
    """DeepFloyd IF's first stage at 16 px: added-KV attention, a learned variance."""

    def fill(folder: Path) -> None:
        with rng.seeded("tests", "if 1"):
            unet = _unet(in_channels=3, sample_size=16, **IF_UNET)
            components = {"unet": unet, "scheduler": _noise(**IF_NOISE), **_t5(), **IF_EXTRAS}
        _save(folder, "IFPipeline", components, requires_safety_checker=False)

    return once("if-1", fill)


@cache
def if_2() -> Path:
    """DeepFloyd IF's second stage, from 8 to 32 px, with the noise level as class label."""

    def fill(folder: Path) -> None:
        with rng.seeded("tests", "if 2"):
            unet = _unet(in_channels=6, sample_size=32, class_embed_type="timestep", **IF_UNET)
            noise = _noise(**IF_NOISE)
            components = {
                "unet": unet, "scheduler": noise, "image_noising_scheduler": _noise(**IF_NOISE),
                **_t5(), **IF_EXTRAS,
            }  # fmt: skip
        _save(folder, "IFSuperResolutionPipeline", components, requires_safety_checker=False)

    return once("if-2", fill)


def _qwen3(words: Any, layers: int) -> Any:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=1024,
        )
    )  # fmt: skip


def _flux2(words: Any, text_encoder: Any, guidance: bool) -> dict[str, Any]:
    """FLUX.2 of 64 px: one double and two single blocks, latents (128, 4, 4), 512 tokens."""
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=8, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=32,
    )  # fmt: skip
    vae.bn.running_mean.normal_()  # 0 and 1 would hide a missing normalization
    vae.bn.running_var.uniform_(0.5, 2.0)
    transformer = Flux2Transformer2DModel(
        in_channels=128, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=96, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance,
    )  # fmt: skip
    return {
        "vae": vae, "text_encoder": text_encoder, "tokenizer": words, "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }  # fmt: skip


@cache
def flux2_klein() -> Path:
    def fill(folder: Path) -> None:
        with rng.seeded("tests", "flux2 klein"):
            words = qwen_words()
            components = _flux2(words, _qwen3(words, layers=28), guidance=False)
        _save(folder, "Flux2KleinPipeline", components, is_distilled=False)

    return once("flux2-klein", fill)


@cache
def flux2_dev() -> Path:
    """With a plain tokenizer in place of Pixtral's processor, which needs torchvision."""

    def fill(folder: Path) -> None:
        words = mistral_words()
        text = {
            "model_type": "mistral", "vocab_size": len(words), "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 31, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
            "max_position_embeddings": 1024,
        }  # fmt: skip
        seen = {
            "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        }  # fmt: skip
        with rng.seeded("tests", "flux2 dev"):
            encoder = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=seen))
            components = _flux2(words, encoder, guidance=True)
        _save(folder, "Flux2Pipeline", components)

    return once("flux2-dev", fill)


def _qwen_vae() -> Any:
    return AutoencoderKLQwenImage(base_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1)


QWEN_TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 1024, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
}  # fmt: skip


@cache
def qwen_image(layers: int = 2, heads: int = 2) -> Path:
    """A Qwen-Image of 64 px: two blocks, latents (16, 8, 8), 16 tokens.

    One of four heads is as wide as quantized layers have to be.
    """

    def fill(folder: Path) -> None:
        with rng.seeded("tests", "qwen image"):
            words = qwen_words(MESSAGE, size=600)
            text = {**QWEN_TEXT, "vocab_size": len(words), "num_hidden_layers": 2}
            vision = {
                "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
                "fullatt_block_indexes": [0],
            }  # fmt: skip
            config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
            components = {
                "vae": _qwen_vae(), "text_encoder": Qwen2_5_VLForConditionalGeneration(config),
                "tokenizer": words,
                "scheduler": FlowMatchEulerDiscreteScheduler(
                    use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192,
                    shift_terminal=0.02,
                ),
                "transformer": QwenImageTransformer2DModel(
                    num_layers=layers, attention_head_dim=16, num_attention_heads=heads,
                    joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
                ),
            }  # fmt: skip
        _save(folder, "QwenImagePipeline", components)

    return once(f"qwen-image-{layers}-{heads}", fill)


FLUX_VAE = {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}


@cache
def flux1(heads: int = 2) -> Path:
    """A FLUX.1 dev of 64 px: one double and two single blocks, latents (16, 8, 8), CLIP and 512 T5 tokens.

    One of four heads is as wide as quantized layers have to be.
    """

    def fill(folder: Path) -> None:
        with rng.seeded("tests", "flux1"):
            words = clip_words()
            components = {
                "vae": _vae(**FLUX_VAE), "text_encoder": CLIPTextModel(_clip(words)), "tokenizer": words,
                **_t5("_2"), "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
                "transformer": FluxTransformer2DModel(
                    in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=16,
                    num_attention_heads=heads, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH,
                    axes_dims_rope=(4, 6, 6), guidance_embeds=True,
                ),
            }  # fmt: skip
        _save(folder, "FluxPipeline", components)

    return once(f"flux1-{heads}", fill)


@cache
def chroma() -> Path:
    """A Chroma of 64 px: one double and two single blocks, latents (16, 8, 8), prompts of any length."""

    def fill(folder: Path) -> None:
        with rng.seeded("tests", "chroma"):
            components = {
                "vae": _vae(**FLUX_VAE), **_t5(), "scheduler": FlowMatchEulerDiscreteScheduler(),
                "transformer": ChromaTransformer2DModel(
                    in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=16,
                    num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6),
                    approximator_num_channels=16, approximator_hidden_dim=32, approximator_layers=1,
                ),
            }  # fmt: skip
        _save(folder, "ChromaPipeline", components)

    return once("chroma", fill)


@cache
def sd3(with_t5: bool = True) -> Path:
    """An SD 3.5 medium of 64 px: two blocks, one with a second attention, latents (16, 8, 8)."""

    def fill(folder: Path) -> None:
        with rng.seeded("tests", "sd3"):
            words = clip_words()
            t5 = _t5("_3", 2 * WIDTH) if with_t5 else {"tokenizer_3": None, "text_encoder_3": None}
            components = {
                "vae": _vae(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609),
                "text_encoder": CLIPTextModelWithProjection(_clip(words)), "tokenizer": words,
                "text_encoder_2": CLIPTextModelWithProjection(_clip(words, layers=3)),
                "tokenizer_2": clip_words(), **t5, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
                "transformer": SD3Transformer2DModel(
                    sample_size=8, num_layers=2, attention_head_dim=16, num_attention_heads=2,
                    joint_attention_dim=2 * WIDTH, caption_projection_dim=32, pos_embed_max_size=8,
                    pooled_projection_dim=2 * WIDTH, dual_attention_layers=(0,), qk_norm="rms_norm",
                ),
            }  # fmt: skip
        _save(folder, "StableDiffusion3Pipeline", components)

    return once(f"sd3-{with_t5}", fill)


@cache
def z_image() -> Path:
    """A Z-Image of 64 px: one block of each of its three kinds, latents (16, 8, 8), prompts of any length."""

    def fill(folder: Path) -> None:
        with rng.seeded("tests", "z image"):
            words = qwen_words()
            transformer = ZImageTransformer2DModel(
                dim=64, n_layers=2, n_refiner_layers=1, n_heads=4, n_kv_heads=4, cap_feat_dim=32,
                axes_dims=[4, 6, 6], axes_lens=[1024, 64, 64],
            )  # fmt: skip
            transformer.x_pad_token.data.normal_()  # 0 would hide a missing one
            transformer.cap_pad_token.data.normal_()
            components = {
                "vae": _vae(**FLUX_VAE),
                "text_encoder": _qwen3(words, layers=3).model, "tokenizer": words,
                "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), "transformer": transformer,
            }  # fmt: skip
        _save(folder, "ZImagePipeline", components)

    return once("z-image", fill)


@cache
def krea2() -> Path:
    """A Krea 2 of 64 px: two blocks, latents (16, 8, 8), 16 tokens, hidden states of twelve layers."""

    def fill(folder: Path) -> None:
        with rng.seeded("tests", "krea 2"):
            words = qwen_words(MESSAGE, size=600)
            text = {**QWEN_TEXT, "vocab_size": len(words), "num_hidden_layers": 36, "head_dim": 8}
            vision = {
                "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
                "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
            }  # fmt: skip
            transformer = Krea2Transformer2DModel(
                num_layers=2, attention_head_dim=16, num_attention_heads=4, num_key_value_heads=2,
                intermediate_size=64, timestep_embed_dim=32, text_hidden_dim=32, text_num_attention_heads=4,
                text_num_key_value_heads=2, text_intermediate_size=64, num_layerwise_text_blocks=1,
                num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6),
            )  # fmt: skip
            for name, parameter in transformer.named_parameters():
                if "norm" in name or "table" in name:  # 0 would hide a missing one
                    parameter.data.normal_(std=0.2)
            components = {
                "vae": _qwen_vae(), "tokenizer": words, "transformer": transformer,
                "text_encoder": Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)),
                "scheduler": FlowMatchEulerDiscreteScheduler(
                    use_dynamic_shifting=True, max_image_seq_len=6400
                ),
            }  # fmt: skip
        _save(folder, "Krea2Pipeline", components)

    return once("krea2", fill)


FLOW: dict[str, Callable[[], Path]] = {  # family -> its miniature
    "flux2-klein": flux2_klein,
    "flux2-dev": flux2_dev,
    "qwen-image": qwen_image,
    "z-image": z_image,
    "flux1": flux1,
    "sd3": sd3,
    "chroma": chroma,
    "krea2": krea2,
}
ALL: dict[str, Callable[[], Path]] = {
    "sd": sd, "sd-v": lambda: sd("v_prediction"), "sdxl": sdxl, "if-1": if_1, "if-2": if_2,
    "sd-slim": lambda: sd(size="slim"), "sd-v-slim": lambda: sd("v_prediction", size="slim"),
    "sdxl-slim": lambda: sdxl(size="slim"), **FLOW,
    "sd3-without-t5": lambda: sd3(with_t5=False),
}  # fmt: skip
OF_FAMILY = {"sd": sd, "sdxl": sdxl, "deepfloyd": if_1, "deepfloyd-2": if_2, **FLOW}
# px that these are made for
SIDES = {"sd": 64, "sdxl": 64, "deepfloyd": 16, "deepfloyd-2": 32, **dict.fromkeys(FLOW, 64)}
