"""Qwen-Image and its editing models: rectified flow on images, with a vision-language model as text encoder."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from sipo.families.base import Family
from sipo.families.network import CONDITION_LATENTS, PROMPT, PROMPT_MASK, Condition, pick
from sipo.families.vae import as_picture


class QwenImage(Family):
    """Qwen-Image, text to image: the first release and 2512."""

    name = "qwen-image"
    pipeline_class = "QwenImagePipeline"
    network_class = "QwenImageTransformer2DModel"
    token_side = 2
    takes_sigma = True
    shift_pixels = 16
    unread: ClassVar[tuple[str, ...]] = ("attn.to_add_out", "txt_mlp")  # of the text, which the last block leaves
    vae_frames = True
    negative_prompt = " "
    guidance = 4.0
    text_options: ClassVar[Mapping[str, Any]] = {"max_sequence_length": 512}

    def _check_network(self, path: str | Path, network: Any) -> None:
        super()._check_network(path, network)
        # diffusers' class cannot run the first of these; the others are of Qwen-Image-Layered.
        for option in ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope"):
            if getattr(network.config, option, False):
                raise ValueError(f"{path}: its {self.network} has {option}=True, expected a Qwen-Image without it")

    def _channels(self, config: Any) -> tuple[int, int]:
        return config.in_channels, config.patch_size**2 * config.out_channels  # of a token

    def _text_tensors(
        self, pipeline: Any, prompts: list[str], images: Sequence[Tensor] | None
    ) -> Mapping[str, Sequence[Tensor]]:
        # One by one: without padding, a prompt's embeddings do not depend on the prompts beside it.
        device = pipeline.text_encoder.device
        rows = [
            pipeline.encode_prompt(
                prompt=prompt, device=device, **self._text_image(pipeline, images, i), **self.text_options
            )[0][0]
            for i, prompt in enumerate(prompts)
        ]
        return {PROMPT: rows}

    def _text_image(self, pipeline: Any, images: Sequence[Tensor] | None, i: int) -> dict[str, Any]:
        """Returns the argument of the pipeline's ``encode_prompt`` with the image that belongs to a prompt."""
        return {}

    def _prompt_lengths(self, pipeline: Any, prompts: Sequence[str]) -> tuple[Sequence[int], int | None]:
        texts = [pipeline.prompt_template_encode.format(prompt) for prompt in prompts]
        cut = pipeline.prompt_template_encode_start_idx
        return [len(ids) - cut for ids in pipeline.tokenizer(texts).input_ids], self.text_options["max_sequence_length"]

    def network_inputs(
        self, config: Any, noisy: Tensor, time: Tensor, condition: Condition, guidance: float
    ) -> dict[str, Any]:
        """See :meth:`Family.network_inputs`: the tokens of a condition image follow the sample's."""
        text, mask = pick(condition, PROMPT, PROMPT_MASK)
        latents = [noisy]
        if self.condition_image != "none":
            latents += pick(condition, CONDITION_LATENTS)
        shapes = [(1, each.shape[-2] // 2, each.shape[-1] // 2) for each in latents]
        return {
            "hidden_states": torch.cat([self.pack(each) for each in latents], dim=1),
            "timestep": time,
            "encoder_hidden_states": text,
            # As the pipeline does: attention without a mask has faster kernels. Reading the mask waits for the device,
            # once a call: a condition holds tensors alone, so the host does not know whether the batch has padding.
            "encoder_hidden_states_mask": None if mask.all() else mask,
            "img_shapes": [shapes] * len(noisy),
        }

    def _sampler_arguments(self, condition: Condition, guidance: float, image: Tensor | None) -> dict[str, Any]:
        arguments = super()._sampler_arguments(condition, guidance, image)
        return arguments | {"true_cfg_scale": arguments.pop("guidance_scale")}


class QwenImageEdit(QwenImage):
    """Qwen-Image-Edit: the text encoder sees the image to edit at about ``text_image_pixels`` in area."""

    name = "qwen-image-edit"
    pipeline_class = "QwenImageEditPipeline"
    condition_image = "required"
    text_sees_image = True
    text_image_pixels: ClassVar[int] = 1024 * 1024
    text_options: ClassVar[Mapping[str, Any]] = {}

    def _text_image(self, pipeline: Any, images: Sequence[Tensor] | None, i: int) -> dict[str, Any]:
        if images is None:
            raise ValueError(f"images=None: expected one for each prompt, the text encoder of {self.name} sees it")
        picture = as_picture(images[i])
        rule = sys.modules[type(pipeline).__module__].calculate_dimensions
        width, height, *_ = rule(self.text_image_pixels, picture.width / picture.height)
        return {"image": [pipeline.image_processor.resize(picture, height, width)]}

    def _prompt_lengths(self, pipeline: Any, prompts: Sequence[str]) -> tuple[Sequence[int], int | None]:
        return [], None  # the pipelines cut no prompt


class QwenImageEditPlus(QwenImageEdit):
    """Qwen-Image-Edit 2509 and 2511, trained with one image; the text encoder sees a smaller one."""

    name = "qwen-image-edit-plus"
    pipeline_class = "QwenImageEditPlusPipeline"
    text_image_pixels = 384 * 384
