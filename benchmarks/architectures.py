"""Published architectures: the classes of a base's components, and settings that are no defaults."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from torch import nn

from dbtrain.models.families import registry as families
from dbtrain.models.families.family import Family
from dbtrain.models.families.transformer import MESSAGE
from dbtrain.models.safety import library


@dataclass(frozen=True)
class Architecture:
    """A base without weights: what its configs say."""

    family: str
    side: int  # px
    tokens: int  # of a prompt
    models: Mapping[str, tuple[str, Mapping[str, Any]]]  # component -> (class, settings)
    scheduler: tuple[str, Mapping[str, Any]]
    index: Mapping[str, Any] = field(default_factory=dict)  # further entries of model_index.json

    @property
    def the_family(self) -> Family:
        return families.get(self.family)

    def makers(self) -> dict[str, Callable[[], nn.Module]]:
        """How to make each component with weights."""
        return {name: partial(_made, name, *one) for name, one in self.models.items()}

    def classes(self) -> dict[str, str]:
        """The class of each component, as in model_index.json."""
        found = {name: kind for name, (kind, _) in self.models.items()}
        for encoder, words in self.the_family.text_encoders.items():
            if encoder in found:
                found[words] = self.the_family.classes[words][0]
        return found | {"scheduler": self.scheduler[0]}


def _made(component: str, kind: str, settings: Mapping[str, Any]) -> nn.Module:
    found = getattr(importlib.import_module(library(component)), kind)
    if library(component) == "transformers":
        return found(found.config_class(**settings))
    return found(**settings)


def tokenizer(kind: str, tokens: int) -> Any:
    """A tokenizer of this class with a small vocabulary, which the embeddings of any published model hold."""
    if kind.startswith("CLIP"):
        from benchmarks.tiny import parts
        from dbtrain.tiny import world

        words = parts.tokenizer([world.caption(world.scene(number), number) for number in range(500)])
        words.model_max_length = tokens
        return words
    if kind.startswith("T5"):
        return t5_words(tokens)
    return qwen_words(MESSAGE, 600) if kind.startswith("Qwen") else mistral_words()


def t5_words(tokens: int) -> Any:
    """T5's kind of tokenizer, in which each printable letter is one token."""
    from transformers import T5Tokenizer

    letters = [chr(code) for code in range(33, 127)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in letters)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=tokens)


CHAT = (  # Qwen3's template, for one message without tools
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + "
    "'<|im_end|>' + '\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}{%- endif %}"
)
MISTRAL = (
    "{{- bos_token }}{%- for message in messages %}{%- for part in message.content %}"
    "{%- if message.role == 'system' %}[SYSTEM_PROMPT]{{ part.text }}[/SYSTEM_PROMPT]"
    "{%- else %}[INST]{{ part.text }}[/INST]{%- endif %}{%- endfor %}{%- endfor %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")


def qwen_words(text: str = "", size: int = 380) -> Any:
    """Qwen's kind of tokenizer: byte-level; the words of its chat and of `text` are one token each."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import Qwen2Tokenizer

    words = Tokenizer(BPE())
    words.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    words.train_from_iterator([f"user assistant system a photo of sks mug dog{text}"] * 10, trainer)
    learnt = json.loads(words.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=learnt["vocab"], merges=[tuple(pair) for pair in learnt["merges"]],
        extra_special_tokens=list(SPECIAL[1:]), chat_template=CHAT, model_max_length=4096,
        pad_token=SPECIAL[0], eos_token=SPECIAL[2],
    )  # fmt: skip


def mistral_words() -> Any:
    """Mistral's kind of tokenizer, byte-level, in place of Pixtral's processor, which needs torchvision."""
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    special = "<unk> <s> </s> <pad> [INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT]".split()
    words = Tokenizer(BPE())
    words.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=380, special_tokens=special, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    words.train_from_iterator([f"a photo of sks mug dog {SYSTEM_MESSAGE}"] * 10, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        chat_template=MISTRAL, model_max_length=4096,
    )  # fmt: skip


def _clip(kind: str) -> tuple[str, Mapping[str, Any]]:
    """CLIP-L, with its projection or without, or OpenCLIP bigG."""
    shared = {"vocab_size": 49408, "max_position_embeddings": 77}
    name = "CLIPTextModel" if kind == "L" else "CLIPTextModelWithProjection"
    if kind == "bigG":
        return name, shared | {
            "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
            "num_attention_heads": 20, "projection_dim": 1280, "hidden_act": "gelu",
        }  # fmt: skip
    return name, shared | {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "projection_dim": 768, "hidden_act": "quick_gelu",
    }  # fmt: skip


def _vae(**settings: Any) -> tuple[str, Mapping[str, Any]]:
    """Latent diffusion's VAE, which shrinks by 8."""
    return "AutoencoderKL", {
        "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
        **settings,
    }  # fmt: skip


def _qwen3(kind: str, width: int, inner: int) -> tuple[str, Mapping[str, Any]]:
    """Qwen3, 4B or 8B by its width."""
    return kind, {
        "vocab_size": 151936, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40960,
    }  # fmt: skip


DDPM = ("DDPMScheduler", {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
                          "steps_offset": 1, "clip_sample": False})  # fmt: skip


def _flow(**settings: Any) -> tuple[str, Mapping[str, Any]]:
    return "FlowMatchEulerDiscreteScheduler", settings


def _flux_vae() -> tuple[str, Mapping[str, Any]]:
    """FLUX.1's VAE, which others use too."""
    return _vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, sample_size=1024)


FRAMES = ("AutoencoderKLQwenImage", dict[str, Any]())  # Qwen-Image's VAE, which others use too
T5 = ("T5EncoderModel", {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
})  # fmt: skip  # T5-XXL


def _flux2_dev() -> Architecture:
    text = {
        "model_type": "mistral", "vocab_size": 131072, "hidden_size": 5120, "intermediate_size": 32768,
        "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 131072,
    }  # fmt: skip
    models = {
        "transformer": ("Flux2Transformer2DModel", {}), "vae": ("AutoencoderKLFlux2", {}),
        "text_encoder": ("Mistral3ForConditionalGeneration", {"text_config": text}),
    }  # fmt: skip
    return Architecture("flux2-dev", 1024, 512, models, _flow(use_dynamic_shifting=True))


def _sd35(blocks: int, heads: int, positions: int, dual: int) -> Architecture:
    """Stable Diffusion 3.5: the first `dual` blocks have a second attention."""
    transformer = {
        "num_layers": blocks, "num_attention_heads": heads, "caption_projection_dim": 64 * heads,
        "pos_embed_max_size": positions, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(dual)),
    }  # fmt: skip
    models = {
        "transformer": ("SD3Transformer2DModel", transformer),
        "vae": _vae(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, sample_size=1024),
        "text_encoder": _clip("L projected"), "text_encoder_2": _clip("bigG"), "text_encoder_3": T5,
    }  # fmt: skip
    return Architecture("sd3", 1024, 77, models, _flow(shift=3.0))


def _klein(double: int, single: int, heads: int, text: int, inner: int) -> Architecture:
    transformer = {
        "num_layers": double, "num_single_layers": single, "num_attention_heads": heads,
        "joint_attention_dim": 3 * text, "guidance_embeds": False,
    }  # fmt: skip
    models = {
        "transformer": ("Flux2Transformer2DModel", transformer), "vae": ("AutoencoderKLFlux2", {}),
        "text_encoder": _qwen3("Qwen3ForCausalLM", text, inner),
    }  # fmt: skip
    index = {"is_distilled": False}
    return Architecture("flux2-klein", 1024, 512, models, _flow(use_dynamic_shifting=True), index)


def _z_image() -> Architecture:
    models = {
        "transformer": ("ZImageTransformer2DModel", {}), "vae": _flux_vae(),
        "text_encoder": _qwen3("Qwen3Model", 2560, 9728),
    }  # fmt: skip
    return Architecture("z-image", 1024, 64, models, _flow(shift=6.0))


@cache
def published() -> dict[str, Architecture]:
    """The architectures by the names that benchmarks have for them."""
    xl = {
        "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return {
        "sd15": Architecture(
            "sd", 512, 77,
            {"unet": ("UNet2DConditionModel", {"sample_size": 64, "cross_attention_dim": 768}),
             "vae": _vae(sample_size=512, scaling_factor=0.18215), "text_encoder": _clip("L")},
            DDPM, {"safety_checker": [None, None], "feature_extractor": [None, None],
                   "requires_safety_checker": False},
        ),
        "sdxl": Architecture(
            "sdxl", 1024, 77,
            {"unet": ("UNet2DConditionModel", xl),
             "vae": _vae(sample_size=1024, scaling_factor=0.13025, force_upcast=True),
             "text_encoder": _clip("L"), "text_encoder_2": _clip("bigG")},
            DDPM, {"force_zeros_for_empty_prompt": True},
        ),
        "klein-4b": _klein(5, 20, 24, 2560, 9728),
        "klein-9b": _klein(8, 24, 32, 4096, 12288),
        "flux2-dev": _flux2_dev(),
        "z-image": _z_image(),
        "flux1-dev": Architecture(
            "flux1", 1024, 77,
            {"transformer": ("FluxTransformer2DModel", {"guidance_embeds": True}), "vae": _flux_vae(),
             "text_encoder": _clip("L"), "text_encoder_2": T5},
            _flow(use_dynamic_shifting=True),
        ),
        "flux1-small": Architecture(  # to measure on a CPU: 0.2 billion weights
            "flux1", 256, 77,
            {"transformer": ("FluxTransformer2DModel", {
                "guidance_embeds": True, "num_layers": 3, "num_single_layers": 6, "num_attention_heads": 8,
                "joint_attention_dim": 1024,
             }),
             "vae": _flux_vae(), "text_encoder": _clip("L"),
             "text_encoder_2": ("T5EncoderModel", {**T5[1], "d_model": 1024, "num_layers": 2})},
            _flow(use_dynamic_shifting=True),
        ),
        "chroma": Architecture(
            "chroma", 1024, 64,
            {"transformer": ("ChromaTransformer2DModel", {}), "vae": _flux_vae(), "text_encoder": T5},
            _flow(),
        ),
        "sd35-medium": _sd35(24, 24, 384, 13),
        "sd35-large": _sd35(38, 38, 192, 0),
        "qwen-image": Architecture(
            "qwen-image", 1024, 64,
            {"transformer": ("QwenImageTransformer2DModel", {}), "vae": FRAMES,
             "text_encoder": ("Qwen2_5_VLForConditionalGeneration", {
                "text_config": {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
                                "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
                                "max_position_embeddings": 128000,
                                "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]}},
                "vision_config": {"depth": 32, "hidden_size": 1280, "out_hidden_size": 3584},
             })},
            _flow(use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02),
        ),
        "krea2": Architecture(
            "krea2", 1024, 64,
            {"transformer": ("Krea2Transformer2DModel", {}), "vae": FRAMES,
             "text_encoder": ("Qwen3VLModel", {
                "text_config": {"vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728,
                                "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
                                "rope_parameters": {"rope_type": "default", "mrope_section": [24, 20, 20]}},
                "vision_config": {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096,
                                  "out_hidden_size": 2560, "deepstack_visual_indexes": [5, 11, 17]},
             })},
            _flow(use_dynamic_shifting=True, max_image_seq_len=6400),
        ),
    }  # fmt: skip
