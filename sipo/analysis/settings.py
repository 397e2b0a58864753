"""Reads the settings of a run from its folder, and fills in the values of defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sipo.files import read_object
from sipo.training.log_reader import is_number, show
from sipo.yaml_files import read_yaml

# Settings that are reckoned with.
_NUMBERS = (
    *("loss.beta", "loss.mask_threshold", "loss.label_smoothing", "beta"),
    *("training.train_batch_size", "training.gradient_accumulation_steps", "batch_size"),
)
_NAMES = ("model.family", "loss.method", "loss.loss_type", "loss.ratio", "method")


def read_settings(folder: Path) -> dict[str, Any]:
    """Reads the flat settings of a run of ``sipo train`` or of the demo; empty if the folder has none.

    Raises:
        ValueError: a damaged file, or a value that is none of its key's; names the file.
    """
    config, summary = folder / "config.yaml", folder / "summary.json"
    tree: Any = {}
    path = config if config.exists() else summary
    if config.exists():
        tree = read_yaml(config)
    elif summary.exists():
        tree = read_object(summary)
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: holds {type(tree).__name__}, expected the run's settings")
    found = flat(tree)
    if path == summary:
        found = {name: value for name, value in found.items() if not isinstance(value, list)}
    for name in _NUMBERS:
        if found.get(name) is not None and not is_number(found[name]):
            raise ValueError(f"{path}: {name}={show(found[name])}, expected a number")
    for name in _NAMES:
        if not isinstance(found.get(name, ""), str):
            raise ValueError(f"{path}: {name}={show(found[name])}, expected a name")
    return found


def flat(tree: dict[str, Any], place: str = "") -> dict[str, Any]:
    """Flattens a tree of settings to ``section.key``."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{place}{name}.") if isinstance(value, dict) else {f"{place}{name}": value}
    return found


def in_force(settings: dict[str, Any]) -> dict[str, Any]:
    """Fills in the numbers that defaults stand for."""
    from sipo.families import get_family
    from sipo.schedule import DEFAULT_INFERENCE_STEPS

    if "loss.method" not in settings or "model.family" not in settings:
        return settings
    numbers = {
        "model.lora.alpha": settings.get("model.lora.rank"),
        "loss.beta": loss_numbers(settings)[0],
        "loss.num_inference_steps": DEFAULT_INFERENCE_STEPS,
        "samples.guidance_scale": get_family(settings["model.family"]).guidance,
    }
    unset = {name: value for name, value in numbers.items() if name in settings and settings[name] is None}
    return settings | {name: f"{value:g} (default)" for name, value in unset.items() if is_number(value)}


def loss_numbers(settings: dict[str, Any]) -> tuple[float | None, float | None]:
    """Returns β and the mask's threshold, if the settings give them or determine their defaults."""
    from sipo.families import get_family
    from sipo_kernels import LossOptions

    method = settings.get("loss.method", settings.get("method"))
    if method is None:
        return None, None
    options = LossOptions(method=method)
    beta = settings.get("loss.beta", settings.get("beta"))
    if beta is None and "model.family" in settings:
        beta = options.beta_for(5 if get_family(settings["model.family"]).video else 4)
    threshold = settings.get("loss.mask_threshold", options.mask_threshold)
    return beta, 0.0 if method == "diffusion_dpo" else threshold
