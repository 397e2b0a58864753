"""Stable Diffusion 1.x, 2.x and XL: UNets on two-dimensional latents, with CLIP text encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sipo.families.base import Family
from sipo.families.network import POOLED, PROMPT, Condition, pick

TIME_IDS = "time_ids"


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x: one text encoder of 77 tokens; ε-prediction, or v-prediction for 2.x at 768."""

    name = "sd15"
    pipeline_class = "StableDiffusionPipeline"
    network_class = "UNet2DConditionModel"
    network = "unet"
    schedule_kind = "discrete"
    text_width_key = "cross_attention_dim"
    guidance = 7.5
    side_multiple = 8
    text_options: ClassVar[Mapping[str, Any]] = {"num_images_per_prompt": 1}
    # Training needs neither of them, and the checker takes a gigabyte.
    _without = ("safety_checker", "feature_extractor")
    _pipeline_options: ClassVar[Mapping[str, Any]] = {"requires_safety_checker": False}

    def network_inputs(
        self, config: Any, noisy: Tensor, time: Tensor, condition: Condition, guidance: float
    ) -> dict[str, Any]:
        """See :meth:`Family.network_inputs`."""
        (text,) = pick(condition, PROMPT)
        return {"sample": noisy, "timestep": time, "encoder_hidden_states": text}


class StableDiffusionXL(Family):
    """SDXL: ε-prediction, two text encoders, and time ids: original size, crop and size of the image."""

    name = "sdxl"
    pipeline_class = "StableDiffusionXLPipeline"
    network_class = "UNet2DConditionModel"
    network = "unet"
    schedule_kind = "discrete"
    text_width_key = "cross_attention_dim"
    guidance = 5.0
    side_multiple = 8
    text_outputs: ClassVar[Mapping[str, int]] = {PROMPT: 0, POOLED: 2}
    float32_conditions = (TIME_IDS,)  # bfloat16 cannot hold 1023
    _pipeline_options: ClassVar[Mapping[str, Any]] = {"add_watermarker": False}

    def _text_width(self, widths: Sequence[Any]) -> Any:
        return sum(widths)  # side by side

    def encode_unconditional(self, pipeline: Any) -> Condition:
        """See :meth:`Family.encode_unconditional`: zeros if the pipeline is set so, as the published one is."""
        empty = super().encode_unconditional(pipeline)
        if pipeline.config.force_zeros_for_empty_prompt:
            return {name: torch.zeros_like(tensor) for name, tensor in empty.items()}
        return empty

    def own_condition(
        self, original_size: tuple[int, int], crop_top_left: tuple[int, int], size: tuple[int, int]
    ) -> Condition:
        """Returns ``time_ids [6]`` float32: original size, crop and size."""
        return {TIME_IDS: torch.tensor([*original_size, *crop_top_left, *size], dtype=torch.float32)}

    def network_inputs(
        self, config: Any, noisy: Tensor, time: Tensor, condition: Condition, guidance: float
    ) -> dict[str, Any]:
        """See :meth:`Family.network_inputs`."""
        text, pooled, time_ids = pick(condition, PROMPT, POOLED, TIME_IDS)
        return {
            "sample": noisy,
            "timestep": time,
            "encoder_hidden_states": text,
            "added_cond_kwargs": {"text_embeds": pooled, TIME_IDS: time_ids},
        }
