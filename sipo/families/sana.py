"""SANA: rectified flow on images that a deep VAE compresses 32 times, with Gemma 2 as text encoder."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from sipo.families.gemma import GemmaFamily
from sipo.families.network import Condition


class Sana(GemmaFamily):
    """SANA 1.0 and 1.5: of an instruction and the prompt, the first token and the last 299."""

    name = "sana"
    pipeline_class = "SanaPipeline"
    network_class = "SanaTransformer2DModel"
    text_width_key = "caption_channels"
    latent_pixels = 32
    guidance = 4.5
    side_multiple = 32
    text_options: ClassVar[Mapping[str, Any]] = {"max_sequence_length": 300}

    def _instruction(self, pipeline: Any) -> dict[str, Any]:
        # The default of the pipeline's call; its encode_prompt has none.
        name = "complex_human_instruction"
        return {name: inspect.signature(type(pipeline).__call__).parameters[name].default}

    def _prompt_lengths(self, pipeline: Any, prompts: Sequence[str]) -> tuple[Sequence[int], int | None]:
        (lines,) = self._instruction(pipeline).values()
        before = len(pipeline.tokenizer.encode("\n".join(lines)))
        lengths, _ = super()._prompt_lengths(pipeline, ["\n".join(lines) + prompt for prompt in prompts])
        return [length - before for length in lengths], self.text_options["max_sequence_length"] - 2

    def _sampler_arguments(self, condition: Condition, guidance: float, image: Tensor | None) -> dict[str, Any]:
        arguments = super()._sampler_arguments(condition, guidance, image)
        # A size outside the pipeline's list would be sampled at the nearest one in it, and resized.
        return arguments | {"negative_prompt": None, "use_resolution_binning": False}
