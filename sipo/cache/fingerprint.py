"""What the content of a cache depends on, and how two such lists differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sipo.cache.format import CacheError, OtherSettingsError
from sipo.cache.weights import PLACE, is_weights, weights_change
from sipo.data.config import DataConfig
from sipo.families.config import ModelConfig

MAX_PAIRS = "data.max_pairs"
"""The key that an unfinished cache may change: no pair's content depends on it."""


def fingerprint(model: ModelConfig, data: DataConfig, weights: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Lists what a cache's content depends on, apart from the pairs, as JSON values by the names of settings.

    Where pairs and weights are stored is not part of it.

    Args:
        model: where the encoders come from.
        data: how pairs are encoded.
        weights: the encoders' files (:func:`sipo.cache.weights.weight_hashes`); without them the model's path, revision
            and variant are used.
    """
    of_model = ("family", "dtype")
    of_data = (
        "format",
        "dataset_split_name",
        "sizes",
        "frames",
        "fps",
        "center_crop",
        "random_flip",
        "latents",
        "enable_tiling",
        "vae_dtype",
        "dtype",
    )
    of_rows = ("max_pairs", "seed", "shard_pairs")
    marks = {f"model.{name}": getattr(model, name) for name in of_model}
    if weights is None:
        weights = {name: getattr(model, name) for name in PLACE}
    marks |= {f"model.{name}": value for name, value in weights.items()}
    return marks | {f"data.{name}": getattr(data, name) for name in (*of_data, *of_rows)}


def check_fingerprint(where: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Compares two fingerprints.

    Raises:
        OtherSettingsError: the first key, in the order of ``wanted``, that differs, with both values.
    """
    made, remedy = "encoded", "use another data.cache"
    if any(key.startswith("reference.") for key in wanted):
        made, remedy = "computed", "start another run"
    wanted = json.loads(json.dumps(wanted))  # tuples become lists, as they did in the file
    for key in [*wanted, *(key for key in found if key not in wanted)]:
        if found.get(key) == wanted.get(key):
            continue
        if is_weights(key):
            change = weights_change(key, found.get(key), wanted.get(key))
            raise OtherSettingsError(f"{where}: {made} with other weights: {change}, or {remedy}")
        raise OtherSettingsError(
            f"{where}: made with {key}={json.dumps(found.get(key))}, expected this run's "
            f"{json.dumps(wanted.get(key))}: use another folder, or the settings it was made with"
        )


def other_path(where: Path, found: Any, wanted: str, why: str) -> CacheError:
    """Makes the error of a cache of another ``data.dataset_name``, whose pairs are other ones or cannot be compared."""
    return CacheError(
        f"{where}: made with data.dataset_name={json.dumps(found)}, this run has {json.dumps(wanted)}, {why}: use "
        "another "
        "data.cache, or the path it was made with"
    )
