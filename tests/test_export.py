"""LoRA files: every reader finds every layer, at the strength that it was trained at."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sipo.families import FAMILIES, get_family
from sipo.families.lora_files import Adapter, formats_of, read_adapter, write_adapter
from sipo.families.tuning import load_saved, save_lora
from tests.family_cases import (
    each_toy,
    family_of,
    folder_of,
    load_adapters,
    lora_network,
    metadata_of,
    pipeline_of,
    predictions,
)
from tests.original_names import (
    FLUX,
    NETWORK_CONFIGS,
    QWEN_IMAGE,
    WIDTH,
    comfyui_keys,
    diffusers_rows,
    kohya_keys,
    patched,
)

Added = dict[int, Tensor]

RANK = 3
ALPHA = 5.0  # of rank 2 or 3: a scale that is no power of two

# The fields of peft 0.17.1's LoraConfig:
# https://github.com/huggingface/peft/blob/v0.17.1/src/peft/tuners/lora/config.py with those of PeftConfig and
# PeftConfigMixin. That release refuses a file's metadata if it has any other.
PEFT_0_17 = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config"),
    *("exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layer_replication"),
    *("layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout"),
    *("megatron_config", "megatron_core", "modules_to_save", "peft_type", "qalora_group_size", "r", "rank_pattern"),
    *("revision", "runtime_config", "target_modules", "target_parameters", "task_type", "trainable_token_indices"),
    *("use_dora", "use_qalora", "use_rslora"),
}


# ---- What a run saves ----


@each_toy
def test_a_saved_adapter_counts_the_same_without_its_metadata(toy: str, tmp_path: Path) -> None:
    """With it: ``test_families_saving.py``."""
    family, network = family_of(toy), lora_network(toy, rank=3, alpha=ALPHA)
    save_lora(family, network, tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        save_file(load_file(file), file)  # as a reader sees it that knows nothing of metadata
    expected = predictions(toy, network)
    found = predictions(toy, load_adapters(pipeline_of(toy), family, tmp_path))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    for part in family.networks_in(network).values():
        part.disable_adapters()
    assert (predictions(toy, network) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_the_metadata_has_only_what_old_peft_knows(dropout: float, tmp_path: Path) -> None:
    network = lora_network("wan", alpha=ALPHA, dropout=dropout, target_modules=["to_v", "ffn.net.2", "to_k"])
    found = metadata_of(save_lora(get_family("wan"), network, tmp_path))
    assert {name.removeprefix("transformer.") for name in found} <= PEFT_0_17
    assert found == {
        "transformer.r": 2,
        "transformer.lora_alpha": 2,  # alpha / rank is in the weights
        "transformer.target_modules": ["ffn.net.2", "to_k", "to_v"],
        "transformer.rank_pattern": {},  # diffusers 0.35 fails without
        **({"transformer.lora_dropout": dropout} if dropout else {}),
    }


# ---- What other tools find ----


def adapter_of(family: str, modules: Iterable[str] | None = None, alpha: float = ALPHA) -> tuple[Adapter, Added]:
    """An adapter of a model of full size's names, of every module that can have one, and what it adds to each row."""
    generator = torch.Generator().manual_seed(0)
    tensors, added = {}, {}
    for module, rows in diffusers_rows(family).items():
        if modules is None or module in modules:
            a, b = (torch.randn(size, generator=generator) for size in ((RANK, WIDTH), (len(rows), RANK)))
            tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
            added.update(zip(rows, alpha / RANK * (b.double() @ a.double()), strict=True))
    return Adapter.of_tensors(tensors, alpha / RANK), added


def written(family: str, adapter: Adapter, format: str, folder: Path) -> dict[str, Tensor]:
    write_adapter(get_family(family), adapter, folder / "lora.safetensors", format, NETWORK_CONFIGS.get(family))
    return load_file(folder / "lora.safetensors")


def assert_adds(found: Added, expected: Added) -> None:
    assert found.keys() == expected.keys()
    rows = sorted(expected)
    both = (torch.stack([added[row] for row in rows]) for added in (found, expected))
    torch.testing.assert_close(*both, rtol=1e-6, atol=1e-6)


# The attention layers that are adapted by default, as many as the published models have.
ATTENTION = {"sd15": 128, "sdxl": 560, "sd3": 24 * 4 + 13 * 4, "cogvideox": 120, "wan": 240}
ATTENTION |= dict.fromkeys(FLUX, 2 * 12 + 2 * 3)  # and feed-forward layers, of two blocks of each kind
ATTENTION |= {"flux2": 8 * 4 + 48, "flux2-klein": 5 * 4 + 20}
ATTENTION |= dict.fromkeys(QWEN_IMAGE, 2 * 4)  # of 60 layers, 2
ATTENTION |= {"z-image": 4 * 4, "lumina2": 4 * 4}  # two layers and two refiners


@pytest.mark.parametrize("family", [name for name in FAMILIES if "comfyui" in formats_of(get_family(name))])
def test_comfyui_finds_every_layer(family: str, tmp_path: Path) -> None:
    """Of files with diffusers' names it finds all or nothing."""
    ends = get_family(family).lora_targets
    attention = [m for m in diffusers_rows(family) if m.endswith(tuple(f".{end}" for end in ends))]
    assert len(attention) == ATTENTION[family]
    for modules in (attention, None):
        adapter, expected = adapter_of(family, modules)
        assert_adds(patched(comfyui_keys(family), written(family, adapter, "comfyui", tmp_path)), expected)
        before = patched(comfyui_keys(family), written(family, adapter, "diffusers", tmp_path))
        assert len(before) == (len(expected) if family in ("sd3", *FLUX, *QWEN_IMAGE, "z-image") else 0)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", *FLUX, "flux2", "wan", "qwen-image", "z-image", "lumina2"])
def test_kohyas_scripts_find_every_layer(family: str, tmp_path: Path) -> None:
    adapter, expected = adapter_of(family)
    tensors = written(family, adapter, "kohya", tmp_path)
    assert_adds(patched(kohya_keys(family), tensors), expected)
    # And so does a reader that takes no notice of alpha.
    assert_adds(patched(kohya_keys(family), {n: t for n, t in tensors.items() if "alpha" not in n}), expected)


def test_parts_of_sd3s_attention_are_filled_up_with_zeros(tmp_path: Path) -> None:
    block, other = "transformer_blocks.3.attn", "transformer_blocks.5.attn2"
    adapter, expected = adapter_of("sd3", [f"{block}.to_v", f"{block}.to_q", f"{block}.add_k_proj", f"{other}.to_k"])
    tensors = written("sd3", adapter, "kohya", tmp_path)
    assert tensors["lora_unet_joint_blocks_3_x_block_attn_qkv.lora_down.weight"].shape == (2 * RANK, WIDTH)
    found = patched(kohya_keys("sd3"), tensors)
    assert all(not found.pop(row).any() for row in found.keys() - expected.keys())
    assert_adds(found, expected)


def test_parts_of_lumina2s_attention_are_filled_up_with_zeros(tmp_path: Path) -> None:
    """Its queries have three times as many rows as its keys and its values."""
    for parts in (["to_q"], ["to_v"], ["to_v", "to_k"]):
        adapter, expected = adapter_of("lumina2", [f"layers.1.attn.{part}" for part in parts])
        found = patched(comfyui_keys("lumina2"), written("lumina2", adapter, "comfyui", tmp_path))
        assert len(found) == 3840
        assert not torch.stack([found.pop(row) for row in found.keys() - expected.keys()]).any()
        assert_adds(found, expected)


def test_parts_of_fluxs_single_blocks_are_filled_up_with_zeros(tmp_path: Path) -> None:
    for parts in (["attn.to_k"], ["proj_mlp"], ["proj_mlp", "attn.to_v"]):
        modules = [f"single_transformer_blocks.1.{part}" for part in parts]
        adapter, expected = adapter_of("flux", modules)
        found = patched(kohya_keys("flux"), written("flux", adapter, "kohya", tmp_path))
        assert len(found) == 7 * 3072
        assert not torch.stack([found.pop(row) for row in found.keys() - expected.keys()]).any()
        assert_adds(found, expected)


def test_diffusers_reads_kohyas_flux_in_full_width(tmp_path: Path) -> None:
    """Its converter takes no toy: it has the width of the published network."""
    from diffusers import FluxPipeline

    adapter, _ = adapter_of("flux")
    write_adapter(get_family("flux"), adapter, tmp_path / "lora.safetensors", "kohya")
    read: Any = FluxPipeline.lora_state_dict(tmp_path, weight_name="lora.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in read.items()}
    assert tensors.keys() == {f"{module}.lora_{letter}.weight" for module in adapter.layers for letter in "AB"}
    for module, (a, b) in adapter.layers.items():
        product = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
        torch.testing.assert_close(product, b @ a, rtol=1e-5, atol=1e-5)


def test_kohyas_names_of_sd15_are_those_that_diffusers_makes(tmp_path: Path) -> None:
    from diffusers.utils import convert_state_dict_to_kohya

    adapter, _ = adapter_of("sd15")
    theirs = convert_state_dict_to_kohya(written("sd15", adapter, "diffusers", tmp_path))
    ours = written("sd15", adapter, "kohya", tmp_path)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor.to(ours[name].dtype)) for name, tensor in theirs.items())


ROUND_TRIPS = [
    ("sd15", "kohya", ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "conv1")),
    ("sdxl", "kohya", ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_out", "conv2")),
    (
        "flux2",
        "kohya",
        ("to_q", "to_k", "to_v", "to_add_out", "ff.linear_in", "to_qkv_mlp_proj", "x_embedder"),
    ),
    (
        "flux2",
        "comfyui",
        ("to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "ff_context.linear_out", "to_qkv_mlp_proj"),
    ),
    ("wan", "comfyui", ("to_q", "to_k", "to_v", "to_out.0")),
    ("wan", "kohya", ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")),  # it reads no fewer
    ("z-image", "kohya", ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3", "cap_embedder.1")),
    (
        "qwen-image",
        "kohya",
        ("to_q", "to_out.0", "add_k_proj", "to_add_out", "img_mlp.net.0.proj", "img_mod.1", "txt_in"),
    ),
]


@pytest.mark.parametrize(("toy", "format", "targets"), ROUND_TRIPS)
def test_diffusers_reads_other_tools_files(toy: str, format: str, targets: Any, tmp_path: Path) -> None:
    family, network = family_of(toy), lora_network(toy, alpha=ALPHA, target_modules=targets)
    adapter = read_adapter(family, save_lora(family, network, tmp_path))
    write_adapter(family, adapter, tmp_path / "other.safetensors", format, network.config)
    pipeline = pipeline_of(toy)
    pipeline.load_lora_weights(tmp_path, weight_name="other.safetensors")
    loaded = getattr(pipeline, family.network)
    assert sum(".lora_A." in key for key in loaded.state_dict()) == len(adapter.layers)
    torch.testing.assert_close(predictions(toy, loaded), predictions(toy, network), rtol=1e-5, atol=1e-5)


# ---- Reading ----


@pytest.mark.parametrize(("saved", "own"), [(ALPHA, ALPHA), (ALPHA, 1.0), (4.0, 2.0)])
def test_a_saved_adapter_counts_the_same_whatever_the_networks_alpha(saved: float, own: float, tmp_path: Path) -> None:
    trained, other = lora_network("sd3", rank=3, alpha=saved), lora_network("sd3", rank=3, alpha=own)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_" in name:
                parameter.zero_()
    save_lora(get_family("sd3"), trained, tmp_path)
    load_saved(get_family("sd3"), other, tmp_path)
    torch.testing.assert_close(predictions("sd3", other), predictions("sd3", trained), rtol=1e-6, atol=1e-6)
    if saved == own:
        for (name, a), (_, b) in zip(trained.named_parameters(), other.named_parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=2**-23, atol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"r": 2, "lora_alpha": 5}, 2.5),
        ({"r": 4, "lora_alpha": 6, "use_rslora": True}, 3.0),
        ({"lora_alpha": 8}, 4.0),  # the rank is that of the tensors
        ({}, 1.0),
    ],
)
def test_a_scale_in_metadata_is_taken_into_the_weights(config: dict[str, Any], scale: float, tmp_path: Path) -> None:
    rank = config.get("r", 2)
    names = {"unet.mid.to_q.lora_A.weight": torch.ones(rank, 3), "unet.mid.to_q.lora_B.weight": torch.ones(5, rank)}
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in config.items()})}
    save_file(names, tmp_path / "lora.safetensors", metadata=metadata)
    adapter = read_adapter(get_family("sd15"), tmp_path / "lora.safetensors")
    (pair,) = adapter.layers.values()
    assert torch.equal(pair[0], torch.ones(rank, 3)) and torch.equal(pair[1], torch.full((5, rank), scale))
    assert adapter.rank == rank and adapter.target_modules == ("mid.to_q",)


FACTOR = torch.zeros(2, 2)
PLAIN = {f"unet.to_q.lora_{letter}.weight": FACTOR for letter in "AB"}
UNREADABLE = [
    ({"unet.to_q.lora_A.weight": FACTOR}, {}, "to_q has lora_A alone, expected lora_A and lora_B"),
    ({"unet.to_q.lora_magnitude_vector": FACTOR}, {}, "to_q.lora_magnitude_vector is no weight of LoRA"),
    ({"text_encoder.to_q.bias": FACTOR}, {}, "text_encoder.to_q.bias is not the unet's"),
    ({}, {}, "no weights, expected"),
    ({}, {"unet.alpha_pattern": {"to_q": 3}}, r"its metadata has alpha_pattern=\{'to_q': 3\}, expected one scale"),
    (
        {f"unet.{m}.lora_{x}.weight": torch.zeros(r, r) for m, r in (("a", 2), ("b", 3)) for x in "AB"},
        {},
        r"layers of ranks \[2, 3\], expected one rank",
    ),
    (
        {"unet.to_q.lora_A.weight": torch.zeros(4, 3), "unet.to_q.lora_B.weight": torch.zeros(3, 5)},
        {},
        r"to_q has lora_A \[4, 3\] and lora_B \[3, 5\], expected \[rank, in, ...\] and \[out, rank, ...\]",
    ),
    ({name: torch.zeros(2) for name in PLAIN}, {}, r"to_q has lora_A \[2\] and lora_B \[2\], expected"),
    ({name: torch.tensor(1.0) for name in PLAIN}, {}, r"to_q has lora_A \[\] and lora_B \[\], expected"),
    ({name: torch.zeros(0, 0) for name in PLAIN}, {}, "rank=0: expected at least 1"),
    (PLAIN, {"unet.r": 0}, "its metadata has r=0, expected 2, the rank of its weights"),
    (PLAIN, {"unet.r": 4}, "its metadata has r=4, expected 2, the rank of its weights"),
    (PLAIN, {"unet.r": "2"}, "its metadata has r='2', expected 2, the rank of its weights"),
    (PLAIN, {"unet.lora_alpha": 0}, "alpha=0.0: expected a finite number > 0"),
    (PLAIN, {"unet.lora_alpha": float("nan")}, "alpha=nan: expected a finite number > 0"),
    (PLAIN, {"unet.lora_alpha": None}, "its metadata has lora_alpha=None, expected a number"),
    (PLAIN, {"unet.lora_alpha": [2]}, r"its metadata has lora_alpha=\[2\], expected a number"),
    (PLAIN, {"unet.lora_dropout": "much"}, "its metadata has lora_dropout='much', expected a number"),
    (PLAIN, {"unet.lora_dropout": 1.5}, "dropout=1.5: expected a number >= 0 and < 1"),
    (PLAIN, {"unet.target_modules": 5}, "its metadata has target_modules=5, expected a list of names"),
    (PLAIN, {"unet.lora_alpha": 10**400}, "the lora_alpha in its metadata is out of range, expected a number"),
    (PLAIN, [1], "its metadata is list, expected a JSON object"),
    (PLAIN, 1, "its metadata is int, expected a JSON object"),
]


@pytest.mark.parametrize(("tensors", "config", "message"), UNREADABLE)
def test_what_is_no_plain_lora_is_refused_in_one_line(
    tensors: dict[str, Tensor], config: Any, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "pytorch_lora_weights.safetensors"
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, file, metadata={"lora_adapter_metadata": json.dumps(config)})
    with pytest.raises(ValueError, match=message) as caught:
        read_adapter(get_family("sd15"), file)
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)


def test_damaged_files_are_one_line_errors(tmp_path: Path) -> None:
    network, whole = lora_network("sd15"), get_family("sd15").load_network(folder_of("sd15"))
    lora = save_lora(get_family("sd15"), network, tmp_path)
    full = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    full.parent.mkdir()
    full.write_bytes(b"half")
    lora.write_bytes(lora.read_bytes()[:-100])
    for file, into in ((lora, network), (full, whole)):
        with pytest.raises(ValueError, match=r"[Ss]afetensor|header|buffer") as caught:
            load_saved(get_family("sd15"), into, tmp_path)
        assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)
