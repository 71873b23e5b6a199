"""Qwen-Image: a flow-matching transformer of double blocks, with Qwen2.5-VL as its text encoder.

Wu et al. 2025, "Qwen-Image Technical Report", arXiv:2508.02324.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from dbtrain.models.families import transformer as shared
from dbtrain.models.families.family import QWEN_WORDS, Family, encode_apart, known_as
from dbtrain.models.pretrained import Pretrained

NEGATIVE = " "  # of the model's own examples; without a negative prompt the pipeline ignores guidance


def embed(encoders: Mapping[str, Any], ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The last hidden state, (prompts, L, D), and its lengths."""
    model = encoders["text_encoder"].model
    return shared.in_message_states(model, ids, lambda states: states[-1])


def conditions(base: Pretrained) -> dict[str, tuple[int | None, ...]]:
    width = base.setting("transformer", "joint_attention_dim", int)
    return {"prompt_embeds": (None, width), "lengths": ()}


def check(base: Pretrained) -> None:
    """Raise ConfigError unless the transformer fits the VAE and the text encoder."""
    width = base.setting("text_encoder", "hidden_size", int)
    shared.check_frames(base, joint_attention_dim=width)


def denoise(transformer: nn.Module, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
    text, mask = shared.shared_text(condition, x_t.dtype)
    height, width = x_t.shape[2:]
    velocity = transformer(
        hidden_states=shared.packed(x_t), timestep=t, encoder_hidden_states=text,
        encoder_hidden_states_mask=mask, return_dict=False,
        img_shapes=[[(1, height // shared.PATCH, width // shared.PATCH)]] * len(x_t),
    )[0]  # fmt: skip
    return shared.unpacked(velocity, height, width)


def idle(name: str, component: nn.Module) -> tuple[str, ...]:
    """What the last block computes of the text, which nothing reads."""
    blocks: Any = component.get_submodule("transformer_blocks")
    last = f"transformer_blocks.{len(blocks) - 1}"
    return (f"{last}.attn.add_q_proj", f"{last}.attn.to_add_out", f"{last}.txt_mlp")


MLP = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")
MODULATION = ("img_mod.1", "txt_mod.1")
FAMILY = Family(
    name="qwen-image",
    pipeline="QwenImagePipeline",
    classes={
        "transformer": ("QwenImageTransformer2DModel",),
        "vae": ("AutoencoderKLQwenImage",),
        "text_encoder": ("Qwen2_5_VLForConditionalGeneration",),
        "tokenizer": QWEN_WORDS,
    },
    embed=embed,
    conditions=conditions,
    check=check,
    denoise=denoise,
    pad_to_multiple_of=shared.PAD_TO_MULTIPLE_OF,
    unread=("model.visual", "lm_head"),
    hidden={"text_encoder": (-1,)},
    presets={
        "attention": shared.ATTENDED,
        "diffusers": ("to_q", "to_k", "to_v", "to_out.0"),
        "minimal": ("to_q", "to_v"),
        "all": (*shared.ATTENDED, *MLP, *MODULATION),
    },
    encode_prompt=partial(encode_apart, negative=NEGATIVE),
    arguments=lambda rows, guidance: {
        "true_cfg_scale": guidance,
        **shared.padded_texts(rows, "prompt_embeds_mask"),
    },
    idle=idle,
    lora_mixin="QwenImageLoraLoaderMixin",
    header=known_as("Qwen-Image", "qwen_image"),
    keeps_names=True,  # the original code has Diffusers'
    **shared.FRAMES,
)
