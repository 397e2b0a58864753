"""FLUX.2: rectified flow on tokens of 16 by 16 pixels. Dev is told the guidance scale, klein is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sipo.families.base import Family
from sipo.families.network import CONDITION_LATENTS, PROMPT, Condition, pick
from sipo.families.vae import as_picture, latent_affine
from sipo.schedule import empirical_mu

_CONDITION_TIME = 10  # time coordinate of the condition image's tokens; the sample's have 0
_CONDITION_PIXELS = 1024 * 1024  # of a condition image, at most


class Flux2(Family):
    """FLUX.2 dev: text from three layers of Mistral Small; the network sees all 512 tokens, with the padding."""

    name = "flux2"
    pipeline_class = "Flux2Pipeline"
    network_class = "Flux2Transformer2DModel"
    latent_pixels = 16
    vae_patch = 2
    token_side = 1
    takes_sigma = True
    condition_image = "optional"
    least_image_side = 64
    lora_targets = (*Family.lora_targets, "to_qkv_mlp_proj")
    guidance = 4.0
    negative_prompt: ClassVar[str | None] = None
    text_options: ClassVar[Mapping[str, Any]] = {"max_sequence_length": 512}

    def timestep_mu(self, config: Any, height: int, width: int, num_inference_steps: int) -> float | None:
        """See :meth:`PipelineLoader.timestep_mu`: from the sample's tokens and the steps."""
        return empirical_mu((height // self.latent_pixels) * (width // self.latent_pixels), num_inference_steps)

    def _text_width(self, widths: Sequence[Any]) -> Any:
        return 3 * super()._text_width(widths)  # of three layers

    def _prompt_lengths(self, pipeline: Any, prompts: Sequence[str]) -> tuple[Sequence[int], int | None]:
        chats = [self._chat(pipeline, prompt) for prompt in prompts]
        return [chat["input_ids"].shape[-1] for chat in chats], self.text_options["max_sequence_length"]

    def _chat(self, pipeline: Any, prompt: str) -> Any:
        """Returns the tokens of a prompt inside the text encoder's chat, uncut."""
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        messages = format_input([prompt], system_message=pipeline.system_message)
        return pipeline.tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt", tokenize=True)

    def encode_condition_image(self, pipeline: Any, pixels: Tensor) -> list[Condition]:
        """See :meth:`Family.encode_condition_image`: an image of more than a megapixel is made smaller first."""
        if pixels.shape[-2] * pixels.shape[-1] > _CONDITION_PIXELS:
            processor = pipeline.image_processor
            images = [processor._resize_to_target_area(as_picture(image), _CONDITION_PIXELS) for image in pixels]
            width, height = (side - side % self.side_multiple for side in images[0].size)
            size: dict[str, Any] = {"height": height, "width": width, "resize_mode": "crop"}
            pixels = torch.cat([processor.preprocess(image, **size) for image in images])
        return super().encode_condition_image(pipeline, pixels)

    def network_inputs(
        self, config: Any, noisy: Tensor, time: Tensor, condition: Condition, guidance: float
    ) -> dict[str, Any]:
        """See :meth:`Family.network_inputs`: the tokens of a condition image come after the sample's."""
        (text,) = pick(condition, PROMPT)
        tokens, positions = self.pack(noisy), _positions((*noisy.shape[-2:], 1), noisy.device)
        if CONDITION_LATENTS in condition:
            latents = condition[CONDITION_LATENTS]
            tokens = torch.cat([tokens, self.pack(latents)], dim=1)
            more = _positions((*latents.shape[-2:], 1), noisy.device, _CONDITION_TIME)
            positions = torch.cat([positions, more])
        return {
            "hidden_states": tokens,
            "timestep": time,
            "guidance": torch.full_like(time, guidance, dtype=torch.float32) if config.guidance_embeds else None,
            "encoder_hidden_states": text,
            "txt_ids": _positions((1, 1, text.shape[1]), noisy.device),
            "img_ids": positions,
        }

    def pack(self, latents: Tensor) -> Tensor:
        """See :meth:`Family.pack`: the pipelines copy no latents, which changes the last bits of what follows."""
        return latents.flatten(2).transpose(1, 2)


class Flux2Klein(Flux2):
    """FLUX.2 klein, 4B and 9B: text from three layers of Qwen3; a distilled one is sampled without guidance."""

    name = "flux2-klein"
    pipeline_class = "Flux2KleinPipeline"
    negative_prompt = ""
    sampler_needs_vae = True

    def _chat(self, pipeline: Any, prompt: str) -> Any:
        text = pipeline.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return pipeline.tokenizer(text, return_tensors="pt")

    def _sampled_latents(self, pipeline: Any, output: Tensor, height: int, width: int) -> Tensor:
        """Lays out sampled latents, which this pipeline returns as its VAE has them, as those of encode_pixels."""
        latents = self._from_vae(output.float())
        mean, scale = latent_affine(pipeline.vae, latents)
        return (latents - mean) * scale


def _positions(sides: Sequence[int], device: torch.device, time: int = 0) -> Tensor:
    """Returns the coordinates ``[L, 4]`` of tokens: time, row, column and place in the text.

    Args:
        sides: numbers of rows, columns and places; ``L`` is their product.
        device: of the coordinates.
        time: 0 for the text and the sample.
    """
    axes = (torch.arange(side, device=device) for side in sides)
    return torch.cartesian_prod(torch.full((1,), time, device=device), *axes)
