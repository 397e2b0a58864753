"""What Lumina Image 2.0 and SANA share: text from Gemma 2 with a mask, and an instruction before the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from sipo.batch import padded
from sipo.families.base import Family
from sipo.families.network import PROMPT, PROMPT_MASK, Condition, pick


class GemmaFamily(Family):
    """A family with Gemma 2 as text encoder: an instruction stands before each prompt, but not before the negative one.

    Text is stored without padding. The network gets it padded to the pipeline's length, so that its call is the
    pipeline's, to the bit.
    """

    text_outputs: ClassVar[Mapping[str, int]] = {PROMPT: 0, PROMPT_MASK: 1}

    @torch.no_grad()
    def encode_unconditional(self, pipeline: Any) -> Condition:
        """See :meth:`Family.encode_unconditional`: without the instruction, which the pipeline leaves out here."""
        device = pipeline.text_encoder.device
        *_, text, mask = pipeline.encode_prompt("", negative_prompt="", device=device, **self.text_options)
        tokens = mask[0].bool().cpu()
        return {PROMPT: text[0].cpu()[tokens], PROMPT_MASK: tokens[tokens]}

    def _padded_text(self, condition: Condition, prefix: str = "") -> tuple[Tensor, Tensor]:
        """Returns embeddings ``[N, L, D]`` and mask ``[N, L]`` at the pipeline's length."""
        length = self.text_options["max_sequence_length"]
        text, mask = (padded(tensor, length, 1) for tensor in pick(condition, prefix + PROMPT, prefix + PROMPT_MASK))
        return text, mask

    def network_inputs(
        self, config: Any, noisy: Tensor, time: Tensor, condition: Condition, guidance: float
    ) -> dict[str, Any]:
        """See :meth:`Family.network_inputs`."""
        text, mask = self._padded_text(condition)
        return {
            "hidden_states": noisy,
            "timestep": time * config.get("timestep_scale", 1.0),  # SANA's networks have one
            "encoder_hidden_states": text,
            "encoder_attention_mask": mask,
        }

    def _sampler_arguments(self, condition: Condition, guidance: float, image: Tensor | None) -> dict[str, Any]:
        arguments: dict[str, Any] = {"guidance_scale": guidance}
        for prefix in ("", "negative_"):
            text, mask = self._padded_text(condition, prefix)
            arguments |= {f"{prefix}prompt_embeds": text, f"{prefix}prompt_attention_mask": mask}
        return arguments
