"""The base class of model families: from text, pixels, noise and timesteps to a network's prediction."""

from __future__ import annotations

import copy
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sipo.families.loading import TEXT_ENCODER, VAE, PipelineLoader
from sipo.families.network import POOLED, PROMPT, Condition, evaluating, inner_network, network_dtype, predicting_in
from sipo.families.vae import LATENT_PIXELS, as_floats, latent_affine
from sipo.schedule import DEFAULT_INFERENCE_STEPS


class PromptWarning(UserWarning):
    """Prompts are longer than the text encoder's limit."""


class Family(PipelineLoader):
    """One family of diffusion models: its diffusers classes, and how to call them.

    A family has no state and no weights: its methods take the pipeline or the network. Latents are scaled, and laid out
    as the network takes them (``latent_layout``).

    Attributes:
        latent_layout: dimensions of one sample's latents: "CHW", "FCHW" or "CFHW".
        lora_targets: modules that LoRA adapts unless a configuration names others.
        guidance: classifier-free guidance scale for samples in validation.
        side_multiple: height and width in pixels are multiples of it.
        frame_stride: the number of frames of a clip is a multiple of it, plus one.
        text_options: further arguments of the pipeline's ``encode_prompt``.
    """

    latent_layout: ClassVar[str] = "CHW"
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    guidance: ClassVar[float]
    side_multiple: ClassVar[int]
    frame_stride: ClassVar[int] = 1
    text_options: ClassVar[Mapping[str, Any]] = {}

    # ---- Encoding ----

    @torch.no_grad()
    def encode_text(self, pipeline: Any, prompts: Sequence[str]) -> list[Condition]:
        """Encodes text: one dictionary of embeddings for each prompt, without a batch dimension, on the CPU.

        Every prompt's tensors have the same shapes: ``prompt_embeds [L, D]`` padded to the family's length, and in some
        families ``pooled_prompt_embeds [D']``, in the text encoders' dtype.

        Warns:
            PromptWarning: prompts are cut; says how many.
        """
        if not prompts:
            return []
        self._warn_of_cut_prompts(pipeline, prompts)
        encoded = pipeline.encode_prompt(
            prompt=list(prompts),
            device=pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
            **self.text_options,
        )
        # (prompts, negative) or (prompts, negative, pooled, negative pooled)
        tensors = {PROMPT: encoded[0]} if len(encoded) == 2 else {PROMPT: encoded[0], POOLED: encoded[2]}
        host = {name: tensor.cpu() for name, tensor in tensors.items()}
        return [{name: tensor[i].clone() for name, tensor in host.items()} for i in range(len(prompts))]

    def _warn_of_cut_prompts(self, pipeline: Any, prompts: Sequence[str]) -> None:
        """Warns once with the number of prompts that are cut; diffusers prints the rest of each."""
        tokenizer = getattr(pipeline, "tokenizer_3", None) or getattr(pipeline, "tokenizer", None)
        most = self.text_options.get("max_sequence_length") or getattr(tokenizer, "model_max_length", None)
        if tokenizer is None or most is None:
            return
        number = sum(len(tokens) > most for tokens in tokenizer(list(prompts)).input_ids)
        if number:
            text = f"{number} of {len(prompts)} prompts are cut after {most} tokens"
            warnings.warn(text, PromptWarning, stacklevel=3)

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str]) -> list[Condition]:
        """Encodes prompts for :meth:`sample`, which then needs no text encoders.

        Returns:
            For each prompt arguments of the pipeline by name, ``[1, ...]`` on the CPU: the embeddings of
            :meth:`encode_text`, and with the prefix ``negative_`` those of :meth:`encode_unconditional`.
        """
        if not prompts:
            return []
        encoded, empty = self.encode_text(pipeline, prompts), self.encode_unconditional(pipeline)
        negative = {f"negative_{name}": tensor[None] for name, tensor in empty.items()}
        return [{name: tensor[None] for name, tensor in each.items()} | negative for each in encoded]

    def encode_unconditional(self, pipeline: Any) -> Condition:
        """Encodes the empty prompt, for guidance and for dropped captions, as :meth:`encode_text` does."""
        return self.encode_text(pipeline, [""])[0]

    @torch.no_grad()
    def encode_pixels(self, pipeline: Any, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encodes images ``[N, 3, H, W]`` or clips ``[N, F, 3, H, W]`` into latents.

        Args:
            pipeline: from :meth:`load_encoders`.
            pixels: uint8, or any float dtype in [-1, 1]; on any device. Converted to floats on the VAE's device.
            generator: to draw from the posterior; ``None`` takes its mode.

        Returns:
            ``[N, *latent_layout]`` float32 on the VAE's device, scaled as the network takes them.
        """
        vae = pipeline.vae
        pixels = as_floats(pixels.to(vae.device)).to(vae.dtype)
        posterior = vae.encode(pixels.transpose(1, 2) if self.video else pixels).latent_dist
        latents = (posterior.mode() if generator is None else posterior.sample(generator)).float()
        mean, scale = latent_affine(vae.config, latents)
        latents = (latents - mean) * scale
        return latents.transpose(1, 2).contiguous() if self.latent_layout == "FCHW" else latents

    def latent_shape(self, pipeline: Any, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """Returns the shape of one sample's latents, from the VAE's configuration."""
        config = pipeline.vae.config
        factor = getattr(pipeline, "vae_scale_factor_spatial", None) or pipeline.vae_scale_factor
        sides = {
            "C": getattr(config, "latent_channels", None) or config.z_dim,
            "F": (frames - 1) // self.frame_stride + 1,
            "H": height // factor,
            "W": width // factor,
        }
        return tuple(sides[axis] for axis in self.latent_layout)

    @torch.no_grad()
    def decode_latents(self, pipeline: Any, latents: Tensor) -> Tensor:
        """Decodes latents of :meth:`encode_pixels` into float32 pixels, about in [-1, 1]."""
        vae = pipeline.vae
        latents = latents.to(vae.device, torch.float32)
        if self.latent_layout == "FCHW":
            latents = latents.transpose(1, 2)
        mean, scale = latent_affine(vae.config, latents)
        pixels = vae.decode((latents / scale + mean).to(vae.dtype), return_dict=False)[0].float()
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
            if side % (LATENT_PIXELS * part):
                expected = f"a multiple of {LATENT_PIXELS * part} pixels, by the network's patch_size={patch}"
                raise ValueError(f"{name}={side}: expected {expected}")

    # ---- The network's call ----

    @abstractmethod
    def predict(self, module: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
        """Meets :class:`sipo.protocols.Predict`: ``module`` may be wrapped (DDP) or hold adapters.

        Args:
            module: the network, called as a module.
            noisy: ``[N, *latent_layout]``.
            timesteps: ``[N]``, indices or σ · 1000 of a flow, as the pipeline passes them.
            condition: tensors ``[N, ...]`` under the names of :meth:`encode_text` and :meth:`own_condition`.

        Returns:
            The prediction in the schedule's parameterisation, shaped as ``noisy``.

        Raises:
            ValueError: a tensor of the condition is missing.
        """

    # ---- Sampling ----

    @torch.no_grad()
    def sample(
        self,
        pipeline: Any,
        network: nn.Module,
        prompts: Sequence[str] | Sequence[Condition],
        *,
        seed: int,
        height: int,
        width: int,
        frames: int = 1,
        steps: int = DEFAULT_INFERENCE_STEPS,
        guidance: float | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Tensor:
        """Samples from the pipeline with ``network``, for validation.

        Prompts are sampled one by one, so that memory does not depend on their number. Torch's global generators are
        not used, and the network keeps its mode.

        Args:
            pipeline: from :meth:`load_encoders`; its dtype and device may differ from the network's. Its text encoders
                are used only for prompts that are strings.
            network: the trained network, wrapped or not; the sampler runs on its device and in its dtype.
            prompts: one sample for each; strings, or results of :meth:`encode_prompts`.
            seed: for the first prompt; the next one has ``seed + 1``, and so on.
            height, width, frames: in pixels and frames, see :meth:`check_size`.
            steps: number of steps of the sampler.
            guidance: classifier-free guidance scale; the family's if left out.
            autocast: makes the context in which the network runs, as in training. Predictions are cast to the network's
                own dtype, and the VAE decodes outside the context.

        Returns:
            ``[N, 3, H, W]`` or ``[N, F, 3, H, W]`` uint8 on the CPU.
        """
        self.check_size(height, width, frames)
        network = inner_network(network)
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        conditions: Any = prompts if len(texts) < len(prompts) else self.encode_prompts(pipeline, texts)
        size = {"height": height, "width": width} | ({"num_frames": frames} if self.video else {})
        sampler = self._sampler(pipeline, network)
        device, dtype = next(network.parameters()).device, network_dtype(network)
        pictures = []
        with evaluating(network.modules()):
            for i, condition in enumerate(conditions):
                with autocast(), predicting_in(network, dtype):
                    latents = sampler(
                        **{name: tensor.to(device, dtype) for name, tensor in condition.items()},
                        **size,
                        num_inference_steps=steps,
                        guidance_scale=self.guidance if guidance is None else guidance,
                        generator=torch.Generator().manual_seed(seed + i),
                        output_type="latent",
                        return_dict=False,
                    )[0]
                pixels = self.decode_latents(pipeline, latents)
                pictures.append((pixels / 2 + 0.5).clamp(0, 1).mul(255).round().to("cpu", torch.uint8))
        return torch.cat(pictures) if pictures else torch.empty(0, dtype=torch.uint8)

    def _sampler(self, pipeline: Any, network: nn.Module) -> Any:
        """Returns a copy of the pipeline with only ``network``, which then determines its device and dtype.

        The copy is shallow, with its own scheduler; the original pipeline is not changed.
        """
        sampler = copy.copy(pipeline)
        encoders = {name: None for name in pipeline.components if name.startswith((TEXT_ENCODER, VAE))}
        scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        sampler.register_modules(**encoders, scheduler=scheduler, **{self.network: network})
        sampler.set_progress_bar_config(disable=True)
        return sampler


def drop_text_encoders(pipeline: Any) -> None:
    """Removes a pipeline's text encoders; :meth:`Family.sample` then accepts only encoded prompts."""
    pipeline.register_modules(**{name: None for name in pipeline.components if name.startswith(TEXT_ENCODER)})
