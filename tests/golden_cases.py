"""Reads the golden files of ``tests/golden`` into torch tensors (see the README there)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

GOLDEN_DIR = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class GoldenCase:
    """One batch with known results.

    Attributes:
        name: The file's stem, ``METHOD-SCHEDULE...``; good as a pytest id.
        schedule: How ``ratio_scale`` was made (see :func:`load_ratio_scales` for the keys).
        settings: Keyword arguments of ``pair_loss``: method, beta, ratio, clip_low, clip_high, mask_threshold
            (0 where the file says ``masked: false``).
        model_pred: Float64 ``[S, ...]``, as are ``ref_pred`` and ``target``.
        timesteps: ``[S]``, int64 for a discrete schedule and float64 σ for a flow.
        ratio_scale: Float64 ``[S]``, with infinities.
        expected: ``model_error, ref_error, error_gap, log_ratio, weight`` ``[S]``, ``mask`` (bool) and
            ``logits`` ``[B]``, ``loss`` (0-d, the mean over pairs) and ``grad`` (shaped as ``model_pred``).
    """

    name: str
    schedule: dict[str, Any]
    settings: dict[str, Any]
    model_pred: torch.Tensor
    ref_pred: torch.Tensor
    target: torch.Tensor
    timesteps: torch.Tensor
    ratio_scale: torch.Tensor
    expected: dict[str, torch.Tensor]

    @property
    def num_pairs(self) -> int:
        return self.model_pred.shape[0] // 2


@dataclass(frozen=True)
class RatioScaleCase:
    """``ratio_scale`` (float64 ``[N]``) at chosen ``timesteps`` (``[N]``) of one schedule."""

    name: str
    schedule: dict[str, Any]
    timesteps: torch.Tensor
    ratio_scale: torch.Tensor


def _numbers(value: Any) -> Any:
    """Nested lists with the strings "inf" and "-inf" turned into floats."""
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return float(value)


def _tensor(value: Any) -> torch.Tensor:
    return torch.tensor(_numbers(value), dtype=torch.float64)


def _timesteps(values: list[float], schedule: dict[str, Any]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64 if schedule["kind"] == "discrete" else torch.float64)


def load_cases() -> list[GoldenCase]:
    """Every ``METHOD-SCHEDULE*.json`` file, in order of name."""
    cases = []
    for path in sorted(GOLDEN_DIR.glob("*-*.json")):
        raw = json.loads(path.read_text())
        settings = dict(raw["loss"])
        if not settings.pop("masked"):
            settings["mask_threshold"] = 0.0
        expected = {name.replace("reward_gap", "error_gap"): _tensor(value) for name, value in raw["expected"].items()}
        expected["mask"] = expected["mask"].bool()
        cases.append(
            GoldenCase(
                name=path.stem,
                schedule=raw["schedule"],
                settings=settings,
                model_pred=_tensor(raw["model_pred"]),
                ref_pred=_tensor(raw["ref_pred"]),
                target=_tensor(raw["target"]),
                timesteps=_timesteps(raw["timesteps"], raw["schedule"]),
                ratio_scale=_tensor(raw["ratio_scale"]),
                expected=expected,
            )
        )
    if not cases:
        raise FileNotFoundError(f"no golden cases in {GOLDEN_DIR}")
    return cases


def load_ratio_scales() -> list[RatioScaleCase]:
    """The schedules of ``ratio_scale.json``.

    ``schedule`` has ``kind``, ``prediction`` and ``num_inference_steps``, and for a discrete one also
    ``num_train_timesteps``, ``beta_start``, ``beta_end`` (all ``scaled_linear``) and where they are set
    ``snr_shift_scale`` and ``rescale_betas_zero_snr``; for a flow also ``shift``.
    """
    return [
        RatioScaleCase(
            name=raw["name"],
            schedule=raw["schedule"],
            timesteps=_timesteps(raw["timesteps"], raw["schedule"]),
            ratio_scale=_tensor(raw["ratio_scale"]),
        )
        for raw in json.loads((GOLDEN_DIR / "ratio_scale.json").read_text())
    ]
