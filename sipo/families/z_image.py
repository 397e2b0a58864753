"""Z-Image: rectified flow on images, with Qwen3 as text encoder; its network is told the share of data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sipo.families.base import Family
from sipo.families.network import PROMPT, PROMPT_MASK, Condition, pick


class ZImage(Family):
    """Z-Image and Z-Image-Turbo: the prompt as a user's message in a chat, and the network's input as lists.

    ``guidance`` is the pipeline's: how much is added to the conditional prediction, so 0 is none.
    """

    name = "z-image"
    pipeline_class = "ZImagePipeline"
    network_class = "ZImageTransformer2DModel"
    text_width_key = "cap_feat_dim"
    negated = True
    guidance = 4.0
    shift_pixels = 16
    text_options: ClassVar[Mapping[str, Any]] = {"max_sequence_length": 512}

    def _prompt_lengths(self, pipeline: Any, prompts: Sequence[str]) -> tuple[Sequence[int], int | None]:
        chats = [
            pipeline.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
            for prompt in prompts
        ]
        return super()._prompt_lengths(pipeline, chats)

    def network_time(self, timesteps: Tensor) -> Tensor:
        """See :meth:`Family.network_time`: the share of data, 1 − σ."""
        return (1000 - timesteps) / 1000

    def network_inputs(
        self, config: Any, noisy: Tensor, time: Tensor, condition: Condition, guidance: float
    ) -> dict[str, Any]:
        """See :meth:`Family.network_inputs`: lists of images ``[C, 1, H, W]`` and of texts ``[L, D]``."""
        text, mask = pick(condition, PROMPT, PROMPT_MASK)
        lengths = mask.sum(1).tolist()  # waits for the device, once a call: the network takes lists
        texts = [rows[:length] for rows, length in zip(text, lengths, strict=True)]
        return {"x": list(noisy.unsqueeze(2)), "t": time, "cap_feats": texts}

    def unpack(self, output: Any, shape: Sequence[int]) -> Tensor:
        """See :meth:`Family.unpack`: the network gives a list as well."""
        return torch.stack(output).squeeze(2)

    def _sampler_arguments(self, condition: Condition, guidance: float, image: Tensor | None) -> dict[str, Any]:
        texts = {name: list(rows) for name, rows in condition.items() if not name.endswith("_mask")}
        return {**texts, "guidance_scale": guidance}
