"""Loads the parts of a pipeline saved in diffusers' layout: network, encoders and noise schedule."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from sipo.families.model_files import (
    CONFIG,
    MODEL_INDEX,
    check_model,
    check_vocabulary,
    fetch_weights,
    find_model_folder,
    is_module,
    load_module,
)
from sipo.families.vae import check_latent_affine, latent_channels
from sipo.files import FileError, one_line, read_object
from sipo.processes import is_out_of_memory
from sipo.schedule import DEFAULT_INFERENCE_STEPS, NoiseSchedule, SizeDependentSchedule, linear_mu
from sipo.schedule.diffusers_schedulers import check_sampler, time_shift_type, with_settings
from sipo.schedule.levels import SettingError

TEXT_ENCODER = "text_encoder"
"""Prefix of the names of a pipeline's text encoders."""

TOKENIZER = "tokenizer"
"""Prefix of the names of its tokenizers, which have the same suffixes."""

VAE = "vae"
"""Name of a pipeline's VAE."""

_FAMILY_OF: dict[str, str] = {}  # names of families by their pipeline's class, for messages
_UPCAST = "force_upcast"  # key in the configuration of an image VAE; true by default


class PipelineLoader(ABC):
    """Loads the parts of one family's pipelines; every path is a local folder or a hub id.

    Attributes:
        name: as in a configuration's ``model.family``.
        pipeline_class: name of diffusers' pipeline, whose ``encode_prompt`` is used here too.
        network_class: name of diffusers' class of the trained network.
        network: the pipeline's component that is trained, "unet" or "transformer".
        experts: the components that are trained if there are several by noise level, high noise first
            (:class:`sipo.families.experts.ExpertNetworks`).
        video: whether a sample has frames.
        latent_pixels: height and width of one latent in pixels.
        vae_patch: side of the squares of the VAE's latents that are stacked into one latent; 1 for none.
        token_side: side in latents of one of the network's tokens; ``None`` for a network that takes latents.
        shift_pixels: side in pixels of the tokens from whose number the pipeline computes a dynamic shift; ``None`` for
            a pipeline that has none.
        text_width_key: key in the network's configuration of the width of text embeddings.
        schedule_kind: "discrete" or "flow", as :class:`sipo.NoiseSchedule` has it.
    """

    name: ClassVar[str]
    pipeline_class: ClassVar[str]
    network_class: ClassVar[str]
    network: ClassVar[str] = "transformer"
    experts: ClassVar[tuple[str, ...]] = ()
    video: ClassVar[bool] = False
    latent_pixels: ClassVar[int] = 8
    vae_patch: ClassVar[int] = 1
    token_side: ClassVar[int | None] = None
    shift_pixels: ClassVar[int | None] = None
    text_width_key: ClassVar[str] = "joint_attention_dim"
    schedule_kind: ClassVar[str] = "flow"
    _without: ClassVar[tuple[str, ...]] = ()  # components that are left out beside the network
    _pipeline_options: ClassVar[Mapping[str, Any]] = {}  # arguments of the pipeline's class

    def __init_subclass__(cls) -> None:
        if hasattr(cls, "pipeline_class"):
            _FAMILY_OF.setdefault(cls.pipeline_class, cls.name)

    @property
    def networks(self) -> tuple[str, ...]:
        """The pipeline's components that are trained."""
        return self.experts or (self.network,)

    def load_network(self, path: str | Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
        """Loads only the network, in eval mode.

        Args:
            path: local folder or hub id.
            dtype: of the weights.
            options: ``revision`` of a hub id and ``variant`` of the weights, both optional.

        Raises:
            FileNotFoundError: there is no model at the path; one line that names it.
            ValueError: the pipeline or its network is of another family; a file is damaged or a pickle.
        """
        for name in self.networks:
            self.network_config(path, name, **options)  # refuses a network of another class
        folder, variant = self.fetch(path, network=True, **options), options.get("variant")
        with _naming_path(path):
            parts = {
                name: load_module(folder / name, "diffusers", self.network_class, dtype, variant)
                for name in self.networks
            }
        return self._whole_network(path, parts, **options)

    def empty_network(self, path: str | Path, **options: Any) -> nn.Module:
        """Makes the network from its configuration, without weights (on the meta device).

        Arguments and errors as for :meth:`load_network`.
        """
        import diffusers

        parts: dict[str, nn.Module] = {}
        for name in self.networks:
            config = self.network_config(path, name, **options)
            try:
                with torch.device("meta"):
                    parts[name] = getattr(diffusers, self.network_class).from_config(config)
            except Exception as error:  # the file may hold any values
                reason = f"{type(error).__name__}: {one_line(error)}"
                file = f"{path}: its {name}/{CONFIG}"
                raise ValueError(f"{file} describes no {self.network_class} ({reason})") from error
        return self._whole_network(path, parts, **options)

    def _whole_network(self, path: str | Path, parts: dict[str, nn.Module], **options: Any) -> nn.Module:
        """Checks the networks of a pipeline, and makes one module of several."""
        folder, index = self._open(path, **options)
        for name, network in parts.items():
            self._check_network(path, network)
            self._check_inputs(path, name, network.config, folder, index)
        return parts[self.network]

    def network_config(self, path: str | Path, name: str | None = None, **options: Any) -> dict[str, Any]:
        """Reads the configuration of the network, or of the one of several that ``name`` says.

        Other arguments and errors are those of :meth:`load_network`.
        """
        folder, index = self._open(path, **options)
        name = name or self.network
        entry = index.get(name)
        if not isinstance(entry, list) or entry[1:] != [self.network_class]:
            raise ValueError(f"{path}: its {name} is {entry!r}, expected a {self.network_class}")
        return read_object(folder / name / CONFIG)

    def load_encoders(
        self,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        vae_dtype: torch.dtype = torch.float32,
        text: bool = True,
        **options: Any,
    ) -> Any:
        """Loads the pipeline without its network: tokenizers, text encoders, VAE and scheduler, frozen, in eval mode.

        The VAE is in ``vae_dtype``, everything else in ``dtype``: in half precision latents are 1 to 2 % off. Without
        ``text`` there are no text encoders, and the pipeline samples only from encoded prompts. Errors as for
        :meth:`load_network`, and a ValueError for an image VAE that may overflow in float16.
        """
        import diffusers

        folder, variant = self.fetch(path, network=False, **options), options.get("variant")
        _, index = self._open(path, **options)
        modules: dict[str, Any] = dict.fromkeys((*self.networks, *self._without))
        if not text:
            modules |= dict.fromkeys(name for name in index if name.startswith(TEXT_ENCODER))
        vae_config = read_object(folder / VAE / CONFIG)
        check_latent_affine(folder / VAE / CONFIG, vae_config)
        if vae_dtype == torch.float16 and not self.video and vae_config.get(_UPCAST, True):
            said = f" ({_UPCAST})" if _UPCAST in vae_config else ""
            expected = "expected 'float32' or 'bfloat16'"
            raise ValueError(f"{path}: its VAE may overflow in vae_dtype='float16'{said}, {expected}")
        with _naming_path(path):
            for name, (library, class_name) in _present(index):
                if name not in modules and is_module(library, class_name):
                    kept = vae_dtype if name == VAE else dtype
                    modules[name] = load_module(folder / name, library, class_name, kept, variant)
            # This loads the rest: tokenizers and the scheduler.
            pipeline_class = getattr(diffusers, self.pipeline_class)
            pipeline = pipeline_class.from_pretrained(str(folder), **modules, **self._pipeline_options)
        for name, component in pipeline.components.items():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
            elif name.startswith(TOKENIZER) and component is not None:
                encoder = read_object(folder / name.replace(TOKENIZER, TEXT_ENCODER) / CONFIG)
                check_vocabulary(folder / name, component, encoder.get("vocab_size"))
        return pipeline

    def fetch(self, path: str | Path, *, network: bool, **options: Any) -> Path:
        """Downloads files that the local cache lacks, and refuses weights that are not safetensors.

        Args:
            path, options: as for :meth:`load_network`.
            network: fetch the network; else all other components.

        Returns:
            The local folder. Errors as for :meth:`load_network`.
        """
        folder, index = self._open(path, **options)
        left_out = (*self.networks, *self._without)
        components = list(self.networks) if network else [name for name, _ in _present(index) if name not in left_out]
        variant = options.get("variant")
        for name in self.networks:
            if name not in index:
                raise ValueError(f"{path}: has no {name}, expected a whole {self.pipeline_class}")
        fetch_weights(path, components, **options)
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
        """Makes the noise schedule of the model's scheduler.

        Args:
            path, options: as for :meth:`load_network`.
            num_inference_steps: steps of the sampler.
            prediction_type, shift: override the scheduler's own, see
                :func:`sipo.schedule.diffusers_schedulers.with_settings`.
            sampled: whether samples are drawn with that ``prediction_type``; some schedulers support only some.
            sizes: heights and widths in pixels to train at; dynamic shifting depends on them.

        Returns:
            The schedule; a :class:`sipo.schedule.SizeDependentSchedule` if the sizes differ in their shift.

        Raises:
            FileNotFoundError, ValueError: as for :meth:`load_network`; the scheduler is not supported.
            SettingError: the scheduler does not have a setting, or not so many steps.
        """
        own = self.load_scheduler(path, **options)
        class_name = type(own).__name__
        given = {"num_inference_steps": num_inference_steps, "prediction_type": prediction_type, "shift": shift}
        try:
            scheduler = with_settings(own, prediction_type, shift)
            if sampled and scheduler is not own:
                check_sampler(scheduler)
            schedules = [
                NoiseSchedule.from_scheduler(scheduler, num_inference_steps, mu=mu)
                for mu in [self.timestep_mu(scheduler.config, *size, num_inference_steps) for size in sizes] or [None]
            ]
        except ValueError as error:
            if isinstance(error, SettingError) and given.get(error.name) is not None:
                raise
            raise ValueError(f"{path}: {error}") from error
        schedule = schedules[0]
        if schedule.invert_sigmas:  # no network of these families is told the share of data
            raise ValueError(f"{path}: its {class_name} has invert_sigmas=True, expected a model without it")
        if schedule.kind != self.schedule_kind:
            expected = f"expected a {self.schedule_kind} one"
            raise ValueError(f"{path}: its {class_name} is a {schedule.kind} schedule, {expected}")
        if schedule.kind == "flow" and schedule.num_train_timesteps != 1000:
            raise ValueError(f"{path}: its {class_name} has {schedule.num_train_timesteps} timesteps, expected 1000")
        if all(other.shift == schedule.shift for other in schedules):
            return schedule
        latents = [(height // self.latent_pixels, width // self.latent_pixels) for height, width in sizes]
        return SizeDependentSchedule(dict(zip(latents, schedules, strict=True)))

    def load_scheduler(self, path: str | Path, **options: Any) -> Any:
        """Loads the model's scheduler. Arguments and errors as for :meth:`load_network`."""
        import diffusers

        folder, index = self._open(path, **options)
        entry = index.get("scheduler")
        library, class_name = entry if isinstance(entry, list) and len(entry) == 2 else (None, entry)
        scheduler_class: Any = getattr(diffusers, str(class_name), None) if library == "diffusers" else None
        if scheduler_class is None:
            raise ValueError(f"{path}: its scheduler is {class_name!r}, expected one of diffusers'")
        config = read_object(folder / "scheduler" / "scheduler_config.json")
        with _naming_path(path):
            time_shift_type(config)
            return scheduler_class.from_pretrained(str(folder), subfolder="scheduler")

    def timestep_mu(self, config: Any, height: int, width: int, num_inference_steps: int) -> float | None:
        """Returns μ, which the family's pipeline passes to ``set_timesteps``; only dynamic shifting uses it.

        Args:
            config: the scheduler's.
            height, width: of an image in pixels.
            num_inference_steps: steps of the sampler; FLUX.2's pipelines need it.

        Returns:
            μ, or ``None`` if the pipeline passes none.

        Raises:
            ValueError: a configuration that gives no μ.
        """
        if self.shift_pixels is None or not config.get("use_dynamic_shifting"):
            return None
        return linear_mu(config, (height // self.shift_pixels) * (width // self.shift_pixels))

    def _open(
        self, path: str | Path, revision: str | None = None, variant: str | None = None
    ) -> tuple[Path, dict[str, Any]]:
        """Finds the model's folder, and reads its ``model_index.json``; ``variant`` makes no difference to either."""
        folder = find_model_folder(path, self.pipeline_class, revision=revision)
        index = read_object(folder / MODEL_INDEX)
        self._check_index(path, index)
        return folder, index

    def _check_index(self, path: str | Path, index: Mapping[str, Any]) -> None:
        class_name = index.get("_class_name")
        if class_name != self.pipeline_class:
            other = _FAMILY_OF.get(str(class_name))
            hint = "" if other is None else f"; family {other!r} takes it"
            expected = f"expected a {self.pipeline_class} for family {self.name!r}"
            raise ValueError(f"{path}: holds a {class_name}, {expected}{hint}")

    def _check_network(self, path: str | Path, network: Any) -> None:
        inputs, outputs = self._channels(network.config)
        if inputs != outputs:  # an inpainting or image-to-video network
            channels = f"takes {inputs} channels and gives {outputs}"
            raise ValueError(f"{path}: its {self.network} {channels}, expected as many as it takes")

    def _channels(self, config: Any) -> tuple[int, int]:
        """Returns how many channels a network takes and gives, by its configuration."""
        return config.in_channels, getattr(config, "out_channels", None) or config.in_channels

    def _check_inputs(self, path: str | Path, name: str, config: Any, folder: Path, index: Mapping[str, Any]) -> None:
        """Refuses a network that does not take what the pipeline's VAE and text encoders give.

        What a component's configuration does not say is not checked, nor is a component that the folder does not have.
        """
        inputs, channels = self._channels(config)[0], latent_channels(_component_config(folder / VAE))
        stacked = (self.vae_patch * (self.token_side or 1)) ** 2
        if isinstance(channels, int) and inputs != channels * stacked:
            expected = f"expected {channels * stacked}, by the {channels} channels of its VAE"
            raise ValueError(f"{path}: its {name} takes {inputs} channels, {expected}")
        encoders = sorted(key for key, _ in _present(index) if key.startswith(TEXT_ENCODER))
        widths = [_encoder_width(_component_config(folder / encoder)) for encoder in encoders]
        given = config.get(self.text_width_key)
        known = bool(widths) and all(isinstance(width, int) for width in (given, *widths))
        if known and given != self._text_width(widths):
            expected = f"expected {self._text_width(widths)}, by the width of its {' and '.join(encoders)}"
            raise ValueError(f"{path}: its {name} has {self.text_width_key}={given}, {expected}")

    def _text_width(self, widths: Sequence[Any]) -> Any:
        """Returns the width of text embeddings, from the widths of the text encoders."""
        return widths[-1]  # T5's, where there are several


def _present(index: Mapping[str, Any]) -> list[tuple[str, list[Any]]]:
    """Lists the components that a pipeline has, each with its library and class."""
    return [(name, value) for name, value in index.items() if isinstance(value, list) and any(value)]


def _component_config(folder: Path) -> dict[str, Any]:
    return read_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}


def _encoder_width(config: Mapping[str, Any]) -> Any:
    """Returns the width of a text encoder's embeddings; one that sees images has a part for text."""
    text = config.get("text_config")
    parts = (text if isinstance(text, dict) else {}, config)
    return next((part[key] for part in parts for key in ("hidden_size", "d_model") if key in part), None)


@contextmanager
def _naming_path(path: str | Path) -> Iterator[None]:
    """Turns errors of diffusers and transformers into one line that begins with the path."""
    try:
        yield
    except OSError as error:
        raise FileNotFoundError(f"{path}: {one_line(error)}") from error
    except FileError:
        raise
    except Exception as error:  # values in a file, or a missing package, may raise anything in these libraries
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{path}: {one_line(error)}") from error
