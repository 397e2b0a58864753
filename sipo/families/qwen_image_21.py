"""Qwen-Image 2.1, text to image and editing: one sequence of text and images, a VAE with a channel of opacity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sipo.families.network import CONDITION_LATENTS, PROMPT, PROMPT_MASK, Condition, pick
from sipo.families.qwen_image import QwenImage
from sipo.families.vae import as_floats, as_picture

_IMAGE_START = "image_start"  # name in a condition: the place of the condition image in the text


class QwenImage21(QwenImage):
    """Qwen-Image 2.1 without condition images."""

    name = "qwen-image-2.1"
    pipeline_class = "QwenImage21Pipeline"
    network_class = "QwenImage21Transformer2DModel"
    token_side = 1
    unread = ()
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
            own = {name: tensor[rows] for name, tensor in condition.items()} | {PROMPT: text[rows, :length]}
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


class QwenImage21Edit(QwenImage21):
    """Qwen-Image 2.1, editing one image, which the text encoder sees at the size of the sample."""

    name = "qwen-image-2.1-edit"
    condition_image = "required"
    text_sees_image = True

    def _text_tensors(
        self, pipeline: Any, prompts: list[str], images: Sequence[Tensor] | None
    ) -> Mapping[str, Sequence[Tensor]]:
        tensors = super()._text_tensors(pipeline, prompts, images)
        return {**tensors, _IMAGE_START: [torch.tensor([_image_start(pipeline)])] * len(prompts)}

    def _text_image(self, pipeline: Any, images: Sequence[Tensor] | None, i: int) -> dict[str, Any]:
        if images is None:
            raise ValueError(f"images=None: expected one for each prompt, the text encoder of {self.name} sees it")
        self.check_encoders_size(pipeline, *images[i].shape[-2:])
        return {"image": [as_picture(images[i])]}

    def check_encoders_size(self, pipeline: Any, height: int, width: int) -> None:
        """See :meth:`PipelineEncoder.check_encoders_size`: the text encoder sees the condition image at its size."""
        processor = pipeline.processor.image_processor
        if processor.get_number_of_image_patches(height, width, {}) * self.latent_pixels**2 != height * width:
            limits = f"{processor.size['shortest_edge']} to {processor.size['longest_edge']} pixels"
            sides = f"sides that are multiples of {self.side_multiple}, and {limits} in all"
            raise ValueError(f"a condition image of {height} x {width} pixels: expected {sides}, by its processor")

    def network_inputs(
        self, config: Any, noisy: Tensor, time: Tensor, condition: Condition, guidance: float
    ) -> dict[str, Any]:
        """See :meth:`Family.network_inputs`: the tokens of a condition image stand in its place in the text."""
        inputs = super().network_inputs(config, noisy, time, condition, guidance)
        latents, start = pick(condition, CONDITION_LATENTS, _IMAGE_START)
        height, width = latents.shape[-2:]
        places = torch.arange(inputs["img_mask"].shape[1], device=noisy.device)
        return inputs | {
            "hidden_states": torch.cat([self.pack(latents), inputs["hidden_states"]], dim=1),
            "img_shapes": [[(1, height, width), *shapes] for shapes in inputs["img_shapes"]],
            "img_mask": inputs["img_mask"] | ((places >= start) & (places < start + height * width // 4)),
        }

    def _sampler_arguments(self, condition: Condition, guidance: float, image: Tensor | None) -> dict[str, Any]:
        condition = {name: tensor for name, tensor in condition.items() if not name.endswith(_IMAGE_START)}
        assert image is not None
        sides = {"output_resolution": math.sqrt(image.shape[-2] * image.shape[-1])}  # the image's own size
        return super()._sampler_arguments(condition, guidance, image) | sides

    def _sampler(self, pipeline: Any, network: nn.Module, *, with_vae: bool) -> Any:
        """Returns a sampler that takes encoded prompts with an image: it tells where in the text the image stands."""
        sampler = super()._sampler(pipeline, network, with_vae=with_vae)
        encode, start = sampler.encode_prompt, _image_start(pipeline)

        def encode_prompt(image: list[Any], prompt_embeds: Tensor, **options: Any) -> Any:
            mask = torch.zeros(prompt_embeds.shape[:2], dtype=torch.bool, device=prompt_embeds.device)
            mask[:, start : start + image[0].width * image[0].height // self.side_multiple**2] = True
            return encode(image=image, prompt_embeds=prompt_embeds, image_pad_mask=mask, **options)

        sampler.encode_prompt = encode_prompt
        return sampler


def _image_start(pipeline: Any) -> int:
    """Returns how many tokens stand before a condition image, in the text that the network is given."""
    text = pipeline.prompt_template_ti2i.partition("<|image_pad|>")[0]
    return len(pipeline.processor.tokenizer(text).input_ids) - pipeline._drop_idx
