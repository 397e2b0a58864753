"""What a model family is: how text, pixels, noise and timesteps become a network's prediction."""

from __future__ import annotations

import copy
import reprlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sipo.families.model_files import (
    CONFIG,
    HUB_OPTIONS,
    MODEL_INDEX,
    check_model,
    check_vocabulary,
    fetch_weights,
    is_module,
    load_module,
    model_folder,
)
from sipo.files import FileError, read_object
from sipo.processes import is_out_of_memory
from sipo.schedule import DEFAULT_INFERENCE_STEPS, NoiseSchedule
from sipo.schedule.diffusers_schedulers import SettingError, check_sampler, with_settings

Condition = dict[str, Tensor]
"""What a network is given beside the noisy latents: tensors by name, stacked along dimension 0."""

TEXT_ENCODER = "text_encoder"
"""What the names of a pipeline's components that encode text begin with."""

TOKENIZER = "tokenizer"
"""What the names of their tokenizers begin with, and end alike."""

VAE = "vae"
"""The name of a pipeline's VAE."""

_UPCAST = "force_upcast"  # of image VAEs' configurations; true where it is left out

PROMPT, POOLED = "prompt_embeds", "pooled_prompt_embeds"
"""Names in a condition; diffusers' pipelines take them under the same names."""


LATENT_PIXELS = 8
"""Pixels on a side of one latent, of every family's VAE."""


class PromptWarning(UserWarning):
    """Prompts are longer than what the text encoder reads."""


class Family(ABC):
    """One family of diffusion models: which diffusers classes it is made of, and how they are called.

    An adapter has no state and no weights: it is handed the pipeline or the network that it works on. Latents
    are what the network takes: already scaled, frames where the network has them (``latent_layout``).

    Attributes:
        name: as in a configuration's ``model.family``.
        pipeline_class: diffusers' pipeline, by name; its ``encode_prompt`` encodes text here as it does there.
        network_class: diffusers' class of what is trained.
        network: the pipeline's component that is trained, "unet" or "transformer".
        video: whether a sample has frames.
        latent_layout: dimensions of one sample's latents: "CHW", "FCHW" or "CFHW".
        lora_targets: modules that LoRA adapts unless a configuration names others.
        guidance: classifier-free guidance scale that validation samples with.
        side_multiple: height and width in pixels are multiples of it.
        frame_stride: a clip has a multiple of it frames, and one.
        flow_timesteps: for a flow, what σ is multiplied by to be the network's timestep; ``None`` for a
            discrete schedule, whose indices are the network's timesteps.
        text_options: arguments of the pipeline's ``encode_prompt`` beside the prompt.
    """

    name: ClassVar[str]
    pipeline_class: ClassVar[str]
    network_class: ClassVar[str]
    network: ClassVar[str]
    video: ClassVar[bool] = False
    latent_layout: ClassVar[str] = "CHW"
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    guidance: ClassVar[float]
    side_multiple: ClassVar[int]
    frame_stride: ClassVar[int] = 1
    flow_timesteps: ClassVar[int | None] = None
    text_options: ClassVar[Mapping[str, Any]] = {}
    _without: ClassVar[tuple[str, ...]] = ()  # components that are left out beside the network

    # ---- Loading: every path is a local folder or a hub id, laid out as diffusers saves a pipeline ----

    def load_network(self, path: str | Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
        """The network alone, in eval mode. ``options`` go to ``from_pretrained`` (revision, variant, ...).

        Raises:
            FileNotFoundError: nothing to load there, in one line that names the path.
            ValueError: a pipeline, or a network, that is not of this family; a damaged file, or a pickle.
        """
        self.network_config(path, **options)  # names another class, if it is one
        folder, variant = self.fetch(path, network=True, **options), options.get("variant")
        with _one_line(path):
            network = load_module(folder / self.network, "diffusers", self.network_class, dtype, variant)
        self._check_network(path, network)
        return network

    def empty_network(self, path: str | Path, **options: Any) -> nn.Module:
        """The network as its configuration describes it, without weights (on the meta device).

        Arguments and errors as for :meth:`load_network`.
        """
        import diffusers

        config = self.network_config(path, **options)
        try:
            with torch.device("meta"):
                network: nn.Module = getattr(diffusers, self.network_class).from_config(config)
        except Exception as error:  # whatever numbers the file holds
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            file = f"{path}: its {self.network}/{CONFIG}"
            raise ValueError(f"{file} describes no {self.network_class} ({reason})") from error
        self._check_network(path, network)
        return network

    def network_config(self, path: str | Path, **options: Any) -> dict[str, Any]:
        """The network's configuration. Arguments and errors as for :meth:`load_network`."""
        folder, index = self._open(path, options)
        found = index.get(self.network)
        if not isinstance(found, list) or found[1:] != [self.network_class]:
            raise ValueError(f"{path}: its {self.network} is {found!r}, expected a {self.network_class}")
        return read_object(folder / self.network / CONFIG)

    def load_encoders(
        self,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        vae_dtype: torch.dtype = torch.float32,
        text: bool = True,
        **options: Any,
    ) -> Any:
        """The pipeline without its network: tokenizers, text encoders, VAE and scheduler, frozen, in eval mode.

        The VAE is in ``vae_dtype``, all else in ``dtype``: in half precision latents are 1 to 2 % off. Without ``text``
        there are no text encoders either, and the pipeline samples from encoded prompts alone. Errors as for
        :meth:`load_network`, and a ValueError for a VAE that is known to overflow in float16.
        """
        import diffusers

        folder, variant = self.fetch(path, network=False, **options), options.pop("variant", None)
        _, index = self._open(path, options)
        modules: dict[str, Any] = dict.fromkeys((self.network, *self._without))
        if not text:
            modules |= dict.fromkeys(name for name in index if name.startswith(TEXT_ENCODER))
        vae_config = read_object(folder / VAE / CONFIG)
        _check_affine(folder / VAE / CONFIG, vae_config)
        if vae_dtype == torch.float16 and not self.video and vae_config.get(_UPCAST, True):
            raise ValueError(
                f"{path}: its VAE overflows in vae_dtype='float16' ({_UPCAST}), expected 'float32' or 'bfloat16'"
            )
        with _one_line(path):
            for name, (library, class_name) in _present(index):
                if name not in modules and is_module(library, class_name):
                    kept = vae_dtype if name == VAE else dtype
                    modules[name] = load_module(folder / name, library, class_name, kept, variant)
            # What is left are tokenizers and the scheduler.
            pipeline_class = getattr(diffusers, self.pipeline_class)
            pipeline = pipeline_class.from_pretrained(str(folder), **modules, **_local(options))
        for name, component in pipeline.components.items():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
            elif name.startswith(TOKENIZER) and component is not None:
                encoder = read_object(folder / name.replace(TOKENIZER, TEXT_ENCODER) / CONFIG)
                check_vocabulary(folder / name, component, encoder.get("vocab_size"))
        return pipeline

    def fetch(self, path: str | Path, *, network: bool, **options: Any) -> Path:
        """Downloads what a hub id lacks in the local cache, and refuses whatever is not safetensors.

        Args:
            path: as for :meth:`load_network`.
            network: the network; else all other components.
            options: as for :meth:`load_network`.

        Returns:
            The local folder. Errors as for :meth:`load_network`.
        """
        folder, index = self._open(path, options)
        left_out = (self.network, *self._without)
        components = [self.network] if network else [name for name, _ in _present(index) if name not in left_out]
        variant = options.get("variant")
        if self.network not in index:
            raise ValueError(f"{path}: has no {self.network}, expected a whole {self.pipeline_class}")
        fetch_weights(path, options, components, variant)
        check_model(folder, index, components, variant)
        return folder

    def load_schedule(
        self,
        path: str | Path,
        num_inference_steps: int = DEFAULT_INFERENCE_STEPS,
        *,
        prediction_type: str | None = None,
        shift: float | None = None,
        sampled: bool = False,
        sizes: Sequence[tuple[int, int]] = (),
        **options: Any,
    ) -> NoiseSchedule:
        """The noise schedule of the model's scheduler.

        Args:
            path: as for :meth:`load_network`.
            num_inference_steps: steps of the sampler.
            prediction_type, shift: in place of the scheduler's own, see
                :func:`sipo.schedule.diffusers_schedulers.with_settings`.
            sampled: whether samples are drawn with that ``prediction_type``, of which some schedulers can do a part.
            sizes: heights and widths in pixels that are trained at; dynamic shifting depends on them.
            options: as for :meth:`load_network`.

        Raises:
            FileNotFoundError, ValueError: as for :meth:`load_network`; a scheduler that is not modelled, or sizes that
                it shifts differently.
            SettingError: a setting that the scheduler does not have.
        """
        own = self.load_scheduler(path, **options)
        class_name = type(own).__name__
        try:
            scheduler = with_settings(own, prediction_type, shift)
            if sampled and scheduler is not own:
                check_sampler(scheduler)
            schedules = [
                NoiseSchedule.from_scheduler(scheduler, num_inference_steps, image_seq_len=length)
                for length in [self.image_seq_len(*size) for size in sizes] or [None]
            ]
        except SettingError:
            raise
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        schedule = schedules[0]
        for size, other in zip(sizes, schedules, strict=False):
            if other.shift != schedule.shift:
                raise ValueError(
                    f"{path}: its {class_name} has shift {schedule.shift:.4g} at {list(sizes[0])} and "
                    f"{other.shift:.4g} at {list(size)}: expected sizes with one shift, or a shift for all of them"
                )
        if schedule.invert_sigmas:  # families tell the network the share of noise
            raise ValueError(f"{path}: its {class_name} has invert_sigmas=True, expected a model without it")
        kind = "discrete" if self.flow_timesteps is None else "flow"
        if schedule.kind != kind:
            raise ValueError(f"{path}: its {class_name} is a {schedule.kind} schedule, expected a {kind} one")
        if self.flow_timesteps not in (None, schedule.num_train_timesteps):
            found = schedule.num_train_timesteps
            raise ValueError(f"{path}: its {class_name} has {found} timesteps, expected {self.flow_timesteps}")
        return schedule

    def load_scheduler(self, path: str | Path, **options: Any) -> Any:
        """The model's scheduler, as it is saved. Arguments and errors as for :meth:`load_network`."""
        import diffusers

        folder, index = self._open(path, options)
        entry = index.get("scheduler")
        library, class_name = entry if isinstance(entry, list) and len(entry) == 2 else (None, entry)
        scheduler_class: Any = getattr(diffusers, str(class_name), None) if library == "diffusers" else None
        if scheduler_class is None:
            raise ValueError(f"{path}: its scheduler is {class_name!r}, expected one of diffusers'")
        read_object(folder / "scheduler" / "scheduler_config.json")
        with _one_line(path):
            return scheduler_class.from_pretrained(str(folder), subfolder="scheduler")

    def image_seq_len(self, height: int, width: int) -> int | None:
        """Tokens of an image of that size, for the pipeline's dynamic shifting; ``None`` where it has none."""
        return None

    def _open(self, path: str | Path, options: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
        """The model's folder, and its ``model_index.json``."""
        folder = model_folder(path, options, self.pipeline_class)
        index = read_object(folder / MODEL_INDEX)
        self._check_index(path, index)
        return folder, index

    def _check_index(self, path: str | Path, index: Mapping[str, Any]) -> None:
        found = index.get("_class_name")
        if found != self.pipeline_class:
            raise ValueError(f"{path}: holds a {found}, expected a {self.pipeline_class} for family {self.name!r}")

    def _check_network(self, path: str | Path, network: Any) -> None:
        taken, given = network.config.in_channels, network.config.out_channels
        if taken != given:  # an inpainting or image-to-video network
            raise ValueError(
                f"{path}: its {self.network} takes {taken} channels and gives {given}, expected as many as it takes"
            )

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
        mean, scale = _affine(vae.config, latents)
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
        mean, scale = _affine(vae.config, latents)
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
            timesteps: ``[N]`` as :class:`sipo.NoiseSchedule` has them: indices, or σ in (0, 1] for a flow.
            condition: tensors ``[N, ...]`` under the names of :meth:`encode_text` and :meth:`own_condition`.

        Returns:
            The prediction in the schedule's parameterisation, shaped as ``noisy``.

        Raises:
            ValueError: a tensor of the condition is missing.
        """

    def _network_timesteps(self, timesteps: Tensor) -> Tensor:
        return timesteps if self.flow_timesteps is None else timesteps * self.flow_timesteps

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
        network = unwrapped(network)
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        conditions: Any = prompts if len(texts) < len(prompts) else self.encode_prompts(pipeline, texts)
        size = {"height": height, "width": width} | ({"num_frames": frames} if self.video else {})
        sampler = self._sampler(pipeline, network)
        device, dtype = next(network.parameters()).device, network_dtype(network)
        pictures = []
        with evaluating(network.modules()):
            for i, condition in enumerate(conditions):
                with autocast(), _predicting(network, dtype):
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
    """Lets go of what encodes text; what :meth:`Family.sample` draws from encoded prompts is as before."""
    pipeline.register_modules(**{name: None for name in pipeline.components if name.startswith(TEXT_ENCODER)})


@contextmanager
def _predicting(network: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The network's predictions come in one type inside, also where autocast would have them in another.

    The sampler's own arithmetic, guidance and steps, takes their type: in half precision it would round at each step.
    """

    def cast(module: nn.Module, args: Any, output: Any) -> Any:
        return (output[0].to(dtype), *output[1:]) if isinstance(output, tuple) else output

    hook = network.register_forward_hook(cast)
    try:
        yield
    finally:
        hook.remove()


def as_floats(pixels: Tensor) -> Tensor:
    """Levels of 0 to 255 (uint8) as float32 in [-1, 1], to the same bits on every device; floats as they are."""
    if pixels.dtype != torch.uint8:
        return pixels
    # By a tensor: GPUs multiply by the rounded inverse of a number.
    half = torch.full((), 127.5, dtype=torch.float32, device=pixels.device)
    return pixels.to(torch.float32).div_(half).sub_(1.0)


def unwrapped(module: nn.Module) -> Any:
    """The network inside the wrappers of DDP and ``torch.compile``, which has ``config``."""
    while True:
        inner = getattr(module, "_orig_mod", None) or getattr(module, "module", None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def network_dtype(network: nn.Module) -> torch.dtype:
    """The type that a network computes in and takes its input in.

    That is its first weight's (an adapter's come after those they adapt), but for modules kept in float32.
    """
    apart = getattr(network, "_keep_in_fp32_modules", None) or ()
    for name, parameter in network.named_parameters():
        if parameter.is_floating_point() and not any(part in name for part in apart):
            return parameter.dtype
    return torch.float32


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Every module in eval mode inside, and in its own mode again afterwards."""
    # By way of __dict__: at every step of a large network, nn.Module's own way costs tens of milliseconds.
    training = [module.__dict__ for module in modules if module.training]
    for attributes in training:
        attributes["training"] = False
    try:
        yield
    finally:
        for attributes in training:
            attributes["training"] = True


def pick(condition: Any, *names: str) -> list[Tensor]:
    """Tensors of a condition by name.

    Raises:
        ValueError: one is missing.
    """
    held = condition if isinstance(condition, Mapping) else {}
    for name in names:
        if name not in held:
            raise ValueError(f"condition holds {sorted(held)}: expected {name!r} as well")
    return [held[name] for name in names]


def _affine(config: Any, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Mean and scale of a VAE's latents ``[N, C, ...]``: the network takes ``(latents - mean) * scale``."""
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    scale = getattr(config, "scaling_factor", None) or 1.0
    if mean is None or std is None:
        return getattr(config, "shift_factor", None) or 0.0, scale
    shape = (1, -1, *[1] * (latents.ndim - 2))
    return latents.new_tensor(mean).view(shape), scale / latents.new_tensor(std).view(shape)


def _check_affine(file: Path, config: Mapping[str, Any]) -> None:
    """Refuses values of a VAE's ``config.json`` that :func:`_affine` cannot calculate with.

    Raises:
        FileError: names the file, the key and the value.
    """
    channels = config.get("latent_channels") or config.get("z_dim")
    for name in ("latents_mean", "latents_std"):
        values = config.get(name)
        if values is None:
            continue
        positive = name == "latents_std"
        sound = isinstance(values, list) and all(_is_number(value, positive) for value in values)
        if not sound or (isinstance(channels, int) and len(values) != channels):
            kind = "positive numbers" if positive else "finite numbers"
            shown = reprlib.repr(values)
            raise FileError(f"{file}: {name}={shown}, expected {kind}, one for each of {channels} channels")
    for name, positive in (("scaling_factor", True), ("shift_factor", False)):
        # Of configurations without the key diffusers has the class's own value; a VAE need not shift.
        value = config.get(name, 1.0)
        if not (_is_number(value, positive) or (value is None and not positive)):
            kind = "a positive number" if positive else "a finite number"
            raise FileError(f"{file}: {name}={reprlib.repr(value)}, expected {kind}")


def _is_number(value: Any, positive: bool) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) <= torch.finfo(torch.float32).max and (value > 0 or not positive)


def _present(index: Mapping[str, Any]) -> list[tuple[str, list[Any]]]:
    """A pipeline's components that are there, each with its library and class."""
    return [(name, value) for name, value in index.items() if isinstance(value, list) and any(value)]


def _local(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of the options of ``from_pretrained`` those that mean something for a local folder."""
    return {name: value for name, value in options.items() if name not in HUB_OPTIONS}


@contextmanager
def _one_line(path: str | Path) -> Iterator[None]:
    """diffusers' and transformers' errors about files, some of many lines, as one that begins with the path."""
    try:
        yield
    except OSError as error:
        raise FileNotFoundError(f"{path}: {' '.join(str(error).split())}") from error
    except FileError:
        raise
    except Exception as error:  # whatever a file's values lead to in a library, missing packages included
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{path}: {' '.join(str(error).split()) or type(error).__name__}") from error
