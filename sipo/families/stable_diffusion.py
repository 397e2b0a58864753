"""Stable Diffusion 1.5 and SDXL: UNets on 2-D latents, text through CLIP."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sipo.families.base import Family
from sipo.families.network import POOLED, PROMPT, Condition, inner_network, network_dtype, pick

TIME_IDS = "time_ids"


class StableDiffusion(Family):
    """Stable Diffusion 1.5: ε-prediction, latents at an eighth of the pixels, one text encoder of 77 tokens."""

    name = "sd15"
    pipeline_class = "StableDiffusionPipeline"
    network_class = "UNet2DConditionModel"
    network = "unet"
    guidance = 7.5
    side_multiple = 8
    text_options: ClassVar[Mapping[str, Any]] = {"num_images_per_prompt": 1}
    # The network is trained, not its samples judged: neither is needed, and the checker is a gigabyte.
    _without = ("safety_checker", "feature_extractor")

    def load_encoders(self, path: str | Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        """See :meth:`Family.load_encoders`; the safety checker is left out."""
        return super().load_encoders(path, dtype=dtype, requires_safety_checker=False, **options)

    def predict(self, module: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
        """See :meth:`Family.predict`."""
        (text,) = pick(condition, PROMPT)
        dtype = network_dtype(inner_network(module))
        prediction: Tensor = module(
            noisy.to(dtype), timesteps, encoder_hidden_states=text.to(dtype), return_dict=False
        )[0]
        return prediction


class StableDiffusionXL(Family):
    """SDXL: ε-prediction, two text encoders side by side, and time ids: original size, crop and size of the image."""

    name = "sdxl"
    pipeline_class = "StableDiffusionXLPipeline"
    network_class = "UNet2DConditionModel"
    network = "unet"
    guidance = 5.0
    side_multiple = 8

    def load_encoders(self, path: str | Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        """See :meth:`Family.load_encoders`; samples get no watermark."""
        return super().load_encoders(path, dtype=dtype, add_watermarker=False, **options)

    def encode_unconditional(self, pipeline: Any) -> Condition:
        """See :meth:`Family.encode_unconditional`: zeros, where the pipeline is set so (the published one is)."""
        empty = super().encode_unconditional(pipeline)
        if pipeline.config.force_zeros_for_empty_prompt:
            return {name: torch.zeros_like(tensor) for name, tensor in empty.items()}
        return empty

    def own_condition(
        self, original_size: tuple[int, int], crop_top_left: tuple[int, int], size: tuple[int, int]
    ) -> Condition:
        """``time_ids [6]`` float32, which keep their type on the way: bfloat16 cannot hold 1023."""
        return {TIME_IDS: torch.tensor([*original_size, *crop_top_left, *size], dtype=torch.float32)}

    def predict(self, module: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
        """See :meth:`Family.predict`."""
        text, pooled, time_ids = pick(condition, PROMPT, POOLED, TIME_IDS)
        dtype = network_dtype(inner_network(module))
        prediction: Tensor = module(
            noisy.to(dtype),
            timesteps,
            encoder_hidden_states=text.to(dtype),
            added_cond_kwargs={"text_embeds": pooled.to(dtype), TIME_IDS: time_ids},
            return_dict=False,
        )[0]
        return prediction
