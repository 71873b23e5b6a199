"""What the embedded base consists of: an ordinary Stable Diffusion in miniature."""

from __future__ import annotations

import json
from typing import Any

from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dbtrain.tiny.paint import SIDE

TOKENS = 24
LATENTS = 8  # channels


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
    return AutoencoderKL(
        block_out_channels=(24, 48, 64, 64), layers_per_block=1, norm_num_groups=8, latent_channels=LATENTS,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=SIDE,
    )  # fmt: skip


def text_encoder(words: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words), max_position_embeddings=TOKENS, hidden_size=128, intermediate_size=512,
            num_hidden_layers=3, num_attention_heads=4, projection_dim=128,
            bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
        )
    )  # fmt: skip


def unet() -> Any:
    return UNet2DConditionModel(
        block_out_channels=(96, 128), layers_per_block=1, sample_size=SIDE // 8, in_channels=LATENTS,
        out_channels=LATENTS, cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
    )  # fmt: skip


def scheduler() -> Any:
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
    )
