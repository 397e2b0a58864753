"""What a model family is: how text, pixels, noise and timesteps become a network's prediction."""

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
    """Prompts are longer than what the text encoder reads."""


class Family(PipelineLoader):
    """One family of diffusion models: which diffusers classes it consists of, and how they are called.

    A family has no state and no weights: its methods are given the pipeline or the network to work on. Latents are
    what the network takes: scaled, with the frames where the network has them (``latent_layout``).

    Attributes:
        latent_layout: dimensions of one sample's latents: "CHW", "FCHW" or "CFHW".
        lora_targets: modules that LoRA adapts unless a configuration names others.
        guidance: classifier-free guidance scale that validation samples with.
        side_multiple: height and width in pixels are multiples of it.
        frame_stride: a clip has a multiple of it frames, and one.
        text_options: arguments of the pipeline's ``encode_prompt`` beside the prompt.
    """

    latent_layout: ClassVar[str] = "CHW"
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    guidance: ClassVar[float]
    side_multiple: ClassVar[int]
    frame_stride: ClassVar[int] = 1
    text_options: ClassVar[Mapping[str, Any]] = {}

    # ---- Encoding: once, beforehand ----

    @torch.no_grad()
    def encode_text(self, pipeline: Any, prompts: Sequence[str]) -> list[Condition]:
        """Text embeddings, one dictionary for each prompt, without a batch dimension, on the CPU.

        Every prompt's tensors have the same shapes: ``prompt_embeds [L, D]`` padded to the family's length, and
        where the family has them ``pooled_prompt_embeds [D']``, in the text encoders' type.

        Warns:
            PromptWarning: how many of the prompts are cut.
        """
        if not prompts:
            return []
        self._tell_of_cut_prompts(pipeline, prompts)
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

    def _tell_of_cut_prompts(self, pipeline: Any, prompts: Sequence[str]) -> None:
        """One warning with a number; diffusers prints what is cut off of each."""
        tokenizer = getattr(pipeline, "tokenizer_3", None) or getattr(pipeline, "tokenizer", None)
        most = self.text_options.get("max_sequence_length") or getattr(tokenizer, "model_max_length", None)
        if tokenizer is None or most is None:
            return
        number = sum(len(tokens) > most for tokens in tokenizer(list(prompts)).input_ids)
        if number:
            text = f"{number} of {len(prompts)} prompts are cut after {most} tokens"
            warnings.warn(text, PromptWarning, stacklevel=3)

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str]) -> list[Condition]:
        """What :meth:`sample` takes in place of each prompt, so that the text encoders need not be kept.

        Arguments of the pipeline by name, ``[1, ...]`` on the CPU: the prompt's embeddings as in :meth:`encode_text`,
        and under ``negative_...`` those of :meth:`encode_unconditional`.
        """
        if not prompts:
            return []
        encoded, empty = self.encode_text(pipeline, prompts), self.encode_unconditional(pipeline)
        negative = {f"negative_{name}": tensor[None] for name, tensor in empty.items()}
        return [{name: tensor[None] for name, tensor in each.items()} | negative for each in encoded]

    def encode_unconditional(self, pipeline: Any) -> Condition:
        """What sampling under guidance has in place of a prompt: the caption to drop to, as in :meth:`encode_text`."""
        return self.encode_text(pipeline, [""])[0]

    @torch.no_grad()
    def encode_pixels(self, pipeline: Any, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents of images ``[N, 3, H, W]`` or clips ``[N, F, 3, H, W]``.

        Args:
            pipeline: of :meth:`load_encoders`.
            pixels: uint8, or of any float type in [-1, 1]; on any device. They go to the VAE's as they are, and become
                floats there.
            generator: draws from the posterior; its mode is taken without one.

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
        """What :meth:`encode_pixels` makes of one sample of that size: numbers of the VAE's configuration."""
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
        """Pixels of latents, about in [-1, 1] and float32: the way back from :meth:`encode_pixels`."""
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
        """What the network is told about one image beside its prompt (SDXL's time ids); sizes are (height, width)."""
        return {}

    def check_size(self, pipeline: Any, height: int, width: int, frames: int) -> None:
        """Refuses a size in pixels that the VAE or the network cannot take.

        Raises:
            ValueError: with the nearest size that fits.
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
        """Refuses a size in pixels that this network cannot take, though others of its family can.

        Args:
            config: the network's.
            height, width, frames: in pixels and frames; of :meth:`check_size`.

        Raises:
            ValueError: says what the network takes.
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
        """Samples of the real pipeline around ``network``, for a look during training.

        Prompts are sampled one by one, so that memory does not depend on how many there are. Torch's global
        generators are not drawn from, and the network is left in the mode it came in.

        Args:
            pipeline: of :meth:`load_encoders`; may be of another type than the network, and on another device. Its
                text encoders are used only where a prompt is a string.
            network: what is trained, wrapped or not; the sampler runs on its device and in its type.
            prompts: one sample for each; strings, or what :meth:`encode_prompts` made of them.
            seed: of the first prompt; the next has ``seed + 1``, and so on.
            height, width, frames: in pixels and frames, see :meth:`check_size`.
            steps: of the sampler.
            guidance: classifier-free guidance scale; the family's if left out.
            autocast: gives the context that the network runs in, as in training. Between two calls of the network the
                sampler keeps to the network's own type, and the VAE decodes outside of it.

        Returns:
            ``[N, 3, H, W]`` or ``[N, F, 3, H, W]`` uint8 on the CPU.
        """
        self.check_size(pipeline, height, width, frames)
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
        """The pipeline around ``network`` alone, which then says on which device and in which type it runs.

        A shallow copy with a scheduler of its own; the pipeline that was passed in stays as it is.
        """
        sampler = copy.copy(pipeline)
        encoders = {name: None for name in pipeline.components if name.startswith((TEXT_ENCODER, VAE))}
        scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        sampler.register_modules(**encoders, scheduler=scheduler, **{self.network: network})
        sampler.set_progress_bar_config(disable=True)
        return sampler


def drop_text_encoders(pipeline: Any) -> None:
    """Removes a pipeline's text encoders; :meth:`Family.sample` then takes encoded prompts only."""
    pipeline.register_modules(**{name: None for name in pipeline.components if name.startswith(TEXT_ENCODER)})
