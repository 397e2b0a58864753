"""Reads and writes LoRA adapters in the formats of diffusers, kohya and ComfyUI, all with the trained strength.

Programs disagree about where a file holds an adapter's scale, alpha / rank: in metadata, in a tensor beside each layer,
or nowhere, which means a scale of 1. So the scale is multiplied into the weights here, and a file then gives the rank
as its alpha: programs that read an alpha and those that do not apply the same scale.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sipo.families import lora_names
from sipo.families.base import Family
from sipo.families.config import LoraConfig
from sipo.files import check_safetensors, one_line, parse_json, save_tensors

FORMATS = ("diffusers", "kohya", "comfyui")
_LAYER = re.compile(r"(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class Adapter:
    """A network's LoRA adapter.

    Attributes:
        layers: by the module's name in diffusers' network, float32 ``(A [rank, in, ...], B [out, rank, ...])``:
            the effective weight is ``W + B @ A``.
        target_modules: names, or last parts of names, of the adapted modules.
        dropout: dropout of the adapter's input, in training.
    """

    layers: dict[str, tuple[Tensor, Tensor]]
    target_modules: tuple[str, ...]
    dropout: float = 0.0

    @classmethod
    def of_tensors(
        cls, tensors: Mapping[str, Tensor], scale: float, target_modules: Iterable[str] = (), dropout: float = 0.0
    ) -> Adapter:
        """Makes an adapter from tensors with peft's names, without the name of the adapter.

        Args:
            tensors: ``<module>.lora_A.weight`` and ``<module>.lora_B.weight``, on any device.
            scale: factor of the layers' outputs in training, alpha / rank.
            target_modules: see :class:`Adapter`; the full names of the modules if left out.
            dropout: see :class:`Adapter`.

        Raises:
            ValueError: a tensor is not a LoRA factor, or lacks the other one; shapes do not match; ranks differ or are
                0; there is no tensor.
        """
        factors: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            match = _LAYER.fullmatch(name)
            if match is None:
                raise ValueError(f"{name} is no weight of LoRA, expected <module>.lora_A.weight or lora_B.weight")
            factors.setdefault(match[1], {})[match[2]] = tensor.detach().cpu().contiguous().float()
        if not factors:
            raise ValueError("no weights, expected <module>.lora_A.weight and lora_B.weight")
        for module, pair in factors.items():
            if len(pair) < 2:
                raise ValueError(f"{module} has lora_{'/'.join(pair)} alone, expected lora_A and lora_B")
            shapes = [list(pair[letter].shape) for letter in "AB"]
            if min(map(len, shapes)) < 2 or shapes[0][0] != shapes[1][1]:
                factor_shapes = f"lora_A {shapes[0]} and lora_B {shapes[1]}"
                raise ValueError(f"{module} has {factor_shapes}, expected [rank, in, ...] and [out, rank, ...]")
        ranks = sorted({len(pair["A"]) for pair in factors.values()})
        if len(ranks) > 1:
            raise ValueError(f"layers of ranks {ranks}, expected one rank")
        LoraConfig(ranks[0], dropout=dropout)  # refuses values that no adapter can have
        layers = {module: (pair["A"], scaled(pair["B"], scale)) for module, pair in sorted(factors.items())}
        return cls(layers, tuple(sorted(target_modules)) or tuple(layers), dropout)

    @property
    def rank(self) -> int:
        """The rank, which is the same for every layer."""
        return len(next(iter(self.layers.values()))[0])


def scaled(tensor: Tensor, scale: float) -> Tensor:
    """Multiplies a float32 tensor by a scale, rounded once; exact if the scale is a power of two."""
    return tensor if scale == 1 else (tensor.double() * scale).float()


def formats_of(family: Family) -> tuple[str, ...]:
    """Lists the formats of :data:`FORMATS` in which a family's LoRA can be written."""
    known = {"diffusers": True, "kohya": family.name in _KOHYA, "comfyui": family.name in _COMFYUI}
    return tuple(name for name in FORMATS if known[name])


def check_format(family: Family, format: str) -> None:
    """Refuses a format that a family does not have, with a ValueError that lists those it has."""
    formats = formats_of(family)
    if format not in formats:
        raise ValueError(f"format={format!r}: no LoRA of {family.name} is read in it, expected {' or '.join(formats)}")


def needs_network_config(family: Family, format: str) -> bool:
    """Tells whether :func:`write_adapter` needs the network's configuration for a format."""
    return family.name in ("sdxl", "lumina2") and format != "diffusers"


def write_adapter(
    family: Family, adapter: Adapter, file: Path, format: str = "diffusers", config: Mapping[str, Any] | None = None
) -> None:
    """Writes an adapter to a file, aside and renamed.

    Args:
        family: the network's family.
        adapter: the adapter to write.
        file: output file; its folder exists.
        format: "diffusers", for ``pipeline.load_lora_weights``; "kohya" or "comfyui".
        config: the network's configuration, if :func:`needs_network_config` says so.

    Raises:
        ValueError: the family does not have the format, or the format has no name for a module.
        OSError: the file cannot be written.
    """
    check_format(family, format)
    writers: dict[str, Mapping[str, _Writer]] = {"kohya": _KOHYA, "comfyui": _COMFYUI}
    writer = _diffusers if format == "diffusers" else writers[format][family.name]
    metadata = {"format": "pt"}
    if writer is _diffusers:
        from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

        metadata[LORA_ADAPTER_METADATA_KEY] = json.dumps(_metadata(family, adapter), indent=2, sort_keys=True)
    tensors = writer(family, adapter, config or {})
    save_tensors(file, tensors, metadata, durable=True)


def read_adapter(family: Family, file: Path) -> Adapter:
    """Reads a file in diffusers' format from any program; a scale in its metadata is multiplied into the weights.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, or has another format or a variant of LoRA (DoRA, several scales).
    """
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise FileNotFoundError(f"{file.parent}: no {file.name}, expected the weights of a run with LoRA tuning")
    start = f"{family.network}."
    check_safetensors(file)
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
            known = parse_json((opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"), "its metadata")
        if not isinstance(known, dict):
            raise ValueError(f"its metadata is {type(known).__name__}, expected a JSON object")
        known = {name.removeprefix(start): value for name, value in known.items() if name.startswith(start)}
        for name in tensors:
            if not name.startswith(start):
                raise ValueError(f"{name} is not the {family.network}'s")
        tensors = {name.removeprefix(start): tensor for name, tensor in tensors.items()}
        rank = min((len(t) for name, t in tensors.items() if t.ndim and ".lora_A." in name), default=1)
        dropout = _number(known, "lora_dropout", 0.0)
        return Adapter.of_tensors(tensors, _scale(known, rank), _targets(known), dropout)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file}: {one_line(error)}; expected LoRA of a {family.network}") from error


def _scale(config: Mapping[str, Any], rank: int) -> float:
    """Returns the factor by which peft multiplies a layer's output, from an adapter's configuration and rank."""
    for name in ("alpha_pattern", "rank_pattern", "use_dora"):
        if config.get(name):
            raise ValueError(f"its metadata has {name}={config[name]!r}, expected one scale for all layers")
    if config.get("r", rank) != rank:
        raise ValueError(f"its metadata has r={config['r']!r}, expected {rank}, the rank of its weights")
    alpha = _number(config, "lora_alpha", rank)
    LoraConfig(rank, alpha)  # refuses values that no adapter can have
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _number(config: Mapping[str, Any], name: str, default: float) -> float:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"its metadata has {name}={value!r}, expected a number")
    try:
        return float(value)
    except OverflowError as error:  # an integer of hundreds of digits
        raise ValueError(f"the {name} in its metadata is out of range, expected a number") from error


def _targets(config: Mapping[str, Any]) -> Sequence[str]:
    value = config.get("target_modules")
    if value is None or isinstance(value, str):  # a regular expression, in peft
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"its metadata has target_modules={value!r}, expected a list of names")
    return value


def _metadata(family: Family, adapter: Adapter) -> dict[str, Any]:
    """Returns the values from which diffusers makes peft's LoraConfig, without defaults: peft refuses unknown names.

    rank_pattern is an exception, because diffusers 0.35 fails without it.
    """
    rank, targets = adapter.rank, list(adapter.target_modules)
    config: dict[str, Any] = {"r": rank, "lora_alpha": rank, "target_modules": targets, "rank_pattern": {}}
    if adapter.dropout:
        config["lora_dropout"] = adapter.dropout
    return {f"{family.network}.{name}": value for name, value in config.items()}


_Writer = Callable[[Family, Adapter, Mapping[str, Any]], dict[str, Tensor]]


def _diffusers(family: Family, adapter: Adapter, config: Mapping[str, Any]) -> dict[str, Tensor]:
    return _peft_names(adapter.layers, f"{family.network}.")


def _native(family: Family, adapter: Adapter, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Renames layers for ComfyUI: the names in the model's original code after "diffusion_model."."""
    return _peft_names(lora_names.original_layers(family.name, adapter.layers, config), "diffusion_model.")


def _peft_names(layers: Mapping[str, tuple[Tensor, Tensor]], start: str) -> dict[str, Tensor]:
    return {
        f"{start}{module}.lora_{letter}.weight": factor
        for module, pair in layers.items()
        for letter, factor in zip("AB", pair, strict=True)
    }


def _kohya(family: Family, adapter: Adapter, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Renames layers for kohya-ss: underscores for dots, "down" for A, "up" for B, and an alpha for each layer."""
    # kohya's scripts train these with diffusers' module names, and all other models with a copy of the original code.
    kept = family.name in ("sd15", "z-image", *_QWEN_IMAGE)
    layers = adapter.layers if kept else lora_names.original_layers(family.name, adapter.layers, config)
    tensors: dict[str, Tensor] = {}
    for module, (a, b) in layers.items():
        name = f"lora_unet_{module.replace('.', '_')}"
        tensors |= {
            f"{name}.lora_down.weight": a,
            f"{name}.lora_up.weight": b,
            f"{name}.alpha": torch.tensor(float(len(a)), dtype=torch.float32),
        }
    return tensors


_FLUX = ("flux", "flux-kontext", "chroma")
_FLUX2 = ("flux2", "flux2-klein")
_QWEN_IMAGE = ("qwen-image", "qwen-image-edit", "qwen-image-edit-plus")  # its original names are diffusers'
_KOHYA: dict[str, _Writer] = dict.fromkeys(
    ("sd15", "sdxl", "sd3", *_FLUX, *_FLUX2, "wan", *_QWEN_IMAGE, "z-image", "lumina2"), _kohya
)
# ComfyUI reads kohya's names for UNets, and diffusers' names for SD3, FLUX.1, Qwen-Image and Z-Image. It has no SANA.
# The names that other tools read for Qwen-Image 2.1 have not been checked.
_COMFYUI: dict[str, _Writer] = {
    "sd15": _kohya,
    "sdxl": _kohya,
    "sd3": _diffusers,
    **dict.fromkeys(_FLUX, _diffusers),
    "cogvideox": _native,
    "wan": _native,
    **dict.fromkeys(_FLUX2, _native),
    **dict.fromkeys(_QWEN_IMAGE, _diffusers),
    "z-image": _diffusers,
    "lumina2": _native,
}
