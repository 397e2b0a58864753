"""Stable Diffusion 3 and 3.5: rectified flow on images, with two CLIP text encoders and T5."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from sipo.families.base import Family
from sipo.families.network import POOLED, PROMPT, Condition, pick


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5: 77 tokens of CLIP and 256 of T5 in one sequence; T5 is required."""

    name = "sd3"
    pipeline_class = "StableDiffusion3Pipeline"
    network_class = "SD3Transformer2DModel"
    guidance = 4.5
    shift_pixels = 16
    text_options: ClassVar[Mapping[str, Any]] = {"prompt_2": None, "prompt_3": None, "max_sequence_length": 256}
    text_outputs: ClassVar[Mapping[str, int]] = {PROMPT: 0, POOLED: 2}

    def _check_index(self, path: str | Path, index: Mapping[str, Any]) -> None:
        super()._check_index(path, index)
        if not (index.get("text_encoder_3") or [None])[0]:
            raise ValueError(f"{path}: has no text_encoder_3, expected a pipeline with T5")

    def check_network_size(self, config: Any, height: int, width: int, frames: int) -> None:
        """See :meth:`Family.check_network_size`: the table of positions is limited."""
        super().check_network_size(config, height, width, frames)
        most = config.pos_embed_max_size * config.patch_size * self.latent_pixels if config.pos_embed_max_size else None
        if most is not None and max(height, width) > most:
            table = f"by the network's pos_embed_max_size={config.pos_embed_max_size}"
            raise ValueError(f"height={height}, width={width}: expected at most {most} pixels a side, {table}")

    def network_inputs(
        self, config: Any, noisy: Tensor, time: Tensor, condition: Condition, guidance: float
    ) -> dict[str, Any]:
        """See :meth:`Family.network_inputs`."""
        text, pooled = pick(condition, PROMPT, POOLED)
        return {
            "hidden_states": noisy,
            "timestep": time,
            "encoder_hidden_states": text,
            "pooled_projections": pooled,
        }
