"""Base models with random weights, small enough to train in a test, ordinary enough for Diffusers."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from dbtrain import rng
from dbtrain.tiny import parts, world

TOKENS = 32
FOLDER = tempfile.TemporaryDirectory(prefix="dbtrain-bases-")  # removed when the tests end


@cache
def sd() -> Path:
    """A Stable Diffusion 1 of half a million parameters: 64 px, latents (4, 8, 8), tokens (32,)."""
    words = parts.tokenizer([world.caption(world.scene(number), number) for number in range(500)])
    words.model_max_length = TOKENS
    text = CLIPTextConfig(
        vocab_size=len(words), max_position_embeddings=TOKENS, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, projection_dim=64, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    with rng.seeded("tests", "sd"):
        vae = AutoencoderKL(
            block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=8, sample_size=64,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        unet = UNet2DConditionModel(
            block_out_channels=(32, 64), layers_per_block=1, sample_size=8, cross_attention_dim=64,
            attention_head_dim=4, norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
        encoder = CLIPTextModel(text)
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
    )
    parts16: Any = [part.half() for part in (vae, encoder, unet)]  # as published bases are
    components: Any = (*parts16[:2], words, parts16[2], scheduler, None, None)
    pipe: Any = StableDiffusionPipeline(*components, requires_safety_checker=False)
    folder = Path(FOLDER.name) / "sd"
    pipe.save_pretrained(folder)
    return folder
