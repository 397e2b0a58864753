"""Writes the model card of a trained model: README.md beside the weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any

import sipo
from sipo.families.base import Family
from sipo.families.lora_files import formats_of
from sipo.loss import convert_beta
from sipo.recipe.config import TOY, Config

_SCHEDULER = "pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, {})"
# Families that kohya-ss's sd-scripts trains; its musubi-tuner trains the others that have its format.
_SD_SCRIPTS = ("sd15", "sdxl", "sd3", "flux", "flux-kontext", "chroma", "lumina2")


def model_card(
    family: Family,
    config: Config,
    *,
    beta: float,
    pairs: int,
    data_hash: str,
    steps: int,
    scheduler: Mapping[str, Any] | None = None,
    date: str | None = None,
) -> str:
    """Writes what was trained on what, how, and how to load it, with the front matter that the hub reads.

    Folders are named by their last part alone: a path says more about a machine than about a model.

    Args:
        family: the model's.
        config: the run's.
        beta: as the loss used it, in this project's convention (docs/math.md §7).
        pairs: that were trained on.
        data_hash: of the data as trained on.
        steps: optimiser steps done.
        scheduler: options of the scheduler that differ from the base's, which samples follow
            (:func:`sipo.schedule.diffusers_schedulers.setting_changes`).
        date: ISO 8601; today if left out.

    Returns:
        Markdown.
    """
    model, loss, data, training = config.model, config.loss, config.data, config.training
    lora, method = model.tuning == "lora", loss.method.replace("_", "-")
    task = "image-to-image" if family.condition_image == "required" else "text-to-image"
    front: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-video" if family.video else task,
        "tags": ["diffusers", "preference-optimisation", *dict.fromkeys(("sipo", method))] + ["lora"] * lora,
    }
    if _is_hub_id(model.pretrained_model_name_or_path):
        front = {"base_model": model.pretrained_model_name_or_path} | front
    settings = {
        "method": loss.method,
        "β (`beta`)": (
            f"{beta:g}: mean over elements, factor ½ inside, as `beta_dpo` of Diffusion-DPO; "
            f"{convert_beta(beta, source='sipo', target='paper'):g} in the papers' convention"
        ),
        **{f.name: getattr(loss, f.name) for f in dataclasses.fields(loss) if f.name not in ("method", "beta")},
    }
    tuned: dict[str, Any] = {"tuning": model.tuning}
    if lora:
        targets = model.lora.target_modules or family.lora_targets
        tuned |= {
            "rank": model.lora.rank,
            "alpha": model.lora.rank if model.lora.alpha is None else model.lora.alpha,
            "dropout": model.lora.dropout,
            "modules": ", ".join(targets),
        }
    names = (
        "train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "adam_weight_decay",
        "lr_scheduler",
        "lr_warmup_steps",
        "mixed_precision",
        "seed",
    )
    tuned |= {"steps": steps} | {name: getattr(training, name) for name in names}
    if model.guidance_scale is not None:
        tuned["guidance_scale"] = f"{model.guidance_scale:g}, as the network was told it"
    changes = ", ".join(f"{name}={value!r}" for name, value in (scheduler or {}).items())
    if changes:
        tuned["scheduler"] = changes
    source = {
        "data": _shown(data.dataset_name),
        "split": data.dataset_split_name,
        "pairs": pairs,
        "hash": data_hash,
        "sizes (height, width)": ", ".join(f"{height} x {width}" for height, width in data.sizes),
        "frames": data.frames,
    }
    packages = ("torch", "diffusers", *(("peft",) if lora else ()))
    made = {"date": date or datetime.now(timezone.utc).date().isoformat(), "sipo": sipo.__version__}
    made |= {package: version(package) for package in packages}
    parts = [
        "---",
        *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()),  # JSON is YAML
        "---",
        "",
        f"# {_shown(model.pretrained_model_name_or_path)}, aligned with {loss.method}",
        "",
        f"{'A LoRA adapter for' if lora else 'The ' + family.network + ' of'} a `{family.pipeline_class}`, trained on "
        f"pairs of preferred and rejected {'clips' if family.video else 'images'} with sipo.",
        "",
        "## Loading",
        "",
        "```python",
        *_loading(family, model.pretrained_model_name_or_path, lora),
        *([_SCHEDULER.format(changes)] if changes else []),
        "```",
        "",
        *_table("Files", _files(family, lora)),
        *_table("Loss", settings.items()),
        *_table("Training", tuned.items()),
        *_table("Data", source.items()),
        *_table("Made with", made.items()),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _loading(family: Family, base: str, lora: bool) -> list[str]:
    from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

    pipeline = family.pipeline_class
    lines = [
        f"from diffusers import {pipeline}" if lora else f"from diffusers import {pipeline}, {family.network_class}"
    ]
    if base == TOY:
        lines += ["from sipo.families.toy import build_toy", "", f'build_toy("{family.name}", "{base}")']
    where = json.dumps(_shown(base) if PurePath(base).is_absolute() else base)
    here = '"."'
    if lora:
        lines += ["", f"pipeline = {pipeline}.from_pretrained({where})"]
        # Named: before diffusers 0.40, a folder is looked through for it only where it may go online.
        file = json.dumps(LORA_WEIGHT_NAME_SAFE)
        lines += [f"pipeline.load_lora_weights({here}, weight_name={file})  # the folder that this file is in"]
        for name in family.experts[1:]:
            lines += [f'pipeline.load_lora_weights("./{name}", weight_name={file}, load_into_{name}=True)']
    else:
        lines += [""]
        for name in family.networks:
            loaded = f"{family.network_class}.from_pretrained({here}, subfolder={json.dumps(name)})"
            lines += [f"{name} = {loaded}  # the folder that this file is in"]
        networks = ", ".join(f"{name}={name}" for name in family.networks)
        lines += [f"pipeline = {pipeline}.from_pretrained({where}, {networks})"]
    return lines


def _files(family: Family, lora: bool) -> list[tuple[str, str]]:
    """Lists which file is for which tool."""
    sums = ("`SHA256SUMS`, here", "`sha256sum --check SHA256SUMS`, in this folder")
    if not lora:
        return [*((f"`{name}/`, here", "diffusers") for name in family.networks), sums]
    scripts = "sd-scripts" if family.name in _SD_SCRIPTS else "musubi-tuner"
    kohya = f"kohya-ss's {scripts}, and tools that take its files"
    tools = {"kohya": kohya, "comfyui": "ComfyUI"}
    others = [(f"`sipo export RUN --format {name}`", tools[name]) for name in formats_of(family) if name in tools]
    strength = ("strength to load them at", "1; alpha / rank is in the weights")
    places = ["", *(f"{name}/" for name in family.experts[1:])]
    files = [(f"`{place}pytorch_lora_weights.safetensors`, here", "diffusers") for place in places]
    return [*files, *others, strength, sums]


def _table(title: str, rows: Iterable[tuple[str, Any]]) -> list[str]:
    return [f"## {title}", "", "| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows), ""]


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _is_hub_id(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists()


def _shown(path: str) -> str:
    """Returns a hub id whole, and a folder or file by its name."""
    return path if _is_hub_id(path) else PurePath(path).name or path
