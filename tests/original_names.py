"""The modules of the families' models as their original code names them, and ComfyUI's and kohya's ways to find them.

Written from the models' own definitions and from ComfyUI's loader (``comfy/lora.py``, ``comfy/weight_adapter/lora.py``,
``comfy/utils.py``), not from ``sipo.families.lora_names``: what is called what in diffusers comes from diffusers' own
converters of original checkpoints. Names are those of full size, tensors have a few elements.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

WIDTH = 4  # columns of every weight, and rows of most
Rows = dict[str, list[int]]  # of a weight, by its name: which rows of all rows of the model


def _unet(down: list[int], middle: int, up: list[int], added: bool) -> Iterator[str]:
    """Linear layers and convolutions of an ldm UNet of two layers a block; the depth of its transformers by block."""

    def resnet(place: str, shortcut: bool) -> Iterator[str]:
        yield from (f"{place}.in_layers.2", f"{place}.emb_layers.1", f"{place}.out_layers.3")
        if shortcut:
            yield f"{place}.skip_connection"

    def transformer(place: str, depth: int) -> Iterator[str]:
        yield from (f"{place}.proj_in", f"{place}.proj_out")
        for i in range(depth):
            block = f"{place}.transformer_blocks.{i}"
            for attention in ("attn1", "attn2"):
                yield from (f"{block}.{attention}.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0"))
            yield from (f"{block}.ff.net.0.proj", f"{block}.ff.net.2")

    yield from ("time_embed.0", "time_embed.2", "input_blocks.0.0", "out.2")
    if added:
        yield from ("label_emb.0.0", "label_emb.0.2")
    place = 1
    for block, depth in enumerate(down):
        for layer in range(2):
            yield from resnet(f"input_blocks.{place}.0", shortcut=layer == 0 and block in (1, 2))
            if depth:
                yield from transformer(f"input_blocks.{place}.1", depth)
            place += 1
        if block < len(down) - 1:
            yield f"input_blocks.{place}.0.op"
            place += 1
    yield from resnet("middle_block.0", shortcut=False)
    yield from transformer("middle_block.1", middle)
    yield from resnet("middle_block.2", shortcut=False)
    place = 0
    for block, depth in enumerate(up):
        for layer in range(3):
            yield from resnet(f"output_blocks.{place}.0", shortcut=True)
            if depth:
                yield from transformer(f"output_blocks.{place}.1", depth)
            if layer == 2 and block < len(up) - 1:
                yield f"output_blocks.{place}.{2 if depth else 1}.conv"
            place += 1


def _sd3(depth: int = 24, dual: int = 13) -> Iterator[str]:
    """Stable Diffusion 3.5 medium."""
    yield from ("x_embedder.proj", "context_embedder", "t_embedder.mlp.0", "t_embedder.mlp.2")
    yield from ("y_embedder.mlp.0", "y_embedder.mlp.2", "final_layer.linear", "final_layer.adaLN_modulation.1")
    for i in range(depth):
        for side in ("context_block", "x_block"):
            block = f"joint_blocks.{i}.{side}"
            yield from (f"{block}.attn.qkv", f"{block}.adaLN_modulation.1")
            if side == "x_block" or i < depth - 1:  # what the text becomes after the last block, nobody asks
                yield from (f"{block}.attn.proj", f"{block}.mlp.fc1", f"{block}.mlp.fc2")
        if i < dual:
            yield from (f"joint_blocks.{i}.x_block.attn2.qkv", f"joint_blocks.{i}.x_block.attn2.proj")


def _wan(depth: int = 30) -> Iterator[str]:
    """Wan 2.1 text to video, 1.3B."""
    yield from ("patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2")
    yield from ("time_projection.1", "head.head")
    for i in range(depth):
        for attention in ("self_attn", "cross_attn"):
            yield from (f"blocks.{i}.{attention}.{part}" for part in "qkvo")
        yield from (f"blocks.{i}.ffn.0", f"blocks.{i}.ffn.2")


def _flux(chroma: bool, depth: int = 2) -> Iterator[str]:
    """FLUX.1, or Chroma. Two blocks of each kind: diffusers' converter takes single blocks only in full width."""
    yield from ("img_in", "txt_in", "final_layer.linear")
    if chroma:
        yield from ("distilled_guidance_layer.in_proj", "distilled_guidance_layer.out_proj")
        for i in range(depth):
            yield from (f"distilled_guidance_layer.layers.{i}.{part}_layer" for part in ("in", "out"))
    else:
        yield "final_layer.adaLN_modulation.1"
        for embedder in ("time_in", "vector_in", "guidance_in"):
            yield from (f"{embedder}.in_layer", f"{embedder}.out_layer")
    for i in range(depth):
        for side in ("img", "txt"):
            yield from (f"double_blocks.{i}.{side}_{part}" for part in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2"))
            if not chroma:
                yield f"double_blocks.{i}.{side}_mod.lin"
        yield from (f"single_blocks.{i}.linear1", f"single_blocks.{i}.linear2")
        if not chroma:
            yield f"single_blocks.{i}.modulation.lin"


def _qwen_image(depth: int = 2) -> Iterator[str]:
    """Qwen-Image and its editing models, which were published with diffusers' names."""
    yield from ("img_in", "txt_in", "norm_out.linear", "proj_out")
    yield from (f"time_text_embed.timestep_embedder.linear_{i}" for i in (1, 2))
    for i in range(depth):
        block = f"transformer_blocks.{i}"
        yield from (f"{block}.attn.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out"))
        yield from (f"{block}.attn.add_{part}_proj" for part in "qkv")
        for side in ("img", "txt"):
            yield from (f"{block}.{side}_mlp.net.0.proj", f"{block}.{side}_mlp.net.2", f"{block}.{side}_mod.1")


def _flux2(guidance: bool, double: int, single: int) -> Iterator[str]:
    """FLUX.2; klein is told no guidance scale."""
    yield from ("img_in", "txt_in", "final_layer.linear", "final_layer.adaLN_modulation.1", "time_in.in_layer")
    yield from ("time_in.out_layer", *(("guidance_in.in_layer", "guidance_in.out_layer") if guidance else ()))
    yield from (f"{name}.lin" for name in ("double_stream_modulation_img", "double_stream_modulation_txt"))
    yield "single_stream_modulation.lin"
    for i in range(double):
        for side in ("img", "txt"):
            yield from (f"double_blocks.{i}.{side}_{part}" for part in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2"))
    for i in range(single):
        yield from (f"single_blocks.{i}.linear1", f"single_blocks.{i}.linear2")


def _lumina2(modulation: int, depth: int = 2) -> Iterator[str]:
    """Lumina Image 2.0 and Z-Image, with fewer layers."""
    yield from ("x_embedder", "t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1")
    yield from ("final_layer.linear", "final_layer.adaLN_modulation.1")
    for block in ("noise_refiner.0", "context_refiner.0", *(f"layers.{i}" for i in range(depth))):
        yield from (f"{block}.attention.qkv", f"{block}.attention.out")
        yield from (f"{block}.feed_forward.w{i}" for i in (1, 2, 3))
        if not block.startswith("context"):
            yield f"{block}.adaLN_modulation.{modulation}"


# CogVideoX: ComfyUI's class (comfy/ldm/cogvideo/model.py) against diffusers'; nobody else has names for it.
COGVIDEOX = {
    "patch_embed.proj": "patch_embed.proj",
    "patch_embed.text_proj": "patch_embed.text_proj",
    "time_embedding_linear_1": "time_embedding.linear_1",
    "time_embedding_linear_2": "time_embedding.linear_2",
    "norm_out.linear": "norm_out.linear",
    "proj_out": "proj_out",
}
for _i in range(30):
    COGVIDEOX |= {
        f"blocks.{_i}.{ours}": f"transformer_blocks.{_i}.{theirs}"
        for ours, theirs in (
            ("q", "attn1.to_q"),
            ("k", "attn1.to_k"),
            ("v", "attn1.to_v"),
            ("attn_out", "attn1.to_out.0"),
            ("ff_proj", "ff.net.0.proj"),
            ("ff_out", "ff.net.2"),
            ("norm1.linear", "norm1.linear"),
            ("norm2.linear", "norm2.linear"),
        )
    }

FLUX = ("flux", "flux-kontext", "chroma")
QWEN_IMAGE = ("qwen-image", "qwen-image-edit", "qwen-image-edit-plus")
MODULES = {
    "sd15": list(_unet([1, 1, 1, 0], 1, [0, 1, 1, 1], added=False)),
    "sdxl": list(_unet([0, 2, 10], 10, [10, 2, 0], added=True)),
    "sd3": list(_sd3()),
    "flux": list(_flux(chroma=False)),
    "flux-kontext": list(_flux(chroma=False)),
    "chroma": list(_flux(chroma=True)),
    "flux2": list(_flux2(True, 8, 48)),
    "flux2-klein": list(_flux2(False, 5, 20)),
    "wan": list(_wan()),
    "cogvideox": list(COGVIDEOX),
    **{family: list(_qwen_image()) for family in QWEN_IMAGE},
    "z-image": list(_lumina2(0)),
    "lumina2": list(_lumina2(1)),
}
NETWORK_CONFIGS: dict[str, dict[str, Any]] = {
    "lumina2": {"num_attention_heads": 24, "num_kv_heads": 8},
    "sd15": {"layers_per_block": 2},
    "sdxl": {
        "layers_per_block": 2,
        "addition_embed_type": "text_time",
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    },
}


@functools.cache
def original_rows(family: str) -> Rows:
    """The rows of every weight by its original name, numbered through."""
    rows, first = {}, 0
    for module in MODULES[family]:
        count = WIDTH * (3 if module.endswith(("qkv", "modulation.lin")) else 6 if module.endswith("_mod.lin") else 1)
        if family == "lumina2" and module.endswith("qkv"):
            count = 2304 + 768 + 768
        elif "adaLN_modulation" in module:  # shift and scale of the last layers, and six of the others
            last = module.startswith(("final_layer", "joint_blocks.23.context_block"))
            count = WIDTH * (2 if last else 6)
        elif module.endswith("linear1") and not family.startswith(
            "flux2"
        ):  # queries, keys and values, and four times as much of the feed-forward part
            count = 7 * 3072
        rows[module] = list(range(first, first + count))
        first += count
    return rows


@functools.cache
def diffusers_rows(family: str) -> Rows:
    """Which of these rows diffusers puts where, by its modules."""
    from diffusers import QwenImageTransformer2DModel
    from diffusers.loaders import single_file_utils as converters

    original = original_rows(family)
    if family == "cogvideox":
        return {theirs: original[ours] for ours, theirs in COGVIDEOX.items()}
    if family in QWEN_IMAGE:  # nothing is converted
        with torch.device("meta"):
            network = QwenImageTransformer2DModel(num_layers=2)
        return {name: original[name] for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)}
    start = "model.diffusion_model."
    weights = {
        f"{start}{module}.{kind}": torch.tensor(rows, dtype=torch.float64)[:, None]
        for module, rows in original.items()
        for kind in ("weight", "bias")
    }
    if family == "sd3":
        weights[f"{start}pos_embed"] = torch.zeros(1)
        converted = converters.convert_sd3_transformer_checkpoint_to_diffusers(weights)
    elif family in FLUX:
        norms = [f"double_blocks.{i}.{side}_attn" for i in range(2) for side in ("img", "txt")]
        norms = [
            f"{place}.norm.{part}_norm"
            for place in (*norms, "single_blocks.0", "single_blocks.1")
            for part in ("query", "key")
        ]
        norms += [f"distilled_guidance_layer.norms.{i}" for i in range(2)]
        weights |= {f"{start}{norm}.scale": torch.zeros(0) for norm in norms}
        name = "chroma" if family == "chroma" else "flux"
        converted = getattr(converters, f"convert_{name}_transformer_checkpoint_to_diffusers")(weights)
    elif family.startswith("flux2"):
        converted = converters.convert_flux2_transformer_checkpoint_to_diffusers(
            {name.removeprefix(start): weight for name, weight in weights.items()}
        )
    elif family == "z-image":
        converted = converters.convert_z_image_transformer_checkpoint_to_diffusers(weights)
    elif family == "lumina2":
        converted = converters.convert_lumina2_to_diffusers(
            {name.removeprefix(start): weight for name, weight in weights.items()}
        )
    elif family == "wan":
        converted = converters.convert_wan_transformer_to_diffusers(weights)
    else:
        converted = converters.convert_ldm_unet_checkpoint(weights, NETWORK_CONFIGS[family])
    return {
        name.removesuffix(".weight"): [int(row) for row in tensor.flatten()]
        for name, tensor in converted.items()
        if name.endswith(".weight") and tensor.numel()
    }


def comfyui_keys(family: str) -> Rows:
    """The names that ComfyUI looks for in a file, and the rows of its model that each stands for."""
    keys: Rows = {}
    for module, rows in original_rows(family).items():
        keys[f"diffusion_model.{module}"] = rows
        keys[f"lora_unet_{module.replace('.', '_')}"] = rows
    if family in ("sd15", "sdxl"):
        for module, rows in diffusers_rows(family).items():
            keys[f"lora_unet_{module.replace('.', '_')}"] = rows
            processor = module.replace(".to_", ".processor.to_")
            processor = processor.removesuffix(".0") if processor.endswith(".to_out.0") else processor
            keys[processor] = keys[f"unet.{processor}"] = rows
    if family in ("sd3", *FLUX):
        for module, rows in diffusers_rows(family).items():
            keys[f"transformer.{module}"] = rows
            keys[f"lora_transformer_{module.replace('.', '_')}"] = rows
            if family == "sd3":
                keys[f"base_model.model.{module}"] = rows
    if family == "z-image":
        for module, rows in diffusers_rows(family).items():
            keys[module] = keys[f"transformer.{module}"] = keys[f"diffusion_model.{module}"] = rows
    if family in QWEN_IMAGE:
        for module, rows in original_rows(family).items():
            keys[module] = keys[f"transformer.{module}"] = keys[f"lycoris_{module.replace('.', '_')}"] = rows
    return keys


def kohya_keys(family: str) -> Rows:
    """The names in the files of kohya-ss's scripts: of diffusers' network for some, of the original one otherwise."""
    modules = diffusers_rows(family) if family in ("sd15", "z-image") else original_rows(family)
    return {f"lora_unet_{module.replace('.', '_')}": rows for module, rows in modules.items()}


def patched(keys: Rows, tensors: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """What is added to each row of the model, by the loader that both tools have; every tensor must be used."""
    added: dict[int, Tensor] = {}
    used = set()
    for key, rows in keys.items():
        for up, down in ((".lora_up.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_A.weight")):
            if key + up in tensors:
                a, b = tensors[key + down], tensors[key + up]
                alpha = tensors.get(f"{key}.alpha")
                scale = 1.0 if alpha is None else alpha.item() / len(a)
                added.update(zip(rows, scale * (b.double() @ a.double()), strict=True))
                used |= {key + up, key + down, f"{key}.alpha"}
    return added if tensors.keys() <= used else {}
