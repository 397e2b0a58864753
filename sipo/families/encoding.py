"""Encodes what a network is trained on: text, condition images, and pixels as latents."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sipo.families.loading import TOKENIZER, PipelineLoader
from sipo.families.network import CONDITION_LATENTS, PROMPT, PROMPT_MASK, Condition
from sipo.families.packing import stack_patches, unstack_patches
from sipo.families.vae import as_floats, encode, latent_affine, latent_channels


class PromptWarning(UserWarning):
    """Prompts are longer than the text encoder's limit."""


class PipelineEncoder(PipelineLoader):
    """Encodes with the text encoders and the VAE of one family's pipelines.

    Attributes:
        latent_layout: dimensions of one sample's latents: "CHW", "FCHW" or "CFHW".
        vae_frames: whether the VAE of an image family takes frames; an image is then a clip of one frame to it.
        condition_image: whether pairs have an image that both samples are edits of: "none", "optional", "required".
        least_image_side: smallest height and width in pixels of an image that the pipeline edits when it samples.
        text_sees_image: whether text embeddings depend on that image too.
        negative_prompt: of classifier-free guidance and of dropped captions; ``None`` for a family that samples without
            classifier-free guidance, and drops captions with the empty prompt.
        side_multiple: height and width in pixels are multiples of it.
        frame_stride: the number of frames of a clip is a multiple of it, plus one.
        text_options: further arguments of the pipeline's ``encode_prompt``.
        text_outputs: places of the condition's tensors in what it returns, by name.
    """

    latent_layout: ClassVar[str] = "CHW"
    vae_frames: ClassVar[bool] = False
    condition_image: ClassVar[Literal["none", "optional", "required"]] = "none"
    least_image_side: ClassVar[int] = 1
    text_sees_image: ClassVar[bool] = False
    negative_prompt: ClassVar[str | None] = ""
    side_multiple: ClassVar[int] = 16
    frame_stride: ClassVar[int] = 1
    text_options: ClassVar[Mapping[str, Any]] = {}
    text_outputs: ClassVar[Mapping[str, int]] = {PROMPT: 0}

    @torch.no_grad()
    def encode_text(
        self, pipeline: Any, prompts: Sequence[str], images: Sequence[Tensor] | None = None
    ) -> list[Condition]:
        """Encodes text: one dictionary of embeddings for each prompt, without a batch dimension, on the CPU.

        ``prompt_embeds [L, D]`` and in some families ``pooled_prompt_embeds [D']`` are in the text encoders' dtype.
        They are padded to the family's length, unless there is ``prompt_embeds_mask [L]`` (bool, all true): then ``L``
        is the prompt's own length.

        Args:
            pipeline: from :meth:`load_encoders`.
            prompts: any number of them.
            images: uint8 ``[3, H, W]``, one for each prompt, if the family has ``text_sees_image``.

        Warns:
            PromptWarning: prompts are cut; says how many.
        """
        if not prompts:
            return []
        self._warn_of_cut_prompts(pipeline, prompts)
        tensors = dict(self._text_tensors(pipeline, list(prompts), images))
        if isinstance(tensors[PROMPT], list):  # of texts without padding
            tensors[PROMPT_MASK] = [torch.ones(len(rows), dtype=torch.bool) for rows in tensors[PROMPT]]
        return [_own_row({name: rows[i].cpu() for name, rows in tensors.items()}) for i in range(len(prompts))]

    def _text_tensors(
        self, pipeline: Any, prompts: list[str], images: Sequence[Tensor] | None
    ) -> Mapping[str, Tensor | Sequence[Tensor]]:
        """Has the pipeline encode text: by name of the condition, a tensor with a row for each prompt, or a list."""
        options = {**self.text_options, **self._instruction(pipeline)}
        if "do_classifier_free_guidance" in inspect.signature(pipeline.encode_prompt).parameters:
            options["do_classifier_free_guidance"] = False
        encoded = pipeline.encode_prompt(prompt=prompts, device=pipeline.text_encoder.device, **options)
        return {name: encoded[place] for name, place in self.text_outputs.items()}

    def _instruction(self, pipeline: Any) -> dict[str, Any]:
        """Returns the instruction before each prompt as an argument, for an ``encode_prompt`` that does not add it."""
        return {}

    def _warn_of_cut_prompts(self, pipeline: Any, prompts: Sequence[str]) -> None:
        """Warns once with the number of prompts that are cut; diffusers prints the rest of each."""
        lengths, most = self._prompt_lengths(pipeline, prompts)
        number = sum(length > most for length in lengths) if most is not None else 0
        if number:
            text = f"{number} of {len(prompts)} prompts are cut after {most} tokens"
            warnings.warn(text, PromptWarning, stacklevel=3)

    def _prompt_lengths(self, pipeline: Any, prompts: Sequence[str]) -> tuple[Sequence[int], int | None]:
        """Returns each prompt's length in tokens, and the most that the pipeline encodes (``None``: no limit)."""
        tokenizers = (getattr(pipeline, f"{TOKENIZER}{end}", None) for end in ("_3", "_2", ""))
        tokenizer = next((held for held in tokenizers if held is not None), None)  # T5's is the last one
        most = self.text_options.get("max_sequence_length") or getattr(tokenizer, "model_max_length", None)
        if tokenizer is None or most is None:
            return [], None
        return [len(tokens) for tokens in tokenizer(list(prompts)).input_ids], most

    def encode_prompts(
        self, pipeline: Any, prompts: Sequence[str], images: Sequence[Tensor] | None = None
    ) -> list[Condition]:
        """Encodes prompts for :meth:`sample`, which then needs no text encoders.

        Returns:
            For each prompt tensors ``[1, ...]`` on the CPU by name: the embeddings of :meth:`encode_text`, and with the
            prefix ``negative_`` those of :attr:`negative_prompt`.
        """
        if not prompts:
            return []
        encoded = self.encode_text(pipeline, prompts, images)
        negatives: list[Condition] = [{}] * len(prompts)
        if self.negative_prompt is not None and self.text_sees_image:
            negatives = self.encode_text(pipeline, [self.negative_prompt] * len(prompts), images)
        elif self.negative_prompt is not None:
            negatives = [self.encode_unconditional(pipeline)] * len(prompts)
        return [
            {name: tensor[None] for name, tensor in each.items()}
            | {f"negative_{name}": tensor[None] for name, tensor in negative.items()}
            for each, negative in zip(encoded, negatives, strict=True)
        ]

    def encode_unconditional(self, pipeline: Any) -> Condition:
        """Encodes the negative prompt, for guidance and for dropped captions, as :meth:`encode_text` does."""
        return self.encode_text(pipeline, [self.negative_prompt or ""])[0]

    def encode_condition_image(self, pipeline: Any, pixels: Tensor) -> list[Condition]:
        """Encodes condition images: for each ``condition_latents``, by default the mode of :meth:`encode_pixels`.

        Args:
            pipeline: from :meth:`load_encoders`.
            pixels: ``[N, 3, H, W]`` uint8.

        Returns:
            Tensors by name, without a batch dimension, on the VAE's device.
        """
        return [{CONDITION_LATENTS: latents} for latents in self.encode_pixels(pipeline, pixels)]

    @torch.no_grad()
    def encode_pixels(self, pipeline: Any, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encodes images ``[N, 3, H, W]`` or clips ``[N, F, 3, H, W]`` into latents.

        Args:
            pipeline: from :meth:`load_encoders`.
            pixels: uint8, or any float dtype in [-1, 1]; on any device. Converted to floats on the VAE's device.
            generator: to draw from the posterior; ``None`` takes its mode. Not used by a VAE without a posterior.

        Returns:
            ``[N, *latent_layout]`` float32 on the VAE's device, scaled as the network takes them.
        """
        vae = pipeline.vae
        pixels = as_floats(pixels.to(vae.device))
        if self.video:
            pixels = pixels.transpose(1, 2)
        elif self.vae_frames:
            pixels = pixels[:, :, None]
        latents = self._from_vae(encode(vae, pixels, generator))
        mean, scale = latent_affine(vae, latents)
        latents = (latents - mean) * scale
        return latents.transpose(1, 2).contiguous() if self.latent_layout == "FCHW" else latents

    def _from_vae(self, latents: Tensor) -> Tensor:
        """Lays out what the VAE encoded as the latents that its statistics are of."""
        if self.vae_frames:
            latents = latents[:, :, 0]
        return latents if self.vae_patch == 1 else stack_patches(latents, self.vae_patch)

    def latent_shape(self, pipeline: Any, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """Returns the shape of one sample's latents, from the VAE's configuration."""
        sides = {
            "C": latent_channels(pipeline.vae.config) * self.vae_patch**2,
            "F": (frames - 1) // self.frame_stride + 1,
            "H": height // self.latent_pixels,
            "W": width // self.latent_pixels,
        }
        return tuple(sides[axis] for axis in self.latent_layout)

    @torch.no_grad()
    def decode_latents(self, pipeline: Any, latents: Tensor) -> Tensor:
        """Decodes latents of :meth:`encode_pixels` into float32 pixels, about in [-1, 1]."""
        vae = pipeline.vae
        latents = latents.to(vae.device, torch.float32)
        if self.latent_layout == "FCHW":
            latents = latents.transpose(1, 2)
        mean, scale = latent_affine(vae, latents)
        latents = latents / scale + mean
        if self.vae_patch > 1:
            latents = unstack_patches(latents, self.vae_patch)
        frames = self.vae_frames
        pixels = vae.decode((latents[:, :, None] if frames else latents).to(vae.dtype), return_dict=False)[0].float()
        if frames:
            return pixels[:, :, 0]
        return pixels.transpose(1, 2) if self.video else pixels

    def own_condition(
        self, original_size: tuple[int, int], crop_top_left: tuple[int, int], size: tuple[int, int]
    ) -> Condition:
        """Returns a network's further inputs about one image (SDXL's time ids); sizes are (height, width)."""
        return {}

    def check_size(self, height: int, width: int, frames: int) -> None:
        """Refuses a size in pixels that the family's VAE or networks cannot take.

        Raises:
            ValueError: names the nearest size that fits.
        """
        multiple, stride = self.side_multiple, self.frame_stride
        nearest = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
        nearest_frames = max(0, round((frames - 1) / stride)) * stride + 1 if self.video else 1
        if [height, width, frames] == [*nearest, nearest_frames]:
            return
        clips = f" and {stride}k+1 frames" if self.video else " and 1 frame"
        raise ValueError(
            f"height={height}, width={width}, frames={frames}: expected multiples of {multiple} pixels{clips}; "
            f"the nearest is height={nearest[0]}, width={nearest[1]}, frames={nearest_frames}"
        )

    def check_encoders_size(self, pipeline: Any, height: int, width: int) -> None:
        """Refuses a size in pixels that these encoders cannot take, though :meth:`check_size` accepts it.

        Raises:
            ValueError: says which sizes they take.
        """

    def check_network_size(self, config: Any, height: int, width: int, frames: int) -> None:
        """Refuses a size in pixels that this network cannot take, though other networks of the family can.

        Args:
            config: the network's configuration.
            height, width, frames: in pixels and frames; accepted by :meth:`check_size`.

        Raises:
            ValueError: says which sizes the network takes.
        """
        patch = getattr(config, "patch_size", None) or 1
        rows, columns = patch[-2:] if isinstance(patch, (list, tuple)) else (patch, patch)
        for name, side, part in (("height", height, rows), ("width", width, columns)):
            if side % (self.latent_pixels * part):
                expected = f"a multiple of {self.latent_pixels * part} pixels, by the network's patch_size={patch}"
                raise ValueError(f"{name}={side}: expected {expected}")
        tables = getattr(config, "axes_lens", None)  # of rotary embeddings: text, rows, columns
        most = min(tables[1:]) * self.side_multiple if tables else None
        if most is not None and max(height, width) > most:
            expected = f"at most {most} pixels a side, by the network's axes_lens={tables}"
            raise ValueError(f"height={height}, width={width}: expected {expected}")


def _own_row(row: Condition) -> Condition:
    """Cuts a prompt's embeddings to its own tokens where there is a mask."""
    mask = row.get(PROMPT_MASK)
    if mask is None:
        return {name: tensor.clone() for name, tensor in row.items()}
    tokens = mask.bool()
    return row | {PROMPT: row[PROMPT][tokens], PROMPT_MASK: tokens[tokens]}
