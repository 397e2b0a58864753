"""FLUX.1: rectified flow on tokens of 16 by 16 pixels, with CLIP and T5. Dev and Kontext are told a guidance scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from sipo.families.base import Family
from sipo.families.network import CONDITION_LATENTS, POOLED, PROMPT, Condition, pick


class Flux(Family):
    """FLUX.1 dev and schnell: 512 tokens of T5, all of which the network sees, and CLIP's pooled embedding."""

    name = "flux"
    pipeline_class = "FluxPipeline"
    network_class = "FluxTransformer2DModel"
    token_side = 2
    takes_sigma = True
    shift_pixels = 16
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    guidance = 3.5
    negative_prompt: ClassVar[str | None] = None
    text_options: ClassVar[Mapping[str, Any]] = {"max_sequence_length": 512}
    text_outputs: ClassVar[Mapping[str, int]] = {PROMPT: 0, POOLED: 1}

    def network_inputs(
        self, config: Any, noisy: Tensor, time: Tensor, condition: Condition, guidance: float
    ) -> dict[str, Any]:
        """See :meth:`Family.network_inputs`."""
        text, pooled = pick(condition, PROMPT, POOLED)
        return {
            "hidden_states": self.pack(noisy),
            "timestep": time,
            "guidance": torch.full_like(time, guidance, dtype=torch.float32) if config.guidance_embeds else None,
            "pooled_projections": pooled,
            "encoder_hidden_states": text,
            "txt_ids": torch.zeros(text.shape[1], 3, device=noisy.device, dtype=torch.float32),
            "img_ids": token_positions(noisy),
        }


class FluxKontext(Flux):
    """FLUX.1 Kontext dev: edits an image."""

    name = "flux-kontext"
    pipeline_class = "FluxKontextPipeline"
    condition_image = "required"
    guidance = 2.5

    def network_inputs(
        self, config: Any, noisy: Tensor, time: Tensor, condition: Condition, guidance: float
    ) -> dict[str, Any]:
        """See :meth:`Family.network_inputs`: the tokens of the condition image come after the sample's."""
        inputs = super().network_inputs(config, noisy, time, condition, guidance)
        (latents,) = pick(condition, CONDITION_LATENTS)
        inputs["hidden_states"] = torch.cat([inputs["hidden_states"], self.pack(latents)], dim=1)
        inputs["img_ids"] = torch.cat([inputs["img_ids"], token_positions(latents, image=1)])
        return inputs

    def _sampler_size(self, height: int, width: int, frames: int) -> dict[str, Any]:
        """Returns the pipeline's arguments for sizes as they are: it would change the sample's and the image's."""
        size = super()._sampler_size(height, width, frames)
        return {**size, "max_area": height * width, "_auto_resize": False}


def token_positions(latents: Tensor, image: int = 0) -> Tensor:
    """Returns positions ``[L, 3]`` float32 of an image's tokens: the image's number, row and column.

    Args:
        latents: ``[N, C, H, W]``; a token is a square of two by two.
        image: 0 for the sample, 1 for the condition image.
    """
    rows, columns = (
        torch.arange(side // Flux.token_side, device=latents.device, dtype=torch.float32) for side in latents.shape[-2:]
    )
    return torch.cartesian_prod(torch.full_like(rows[:1], image), rows, columns)
