"""Maps module names of diffusers' networks to those of the models' original code, which other tools use.

The names are those in the published checkpoints (for CogVideoX, in ComfyUI, the only tool with its own names).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Layers = Mapping[str, tuple[Tensor, Tensor]]

_PART = "#"  # before a part of a module that combines several of diffusers': "attn.qkv#k"

# From diffusers' full name to the original one.
_SD3 = (
    (r"transformer_blocks\.(\d+)\.(attn2?)\.to_([qkv])", r"joint_blocks.\1.x_block.\2.qkv#\3"),
    (r"transformer_blocks\.(\d+)\.attn\.add_([qkv])_proj", r"joint_blocks.\1.context_block.attn.qkv#\2"),
    (r"transformer_blocks\.(\d+)\.(attn2?)\.to_out\.0", r"joint_blocks.\1.x_block.\2.proj"),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"joint_blocks.\1.context_block.attn.proj"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"joint_blocks.\1.x_block.mlp.fc1"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"joint_blocks.\1.x_block.mlp.fc2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj", r"joint_blocks.\1.context_block.mlp.fc1"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.2", r"joint_blocks.\1.context_block.mlp.fc2"),
    (r"transformer_blocks\.(\d+)\.norm1\.linear", r"joint_blocks.\1.x_block.adaLN_modulation.1"),
    (r"transformer_blocks\.(\d+)\.norm1_context\.linear", r"joint_blocks.\1.context_block.adaLN_modulation.1"),
    (r"time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
    (r"time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
    (r"pos_embed\.proj", "x_embedder.proj"),
    (r"context_embedder", "context_embedder"),
    (r"norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"proj_out", "final_layer.linear"),
)
_WAN = (
    (r"blocks\.(\d+)\.attn1\.to_([qkv])", r"blocks.\1.self_attn.\2"),
    (r"blocks\.(\d+)\.attn1\.to_out\.0", r"blocks.\1.self_attn.o"),
    (r"blocks\.(\d+)\.attn2\.to_([qkv])", r"blocks.\1.cross_attn.\2"),
    (r"blocks\.(\d+)\.attn2\.to_out\.0", r"blocks.\1.cross_attn.o"),
    (r"blocks\.(\d+)\.ffn\.net\.0\.proj", r"blocks.\1.ffn.0"),
    (r"blocks\.(\d+)\.ffn\.net\.2", r"blocks.\1.ffn.2"),
    (r"condition_embedder\.(time|text)_embedder\.linear_1", r"\1_embedding.0"),
    (r"condition_embedder\.(time|text)_embedder\.linear_2", r"\1_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"patch_embedding", "patch_embedding"),
    (r"proj_out", "head.head"),
)
_COGVIDEOX = (
    (r"transformer_blocks\.(\d+)\.attn1\.to_([qkv])", r"blocks.\1.\2"),
    (r"transformer_blocks\.(\d+)\.attn1\.to_out\.0", r"blocks.\1.attn_out"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"blocks.\1.ff_proj"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"blocks.\1.ff_out"),
    (r"transformer_blocks\.(\d+)\.(norm[12])\.linear", r"blocks.\1.\2.linear"),
    (r"time_embedding\.(linear_[12])", r"time_embedding_\1"),
    (r"(patch_embed\.proj|patch_embed\.text_proj|norm_out\.linear|proj_out)", r"\1"),
)
# FLUX.1, and Chroma, which has no modulation layers but one module that makes all of them.
_FLUX = (
    (r"transformer_blocks\.(\d+)\.attn\.to_([qkv])", r"double_blocks.\1.img_attn.qkv#\2"),
    (r"transformer_blocks\.(\d+)\.attn\.add_([qkv])_proj", r"double_blocks.\1.txt_attn.qkv#\2"),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"double_blocks.\1.img_mlp.0"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"double_blocks.\1.img_mlp.2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj", r"double_blocks.\1.txt_mlp.0"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.2", r"double_blocks.\1.txt_mlp.2"),
    (r"transformer_blocks\.(\d+)\.norm1\.linear", r"double_blocks.\1.img_mod.lin"),
    (r"transformer_blocks\.(\d+)\.norm1_context\.linear", r"double_blocks.\1.txt_mod.lin"),
    (r"single_transformer_blocks\.(\d+)\.attn\.to_([qkv])", r"single_blocks.\1.linear1#\2"),
    (r"single_transformer_blocks\.(\d+)\.proj_mlp", r"single_blocks.\1.linear1#m"),
    (r"single_transformer_blocks\.(\d+)\.proj_out", r"single_blocks.\1.linear2"),
    (r"single_transformer_blocks\.(\d+)\.norm\.linear", r"single_blocks.\1.modulation.lin"),
    (r"time_text_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
    (r"time_text_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
    (r"time_text_embed\.guidance_embedder\.linear_1", "guidance_in.in_layer"),
    (r"time_text_embed\.guidance_embedder\.linear_2", "guidance_in.out_layer"),
    (r"time_text_embed\.text_embedder\.linear_1", "vector_in.in_layer"),
    (r"time_text_embed\.text_embedder\.linear_2", "vector_in.out_layer"),
    (r"distilled_guidance_layer\.(in_proj|out_proj)", r"distilled_guidance_layer.\1"),
    (r"distilled_guidance_layer\.layers\.(\d+)\.linear_1", r"distilled_guidance_layer.layers.\1.in_layer"),
    (r"distilled_guidance_layer\.layers\.(\d+)\.linear_2", r"distilled_guidance_layer.layers.\1.out_layer"),
    (r"x_embedder", "img_in"),
    (r"context_embedder", "txt_in"),
    (r"norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"proj_out", "final_layer.linear"),
)
# FLUX.2, whose blocks share their modulation layers, and whose single blocks are fused in diffusers too.
_FLUX2 = (
    *_FLUX,
    (r"transformer_blocks\.(\d+)\.ff\.linear_in", r"double_blocks.\1.img_mlp.0"),
    (r"transformer_blocks\.(\d+)\.ff\.linear_out", r"double_blocks.\1.img_mlp.2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.linear_in", r"double_blocks.\1.txt_mlp.0"),
    (r"transformer_blocks\.(\d+)\.ff_context\.linear_out", r"double_blocks.\1.txt_mlp.2"),
    (r"single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1"),
    (r"single_transformer_blocks\.(\d+)\.attn\.to_out", r"single_blocks.\1.linear2"),
    (r"(double_stream_modulation_(?:img|txt)|single_stream_modulation)\.linear", r"\1.lin"),
    (r"time_guidance_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
    (r"time_guidance_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
    (r"time_guidance_embed\.guidance_embedder\.linear_1", "guidance_in.in_layer"),
    (r"time_guidance_embed\.guidance_embedder\.linear_2", "guidance_in.out_layer"),
)
_LUMINA2 = (
    (r"((?:noise_refiner|context_refiner|layers)\.\d+)\.attn\.to_([qkv])", r"\1.attention.qkv#\2"),
    (r"((?:noise_refiner|context_refiner|layers)\.\d+)\.attn\.to_out\.0", r"\1.attention.out"),
    (r"((?:noise_refiner|context_refiner|layers)\.\d+)\.feed_forward\.linear_([123])", r"\1.feed_forward.w\2"),
    (r"((?:noise_refiner|layers)\.\d+)\.norm1\.linear", r"\1.adaLN_modulation.1"),
    (r"time_caption_embed\.caption_embedder\.1", "cap_embedder.1"),
    (r"time_caption_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"time_caption_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"x_embedder", "x_embedder"),
    (r"norm_out\.linear_1", "final_layer.adaLN_modulation.1"),
    (r"norm_out\.linear_2", "final_layer.linear"),
)
_TABLES: dict[str, Sequence[tuple[str, str]]] = {
    "sd3": _SD3,
    "flux": _FLUX,
    "flux-kontext": _FLUX,
    "chroma": _FLUX,
    "flux2": _FLUX2,
    "flux2-klein": _FLUX2,
    "lumina2": _LUMINA2,
    "cogvideox": _COGVIDEOX,
    "wan": _WAN,
}
# Families whose last modulation layer has the shift first in the original code; diffusers has the scale first.
_SHIFT_BEFORE_SCALE = ("sd3", "flux", "flux-kontext", "flux2", "flux2-klein")

# The UNets of SD1.5 and SDXL: the original code numbers their blocks consecutively.
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_UNET_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def original_layers(family: str, layers: Layers, config: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns LoRA layers under the original names.

    If the original code has one module for several of diffusers' (SD3's queries, keys and values), their layers become
    one layer whose rank is the sum of theirs, without rounding.

    Args:
        family: the family's name.
        layers: by diffusers' names, ``(A [rank, in, ...], B [out, rank, ...])``.
        config: the network's configuration, needed only for SDXL and Lumina 2.

    Raises:
        ValueError: a module has no original name.
    """
    plain: dict[str, tuple[Tensor, Tensor]] = {}
    parts: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for module, (a, b) in layers.items():
        name, _, part = _original(family, module, config).partition(_PART)
        if part:
            parts.setdefault(name, {})[part] = (a, b)
            continue
        if family in _SHIFT_BEFORE_SCALE and "adaLN_modulation" in name and len(b) == 2 * a.shape[1]:
            b = torch.cat(b.chunk(2)[::-1])
        plain[name] = (a, b)
    heights = dict.fromkeys("qkv", 1)
    if family == "lumina2":
        heights = {"q": config["num_attention_heads"], "k": config["num_kv_heads"], "v": config["num_kv_heads"]}
    with_mlp = heights | {"m": 4}  # the feed-forward part's first layer
    return plain | {
        name: _stacked(held, with_mlp if name.endswith("linear1") else heights) for name, held in parts.items()
    }


def _stacked(parts: Mapping[str, tuple[Tensor, Tensor]], heights: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """Stacks layers into one, with zeros for a part that is not adapted; ``heights`` are the parts' relative rows."""
    part, (_, b) = next(iter(parts.items()))
    rows = len(b) // heights[part]
    up = torch.zeros(rows * sum(heights.values()), sum(len(a) for a, _ in parts.values()), dtype=torch.float32)
    row = column = 0
    for part, height in heights.items():
        if part in parts:
            b = parts[part][1]
            up[row : row + len(b), column : column + b.shape[1]] = b
            column += b.shape[1]
        row += height * rows
    return torch.cat([parts[part][0] for part in heights if part in parts]), up


def _original(family: str, module: str, config: Mapping[str, Any]) -> str:
    if family == "sdxl":
        original = _unet(module, config)
    else:
        matches = ((re.fullmatch(pattern, module), name) for pattern, name in _TABLES[family])
        original = next((match.expand(name) for match, name in matches if match), None)
    if original is None:
        raise ValueError(f"{module}: {family}'s original code has no module for it, expected another target_modules")
    return original


def _unet(module: str, config: Mapping[str, Any]) -> str | None:
    layers = config["layers_per_block"]
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", module)
    if match is None:
        for name, original in _UNET_ENDS.items():
            if module == name or module.startswith(f"{name}."):
                inner = module.removeprefix(name).removeprefix(".")
                return ".".join(filter(None, (original, _UNET_RESNET.get(inner, inner))))
        return None
    side, block, kind, layer, inner = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{(layers + 1) * (block + 1)}.0.op"
    first = 1 + (layers + 1) * block if side == "down" else (layers + 1) * block
    place = f"{'input' if side == 'down' else 'output'}_blocks.{first + (layers if kind == 'upsamplers' else layer)}"
    if kind == "upsamplers":
        return f"{place}.{2 if 'CrossAttn' in config['up_block_types'][block] else 1}.{inner}"
    return f"{place}.1.{inner}" if kind == "attentions" else f"{place}.0.{_UNET_RESNET.get(inner, inner)}"
