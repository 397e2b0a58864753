"""``sipo export``: the LoRA of a run, or of one of its checkpoints, as one file in another tool's format."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sipo.families import Family, get_family
from sipo.families.lora_files import Adapter, check_format, needs_network_config, read_adapter, write_adapter
from sipo.families.tuning import ADAPTER
from sipo.recipe.build import model_folder
from sipo.recipe.config import Config, ConfigError, load_config
from sipo.training import checkpoint, storage
from sipo.training.config import CheckpointError
from sipo.training.sums import check_config_sum, check_sums

_PLACES = ("model.pretrained_model_name_or_path", "model.revision", "model.variant")
"""Keys that may be overridden: they say where the model is, and do not change the weights."""


def export_run(
    target: Path,
    overrides: Iterable[str] = (),
    *,
    format: str,
    checkpoint_step: str | None = None,
    output: Path | None = None,
    force: bool = False,
) -> tuple[Path, Adapter]:
    """Writes a run's adapter to a file; nothing of the run is changed.

    Args:
        target: folder of a run of ``sipo train``.
        overrides: ``section.key=value`` laid over its configuration, for a model that has moved:
            ``model.pretrained_model_name_or_path``, ``model.revision`` or ``model.variant``.
        format: one of ``sipo.families.lora_files.FORMATS``.
        checkpoint_step: in place of the run's weights, those of a checkpoint, by its step, or "latest".
        output: file to write; named after run, step and format in the run's folder if left out.
        force: replace a file that exists.

    Returns:
        The file, and what was written to it.

    Raises:
        ConfigError: no run; another override; full tuning; a format that the family does not have; a file that
            exists already, or cannot be written.
        CheckpointError: no such checkpoint, or a damaged one.
        FileNotFoundError: no weights yet; for SDXL, a model whose configuration cannot be read.
        ValueError: weights that are damaged, are no such adapter, do not match the run's configuration, or are not
            finite.
    """
    file = target / "config.yaml"
    if not file.exists():
        raise ConfigError(f"{target}: no config.yaml, expected the folder of a run of `sipo train`")
    overrides = list(overrides)
    for override in overrides:
        if override.partition("=")[0] not in _PLACES:
            raise ConfigError(f"{override}: expected {', '.join(_PLACES[:-1])} or {_PLACES[-1]}, where the model is")
    config = load_config(file, overrides)
    check_config_sum(target)
    family = get_family(config.model.family)
    if family.experts:
        has = f"its LoRA is a file for each network in {target / 'weights'}, in diffusers' format alone"
        raise ConfigError(f"model.family={family.name!r}: expected a family with one network; {has}")
    if config.model.tuning != "lora":
        whole = target / "weights" / family.network
        raise ConfigError(f"model.tuning={config.model.tuning!r}: expected 'lora'; diffusers loads {whole} as it is")
    try:
        check_format(family, format)
    except ValueError as error:
        raise ConfigError(f"--{error}") from error
    step = None if checkpoint_step is None else _checkpoint(target / "checkpoints", checkpoint_step)
    parts = [target.resolve().name, *([] if step is None else [step.name]), format]
    output = output or target / f"{'-'.join(parts)}.safetensors"
    if output.suffix != ".safetensors":
        raise ConfigError(f"--output {output}: expected a name that ends in .safetensors, which other tools look for")
    if output.is_dir():
        raise ConfigError(f"{output}: is a folder, expected a file to write")
    for parent in output.parents:
        if parent.exists() and not parent.is_dir():
            raise ConfigError(f"--output {output}: {parent} is a file, expected a folder")
    if output.exists() and not force:
        raise ConfigError(f"{output}: exists already; --force replaces it, --output names another")
    if step is None:
        source, adapter = _of_weights(family, target / "weights")
    else:
        source, adapter = step, _of_checkpoint(family, config, step)
    _check_adapter(source, adapter, config.model.lora.rank, config.model.lora.target_modules or family.lora_targets)
    network_config = _network_config(family, config) if needs_network_config(family, format) else None
    output.parent.mkdir(parents=True, exist_ok=True)
    write_adapter(family, adapter, output, format, network_config)
    return output, adapter


def _check_adapter(source: Path, adapter: Adapter, rank: int, targets: Sequence[str]) -> None:
    """Refuses weights that do not match the run's configuration, or are not finite."""
    if adapter.rank != rank:
        raise ValueError(f"{source}: rank {adapter.rank}, expected {rank} of model.lora.rank")
    for module, pair in adapter.layers.items():
        if not any(module == target or module.endswith(f".{target}") for target in targets):
            raise ValueError(f"{source}: {module} is not in model.lora.target_modules, {', '.join(targets)}")
        if not all(bool(factor.isfinite().all()) for factor in pair):
            raise ValueError(f"{source}: {module} has NaN or infinite weights, expected finite ones")


def _of_weights(family: Family, folder: Path) -> tuple[Path, Adapter]:
    from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

    file = folder / LORA_WEIGHT_NAME_SAFE
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: does not exist, weights are saved when a run ends; --checkpoint exports a checkpoint"
        )
    check_sums(folder)
    return file, read_adapter(family, file)


def _of_checkpoint(family: Family, config: Config, folder: Path) -> Adapter:
    lora, tag = config.model.lora, f".{ADAPTER}."
    # SD3 and CogVideoX have buffers beside the adapter.
    tensors = {name.replace(tag, "."): t for name, t in checkpoint.read_weights(folder).items() if ".lora_" in name}
    scale = 1.0 if lora.alpha is None else lora.alpha / lora.rank
    targets = lora.target_modules or family.lora_targets
    try:
        return Adapter.of_tensors(tensors, scale, targets, lora.dropout)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def _checkpoint(root: Path, wanted: str) -> Path:
    found = {str(storage.step_of(folder)): folder for folder in storage.list_checkpoints(root)}
    if not found:
        raise CheckpointError(f"--checkpoint {wanted}: no checkpoint in {root}")
    folder = found.get(wanted) or (list(found.values())[-1] if wanted == storage.LATEST else None)
    if folder is None:
        raise CheckpointError(f"--checkpoint {wanted}: expected one of {', '.join(found)}, or {storage.LATEST!r}")
    if fault := storage.damage(folder):
        raise CheckpointError(f"{folder}: damaged, {fault}")
    return folder


def _network_config(family: Family, config: Config) -> dict[str, Any]:
    """Reads the configuration of the run's network, from which SDXL's blocks are numbered."""
    path = model_folder(config)
    try:
        return family.network_config(path, **config.model.hub_options)
    except (OSError, ValueError) as error:
        reason = f"cannot read the configuration of its {family.network}, by which its blocks are numbered"
        raise FileNotFoundError(
            f"model.pretrained_model_name_or_path={path!r}: {reason}; model.pretrained_model_name_or_path=... names "
            "where it is now"
        ) from error
