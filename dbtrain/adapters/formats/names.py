"""Names of modules and of their tensors in adapter files, whoever wrote them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from math import prod

from torch import Tensor

from dbtrain.adapters.formats.common import Names
from dbtrain.adapters.state import MAGNITUDE
from dbtrain.models.families.family import Family
from dbtrain.runtime.errors import ConfigError

Modules = Mapping[str, Mapping[str, int]]
"""By component: the layers that an adapter can be on, in the base's order, and how many outputs each has."""
Layers = dict[str, dict[str, Tensor]]  # module -> name of the tensor within it -> tensor

# How files call the tensors of a layer -> PEFT's name. `\1` is a module's name within an attention layer.
PARTS = (
    (r"\.processor\.(to_\w+?)_lora\.down\.weight", r".\1.lora_A.weight"),  # Diffusers before PEFT
    (r"\.processor\.(to_\w+?)_lora\.up\.weight", r".\1.lora_B.weight"),
    (r"\.self_attn\.to_(q|k|v|out)_lora\.down\.weight", r".self_attn.\1_proj.lora_A.weight"),
    (r"\.self_attn\.to_(q|k|v|out)_lora\.up\.weight", r".self_attn.\1_proj.lora_B.weight"),
    (r"\.(?:lora_|lora\.|lora_linear_layer\.)down\.weight", ".lora_A.weight"),
    (r"\.(?:lora_|lora\.|lora_linear_layer\.)up\.weight", ".lora_B.weight"),
    (r"\.lora_([AB])(?:\.\w+)?\.(weight|bias)", r".lora_\1.\2"),
    (rf"\.{MAGNITUDE}(?:\.\w+)*", f".{MAGNITUDE}"),
    (r"\.((?:hada|lokr)_(?:w[12](?:_[ab])?|t[12]))(?:\.\w+)?", r".\1"),
    (r"\.(alpha|dora_scale|lora_mid\.weight)", r".\1"),
)  # fmt: skip

# Tensors of adapters that no kind of dbtrain can hold.
UNREAD = (
    (r"(bundle_emb|emb_params|string_to_param|clip_[lg]$)\b.*", "an embedding (textual inversion)"),
    (r"(control_model|controlnet_.*|input_hint_block)\..*", "a ControlNet"),
    (r".*\.(diff|diff_b|set_weight|set_bias)", "changes of whole weights (LyCORIS's `full`)"),
    (r".*\.(w_norm|b_norm)", "a trained normalization layer"),
    (r".*\.(oft|boft|oft_blocks|oft_diag|oft_R|rescale)\b.*", "an OFT adapter"),
    (r".*\.(a1|a2|b1|b2|bm1|bm2|c1|c2|d1|d2|e1|e2)\.weight", "a GLoRA adapter"),
    (r".*\.(on_input|ia3_l.*)", "an IA3 adapter"),
    (r"(model\.diffusion_model|first_stage_model|cond_stage_model)\..*", "a whole model"),
)  # fmt: skip

# Layers that tell what an adapter is for which does not fit the base.
TRANSFORMER = r"(lora_)?(transformer|te3|text_encoder_3)[._].*|(.*[._])?(double|single|joint)_blocks[._].*"

# A norm's modulation in the original code of transformers ends with this name. Where it is of a shift and a
# scale alone, Diffusers has the scale first.
MODULATION = ".adaLN_modulation.1"
# The tensors of a layer with a row for each of its outputs, and with a column for each of its inputs.
OUTPUTS = ("lora_B.weight", "lora_B.bias", "dora_scale", "hada_w1_a", "hada_w2_a", "lokr_w1", "lokr_w1_a")
INPUTS = ("lora_A.weight", "hada_w1_b", "lokr_w1", "lokr_w1_b", "lokr_w2", "lokr_w2_b")

# Diffusers -> the original UNet code (sgm), within a residual block and outside the blocks.
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTSIDE = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip


def nested(name: str) -> str:
    """A module's name in files: CLIP layers are below `text_model.`."""
    return f"text_model.{name}" if name.startswith(("encoder.layers.", "final_layer_norm")) else name


def sgm_names(names: Collection[str]) -> dict[str, str]:
    """The modules of a UNet: Diffusers' name -> the name in the original code of Stable Diffusion (sgm).

    Blocks are numbered through, and each ends with its down- or upsampler. Modules without a name there are
    left out. `names` must be all of the UNet's, of which the numbers follow.
    """
    first = [found[1] for name in names if (found := re.match(r"down_blocks\.0\.resnets\.(\d+)", name))]
    a_block = max(map(int, first), default=0) + 2  # a block's residual layers, and its sampler
    attends = {found[1] for name in names if (found := re.match(r"up_blocks\.(\d+)\.attentions\.", name))}
    places = {name: OUTSIDE[name] for name in names if name in OUTSIDE}
    for name in names:
        found = re.fullmatch(
            r"(down|mid|up)_blocks?(?:\.(\d+))?\.(resnets|attentions|\w+samplers)\.(\d+)(?:\.(.+))?", name
        )
        if not found:
            continue
        side, block, kind, number, rest = found[1], found[2] or "0", found[3], int(found[4]), found[5] or ""
        sampler, attention = kind.endswith("samplers"), int(kind == "attentions")
        row = int(block) * a_block + (a_block - 1 if sampler else number)
        start = {
            "down": f"input_blocks.{1 + row}.{attention}",
            "mid": f"middle_block.{1 if attention else 2 * number}",
            "up": f"output_blocks.{row}.{1 + (block in attends) if sampler else attention}",
        }[side]
        inner = RESNET if kind == "resnets" else {"conv": "op"} if kind == "downsamplers" else {}
        places[name] = f"{start}.{inner.get(rest, rest)}".removesuffix(".")
    return places


def kohya_names(family: Family, component: str, layers: Iterable[str], names: Names | None) -> dict[str, str]:
    """Layer -> its name in kohya's files."""
    places: dict[str, str] = {}
    if family.sgm and component == family.denoiser:
        assert names, "the places in the original code follow from the whole UNet"
        places = sgm_names(names(component))
    prefix = family.kohya[component]
    return {layer: f"{prefix}_{places.get(layer, nested(layer))}".replace(".", "_") for layer in layers}


def original_names(family: Family, names: Iterable[str]) -> dict[str, list[str]]:
    """Name in the original code of a transformer -> the modules that it has as one, in the order there."""
    places: dict[str, list[str]] = {}
    for pattern, original in family.original:
        for name in names:
            if found := re.fullmatch(pattern, name):
                places.setdefault(found.expand(original), []).append(name)
    return places


def _known(family: Family, modules: Modules) -> dict[str, tuple[str, tuple[str, ...], bool]]:
    """Every name that files have for a module, with `_` for `.` -> its component and name.

    One name in the original code can cover several modules. The last value: whether it is a modulation.
    """
    known: dict[str, tuple[str, tuple[str, ...], bool]] = {}
    for component, names in modules.items():
        prefixes = [f"{component}_", ""]
        if component in family.kohya:
            prefixes.append(f"{family.kohya[component]}_")
        places: dict[str, str] = {}
        originals: dict[str, list[str]] = {}
        if component == family.denoiser:
            places, originals = sgm_names(names), original_names(family, names)
            prefixes += ["lora_unet_", "lycoris_", "diffusion_model_"]
            prefixes += [f"{trainer}_{component}_" for trainer in ("lora", "lycoris")]
        elif component == "text_encoder":
            prefixes += ["lora_te_", "lora_te1_"]
        else:
            prefixes.append(f"lora_te{component.removeprefix('text_encoder_')}_")
        spelled: list[tuple[str, tuple[str, ...]]] = [
            (spelling, (name,))
            for name in filter(None, names)
            for spelling in (name, nested(name), name.removeprefix("text_model."), places.get(name, name))
        ]
        spelled += [(original, tuple(found)) for original, found in originals.items()]
        for spelling, found in spelled:
            for prefix in prefixes:
                its = component, found, spelling.endswith(MODULATION) and spelling not in found
                known.setdefault(f"{prefix}{spelling}".replace(".", "_"), its)
    return known


def is_adapter(name: str) -> bool:
    """Whether a tensor's name is one of an adapter, not of the base."""
    return any(re.fullmatch(rf".+?{pattern}", name) for pattern, _ in PARTS)


def layers_in(
    tensors: Mapping[str, Tensor], family: Family, modules: Modules
) -> dict[str, dict[tuple[str, ...], dict[str, Tensor]]]:
    """The layers of an adapter file by component, under the base's module names and PEFT's tensor names.

    A layer of the original code is under the names of all modules that it stands for. Raises ConfigError
    that says what the file is if it is not an adapter of this base.
    """
    known = _known(family, modules)
    found: dict[str, dict[tuple[str, ...], dict[str, Tensor]]] = {}
    modulations: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, part = split(key)
        plain = module.replace(".", "_").replace("base_model_model_", "")
        where = known.get(plain) or known.get(f"{plain}_0" if plain.endswith("to_out") else "")
        if where is None:
            raise ConfigError(_unknown(key, module, family))
        component, names, modulates = where
        layer = found.setdefault(component, {}).setdefault(names, {})
        if part in layer:
            raise ConfigError(f"it has two tensors for {names[0]}.{part}, one of them {key}")
        layer[part] = tensor
        if modulates:
            modulations[names[0]] = layer
    for module, layer in modulations.items():
        inputs = prod(layer[part].shape[1] for part in INPUTS if part in layer)
        if modules[family.denoiser][module] == 2 * inputs:
            _swap_halves(module, layer)
    return found


def _swap_halves(module: str, layer: dict[str, Tensor]) -> None:
    """Swap the halves of a layer's outputs. Raises ConfigError if its factors do not come apart."""
    for part in layer.keys() & OUTPUTS:
        half, rest = divmod(len(layer[part]), 2)
        if rest:
            raise ConfigError(f"its layer {module} does not come apart into a shift and a scale")
        layer[part] = layer[part].roll(half, 0)


def split(key: str) -> tuple[str, str]:
    """The module's name and PEFT's name of the tensor. Raises ConfigError for tensors of other kinds."""
    for pattern, what in UNREAD:
        if re.fullmatch(pattern, key):
            raise ConfigError(f"its tensor {key} belongs to {what}; dbtrain reads LoRA, LoHa and LoKr")
    for pattern, name in PARTS:
        if found := re.fullmatch(rf"(.+?){pattern}", key):
            whole = found[1] + re.sub(pattern, name, key[found.end(1) :])
            cut = re.fullmatch(r"(.+?)\.((?:lora|hada|lokr)_.*|alpha|dora_scale)", whole)
            assert cut
            return cut[1], cut[2]
    raise ConfigError(f"its tensor {key} matches no format for adapters")


def _unknown(key: str, module: str, family: Family) -> str:
    """What is wrong with a tensor of a layer that the base does not have."""
    if family.denoiser != "transformer" and re.fullmatch(TRANSFORMER, module):
        return f"its tensor {key} belongs to a transformer model's adapter (SD 3, FLUX), not a UNet's"
    kohya = next((prefix for prefix in family.kohya.values() if module.startswith(f"{prefix}_")), None)
    if kohya or module.startswith(("lora_", "lycoris_")):
        return f"the base has no module for its layer {module}"
    component, _, rest = module.partition(".")
    if component in family.adaptable:
        return f"the base's {component} has no module '{rest}'"
    return f"its tensor '{key}' matches no module of {family.name} models"
