"""How the embedded base model was made: `python -m dbtrain.tiny.build [FOLDER]`.

An ordinary Stable Diffusion in miniature. Its weights are random and untrained: good for seeing
every part of the system work, not for looking at pictures.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dbtrain import rng, tiny

SEED = 0
SIDE = 64  # px
TOKENS = 32
WORDS = """a an the photo picture of in on at with and to by from dog cat mug ball house fish car tree boot
robot teapot backpack toy flower red green blue yellow white black orange purple pink brown grey beach snow
grass city night table space water mountain forest garden street bucket basket stripes dots checks big small
old new wooden sitting standing running sleeping wearing painting drawing close up background""".split()


def tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE with a small vocabulary: all bytes, and merges that make WORDS one token."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    letters = pre_tokenizers.ByteLevel.alphabet()
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=end))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, end_of_word_suffix="</w>", initial_alphabet=sorted(letters)
    )
    learner.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    merges: Any = [tuple(pair) for pair in _merges(learner)]
    bases = sorted(letters) + [f"{letter}</w>" for letter in sorted(letters)]
    names = dict.fromkeys([*bases, *("".join(pair) for pair in merges), start, end])
    return CLIPTokenizer(
        vocab={name: number for number, name in enumerate(names)}, merges=merges, model_max_length=TOKENS
    )


def pipeline() -> Any:
    """The whole pipeline with random weights, a function of SEED."""
    words = tokenizer()
    with rng.seeded("tiny", SEED):
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words), max_position_embeddings=TOKENS, hidden_size=64, intermediate_size=128,
                num_hidden_layers=2, num_attention_heads=4, projection_dim=64,
                bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
                pad_token_id=words.pad_token_id,
            )
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(8, 16, 16, 16), latent_channels=4, norm_num_groups=8, sample_size=SIDE,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
        )  # fmt: skip
        unet = UNet2DConditionModel(
            block_out_channels=(32, 64), layers_per_block=1, sample_size=SIDE // 8, cross_attention_dim=64,
            attention_head_dim=4, norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
    )
    return StableDiffusionPipeline(
        vae, text_encoder, words, unet, scheduler, None, None, requires_safety_checker=False
    )  # fmt: skip


def main(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    pipeline().to(torch.float16).save_pretrained(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 2**20:.1f} MiB")


def _merges(learner: Tokenizer) -> list[list[str]]:
    return [
        m.split(" ") if isinstance(m, str) else m for m in json.loads(learner.to_str())["model"]["merges"]
    ]


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else tiny.path())
