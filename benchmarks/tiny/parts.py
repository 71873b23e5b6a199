"""What the embedded base consists of: an ordinary Stable Diffusion in miniature."""

from __future__ import annotations

import json
from typing import Any

from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dbtrain.tiny.paint import SIDE

TOKENS = 24
LATENTS = 4  # channels


def tokenizer(captions: list[str]) -> CLIPTokenizer:
    """CLIP's byte-level BPE with a small vocabulary: all bytes, and merges learnt from captions."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=end))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    learner.train_from_iterator(
        captions, trainers.BpeTrainer(vocab_size=1024, end_of_word_suffix="</w>", initial_alphabet=letters)
    )
    learnt = json.loads(learner.to_str())["model"]["merges"]
    merges: Any = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in learnt]
    bases = letters + [f"{letter}</w>" for letter in letters]
    names = dict.fromkeys([*bases, *("".join(pair) for pair in merges), start, end])
    return CLIPTokenizer(
        vocab={name: number for number, name in enumerate(names)}, merges=merges, model_max_length=TOKENS
    )


def vae() -> Any:
    """SIDE px to latents (LATENTS, SIDE / 4, SIDE / 4) and back."""
    model = AutoencoderKL(
        block_out_channels=(16, 48, 64), layers_per_block=1, norm_num_groups=8, latent_channels=LATENTS,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        sample_size=SIDE,
    )  # fmt: skip
    return _branches_at_zero(model)


def text_encoder(words: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words), max_position_embeddings=TOKENS, hidden_size=128, intermediate_size=512,
            num_hidden_layers=3, num_attention_heads=4, projection_dim=128,
            bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
        )
    )  # fmt: skip


def unet() -> Any:
    model: Any = UNet2DConditionModel(
        block_out_channels=(48, 96, 128), layers_per_block=1, sample_size=SIDE // 4, in_channels=LATENTS,
        out_channels=LATENTS, cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    nn.init.zeros_(model.conv_out.weight)
    return _branches_at_zero(model)


def _branches_at_zero(model: Any) -> Any:
    """Let every residual branch begin as nothing, as in ADM's code: far fewer steps."""
    for block in model.modules():
        if isinstance(block, ResnetBlock2D):
            last: Any = block.conv2
        elif isinstance(block, Transformer2DModel):
            last = block.proj_out
        else:
            continue
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return model


def scheduler() -> Any:
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
    )
