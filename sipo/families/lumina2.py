"""Lumina Image 2.0: rectified flow on images, with Gemma 2 as text encoder; its network is told the share of data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from sipo.families.gemma import GemmaFamily


class Lumina2(GemmaFamily):
    """Lumina Image 2.0 and models tuned from it: a system prompt, and 256 tokens in all.

    Schedulers that shift dynamically are refused: the pipeline takes the number of channels for that of tokens.
    """

    name = "lumina2"
    pipeline_class = "Lumina2Pipeline"
    network_class = "Lumina2Transformer2DModel"
    text_width_key = "cap_feat_dim"
    negated = True
    guidance = 4.0
    text_options: ClassVar[Mapping[str, Any]] = {"max_sequence_length": 256}

    def _prompt_lengths(self, pipeline: Any, prompts: Sequence[str]) -> tuple[Sequence[int], int | None]:
        whole = [f"{pipeline.system_prompt} <Prompt Start> {prompt}" for prompt in prompts]
        return super()._prompt_lengths(pipeline, whole)

    def network_time(self, timesteps: Tensor) -> Tensor:
        """See :meth:`Family.network_time`: the share of data, 1 − σ."""
        return 1 - timesteps / 1000
