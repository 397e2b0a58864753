"""Qwen-Image 2.1, text to image: one sequence of text and image, and a VAE with a channel of opacity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sipo.families.network import PROMPT, PROMPT_MASK, Condition, pick
from sipo.families.qwen_image import QwenImage
from sipo.families.vae import as_floats


class QwenImage21(QwenImage):
    """Qwen-Image 2.1 without condition images."""

    name = "qwen-image-2.1"
    pipeline_class = "QwenImage21Pipeline"
    network_class = "QwenImage21Transformer2DModel"
    token_side = 1
    latent_pixels = 16
    text_width_key = "context_in_dim"
    side_multiple = 32  # the network counts an image in squares of 2 x 2 tokens
    guidance = 1.0
    text_options: ClassVar[Mapping[str, Any]] = {}

    def _check_index(self, path: str | Path, index: Mapping[str, Any]) -> None:
        super()._check_index(path, index)
        if index.get("sample_sigmas"):
            shown = f"sample_sigmas={index['sample_sigmas']!r}"
            expected = "expected a Qwen-Image 2.1 whose sampler takes any number of steps"
            raise ValueError(f"{path}: has {shown}, noise levels of its own (Turbo); {expected}")

    def _prompt_lengths(self, pipeline: Any, prompts: Sequence[str]) -> tuple[Sequence[int], int | None]:
        return [], None  # the pipeline cuts no prompt

    def predict(
        self, module: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Any, *, guidance: float | None = None
    ) -> Tensor:
        """See :meth:`Family.predict`: the network is called once for each sample, with the sample's own text.

        A call has one layout of tokens, and an image's positions depend on the length of the text before it: padding
        would change the prediction. Samples with texts of one length do not share a call either, so that each process
        makes as many calls as the others, which sharded weights need.
        """
        text, mask = pick(condition, PROMPT, PROMPT_MASK)
        predictions = []
        for i, length in enumerate(mask.sum(1).tolist()):
            rows = slice(i, i + 1)
            own = {PROMPT: text[rows, :length]}
            predictions.append(super().predict(module, noisy[rows], timesteps[rows], own, guidance=guidance))
        return torch.cat(predictions)

    def network_inputs(
        self, config: Any, noisy: Tensor, time: Tensor, condition: Condition, guidance: float
    ) -> dict[str, Any]:
        """See :meth:`Family.network_inputs`: for samples whose texts have one length."""
        (text,) = pick(condition, PROMPT)
        length, (height, width) = text.shape[1], noisy.shape[-2:]
        positions = torch.arange(length + height * width // 4, device=noisy.device)
        return {
            "hidden_states": self.pack(noisy),
            "timestep": time,
            "encoder_hidden_states": text,
            "img_shapes": [[(1, height, width)]] * len(noisy),
            "img_mask": (positions >= length).expand(len(noisy), -1),
        }

    def unpack(self, output: Any, shape: Sequence[int]) -> Any:
        """See :meth:`Family.unpack`: the network's output has the text's tokens before the image's."""
        return super().unpack(output[:, -shape[-2] * shape[-1] :], shape)

    def encode_pixels(self, pipeline: Any, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """See :meth:`PipelineEncoder.encode_pixels`: the images are opaque."""
        pixels = as_floats(pixels.to(pipeline.vae.device))
        return super().encode_pixels(pipeline, torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1), generator)

    def decode_latents(self, pipeline: Any, latents: Tensor) -> Tensor:
        """See :meth:`PipelineEncoder.decode_latents`: what is transparent is laid over white."""
        pixels = super().decode_latents(pipeline, latents)
        opacity = (pixels[:, 3:] / 2 + 0.5).clamp(0, 1)
        return pixels[:, :3] * opacity + (1 - opacity)

    def _sampler_arguments(self, condition: Condition, guidance: float, image: Tensor | None) -> dict[str, Any]:
        if guidance <= 1:  # the pipeline warns of a negative prompt that it will not use
            condition = {name: tensor for name, tensor in condition.items() if not name.startswith("negative_")}
        return super()._sampler_arguments(condition, guidance, image)
