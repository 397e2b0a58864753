"""The base class of model families: from text, pixels, noise and timesteps to a network's prediction."""

from __future__ import annotations

import contextlib
import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sipo.families.encoding import PipelineEncoder
from sipo.families.loading import TEXT_ENCODER, VAE
from sipo.families.network import Condition, evaluating, inner_network, network_dtype, predicting_in
from sipo.families.packing import pack, unpack
from sipo.families.vae import PipelineVae, as_picture
from sipo.schedule import DEFAULT_INFERENCE_STEPS
from sipo.seeds import RandomStream, derive_seed, preserve_random_state


class Family(PipelineEncoder):
    """One family of diffusion models: its diffusers classes, and how to call them.

    A family has no state and no weights: its methods take the pipeline or the network. Latents are scaled, and laid out
    as ``latent_layout`` says; a network that takes tokens gets them from :meth:`pack`.

    Most families are a table of attributes and :meth:`network_inputs`; a method is overridden where a model has a rule
    of its own.

    Attributes:
        negated: whether the network predicts the negative of what the schedule says.
        takes_sigma: whether the network is told σ in place of σ · 1000; timesteps are rounded to its dtype first.
        float32_conditions: names in a condition that stay float32; the rest is cast to the network's dtype.
        lora_targets: modules that LoRA adapts unless a configuration names others.
        unread: modules of the last of the network's ``transformer_blocks`` whose outputs nothing reads.
        guidance: guidance scale for samples in validation; also what a network with a guidance embedding is told in
            training.
        sampler_needs_vae: whether the pipeline reads from its VAE while it samples latents.
    """

    negated: ClassVar[bool] = False
    takes_sigma: ClassVar[bool] = False
    float32_conditions: ClassVar[tuple[str, ...]] = ()
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    unread: ClassVar[tuple[str, ...]] = ()
    guidance: ClassVar[float]
    sampler_needs_vae: ClassVar[bool] = False

    # ---- The network's call ----

    def predict(
        self, module: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Any, *, guidance: float | None = None
    ) -> Tensor:
        """Meets :class:`sipo.protocols.Predict`: ``module`` may be wrapped (DDP) or hold adapters.

        Args:
            module: the network, called as a module.
            noisy: ``[N, *latent_layout]``.
            timesteps: ``[N]``, indices or σ · 1000 of a flow, as the schedule has them.
            condition: tensors ``[N, ...]`` under the names of :meth:`encode_text`, :meth:`encode_condition_image` and
                :meth:`own_condition`.
            guidance: what a network with a guidance embedding is told; :attr:`guidance` if left out.

        Returns:
            The prediction in the schedule's parameterisation, shaped as ``noisy``.

        Raises:
            ValueError: a tensor of the condition is missing.
        """
        network = inner_network(module)
        dtype = network_dtype(network)
        held = dict(condition) if isinstance(condition, Mapping) else {}
        for name, tensor in held.items():
            if tensor.is_floating_point() and name not in self.float32_conditions:
                held[name] = tensor.to(dtype)
        told = self.guidance if guidance is None else guidance
        time = self.network_time(timesteps.to(dtype) if self.takes_sigma else timesteps)
        inputs = self.network_inputs(network.config, noisy.to(dtype), time, held, told)
        output = module(**inputs, return_dict=False)[0]
        prediction: Tensor = self.unpack(output, noisy.shape)
        return -prediction if self.negated else prediction

    @abstractmethod
    def network_inputs(
        self, config: Any, noisy: Tensor, time: Tensor, condition: Condition, guidance: float
    ) -> dict[str, Any]:
        """Returns the arguments of the network's call by name, as the model's pipeline passes them.

        Args:
            config: the network's configuration.
            noisy: ``[N, *latent_layout]`` in the network's dtype; :meth:`pack` makes tokens of it.
            time: ``[N]``, of :meth:`network_time`.
            condition: tensors ``[N, ...]`` by name, in the network's dtype but for ``float32_conditions``.
            guidance: for a guidance embedding.
        """

    def networks_in(self, network: nn.Module) -> dict[str, nn.Module]:
        """Returns the networks in what :meth:`load_network` returns, without wrappers, by their pipeline's names."""
        return dict(network.named_children()) if self.experts else {self.network: network}

    def keep_unread_from_ddp(self, network: Any) -> None:
        """Marks weights that no prediction depends on, so that DDP does not wait for their gradients."""
        if self.unread:
            last = f"transformer_blocks.{len(network.transformer_blocks) - 1}."
            starts = tuple(f"{last}{name}." for name in self.unread)
            names = [name for name, _ in network.named_parameters() if name.startswith(starts)]
            # Those of a compiled network, and of one whose blocks are compiled.
            compiled = [f"_orig_mod.{name}" for name in names]
            names += compiled + [f"{last}_orig_mod.{name.removeprefix(last)}" for name in names]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, names)

    def network_time(self, timesteps: Tensor) -> Tensor:
        """Converts timesteps ``[N]``, as :meth:`predict` takes them, to what the network is told."""
        return timesteps / 1000 if self.takes_sigma else timesteps

    def pack(self, latents: Tensor) -> Tensor:
        """Makes the tokens of latents ``[N, C, H, W]``: ``[N, L, D]``; without ``token_side`` the latents stay."""
        return latents if self.token_side is None else pack(latents, self.token_side)

    def unpack(self, output: Any, shape: Sequence[int]) -> Any:
        """Lays out the network's output as latents of ``shape``, without the tokens of a condition image."""
        return output if self.token_side is None else unpack(output, shape, self.token_side)

    # ---- Sampling ----

    @torch.no_grad()
    def sample(
        self,
        pipeline: Any,
        network: nn.Module,
        prompts: Sequence[str] | Sequence[Condition],
        *,
        images: Sequence[Tensor] | None = None,
        seed: int,
        height: int,
        width: int,
        frames: int = 1,
        steps: int = DEFAULT_INFERENCE_STEPS,
        guidance: float | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Tensor:
        """Samples from the pipeline with ``network``, for validation.

        Prompts are sampled one by one, so that memory does not depend on their number. Torch's global generators, of
        the CPU and of the network's device, are as before afterwards, and the network keeps its mode.

        Args:
            pipeline: from :meth:`load_encoders`; its dtype and device may differ from the network's. Its text encoders
                are used only for prompts that are strings.
            network: the trained network, wrapped or not; the sampler runs on its device and in its dtype.
            prompts: one sample for each; strings, or results of :meth:`encode_prompts`.
            images: uint8 ``[3, H, W]``, the image that each sample is an edit of.
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
        conditions: Any = prompts if len(texts) < len(prompts) else self.encode_prompts(pipeline, texts, images)
        size = self._sampler_size(height, width, frames)
        sampler = self._sampler(pipeline, network, with_vae=self.sampler_needs_vae or images is not None)
        device, dtype = next(network.parameters()).device, network_dtype(network)
        scale = self.guidance if guidance is None else guidance
        pictures = []
        with evaluating(network.modules()), preserve_random_state(device):
            for i, condition in enumerate(conditions):
                given = {
                    name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
                    for name, tensor in condition.items()
                }
                with autocast(), contextlib.ExitStack() as stack:
                    # Some schedulers draw noise, and few pipelines pass them a generator.
                    torch.manual_seed(derive_seed(seed + i, RandomStream.SAMPLER, 0))
                    for part in self.networks_in(network).values():
                        stack.enter_context(predicting_in(part, dtype))
                    output = sampler(
                        **self._sampler_arguments(given, scale, None if images is None else images[i]),
                        **size,
                        num_inference_steps=steps,
                        generator=torch.Generator().manual_seed(seed + i),
                        output_type="latent",
                        return_dict=False,
                    )[0]
                latents = self._sampled_latents(pipeline, output, height, width)
                pixels = self.decode_latents(pipeline, latents)
                pictures.append((pixels / 2 + 0.5).clamp(0, 1).mul(255).round().to("cpu", torch.uint8))
        return torch.cat(pictures) if pictures else torch.empty(0, dtype=torch.uint8)

    def _sampler_size(self, height: int, width: int, frames: int) -> dict[str, Any]:
        """Returns the pipeline's arguments for the size of a sample."""
        return {"height": height, "width": width} | ({"num_frames": frames} if self.video else {})

    def _sampler_arguments(self, condition: Condition, guidance: float, image: Tensor | None) -> dict[str, Any]:
        """Returns the pipeline's arguments for one sample of a condition of :meth:`encode_prompts`."""
        picture = {} if image is None else {"image": as_picture(image)}
        return {**condition, **picture, "guidance_scale": guidance}

    def _sampled_latents(self, pipeline: Any, output: Tensor, height: int, width: int) -> Tensor:
        """Lays out the latents that the pipeline sampled as those of :meth:`encode_pixels`."""
        if self.token_side is None:
            return output
        latents: Tensor = self.unpack(output, (len(output), *self.latent_shape(pipeline, height, width)))
        return latents

    def _sampler(self, pipeline: Any, network: nn.Module, *, with_vae: bool) -> Any:
        """Returns a copy of the pipeline with only ``network``, which then determines its device and dtype.

        The copy is shallow, with its own scheduler; the original pipeline is not changed.
        """
        sampler = copy.copy(pipeline)
        others: dict[str, Any] = {name: None for name in pipeline.components if name.startswith((TEXT_ENCODER, VAE))}
        if with_vae:
            others[VAE] = PipelineVae(pipeline.vae)
        scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        sampler.register_modules(**others, scheduler=scheduler, **self.networks_in(network))
        sampler.set_progress_bar_config(disable=True)
        return sampler


def drop_text_encoders(pipeline: Any) -> None:
    """Removes a pipeline's text encoders; :meth:`Family.sample` then accepts only encoded prompts."""
    pipeline.register_modules(**{name: None for name in pipeline.components if name.startswith(TEXT_ENCODER)})
