"""Scorers of images and clips: CLIP models, aesthetic heads on them, and any Python function.

A scorer is a function ``scores(images, prompts)`` that returns one number for each image; higher is better. An image
is uint8 ``[3, H, W]``; of a clip it gets a few evenly spaced frames, ``[F, 3, H, W]``.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from sipo.families.model_files import (
    CONFIG,
    check_tokenizer,
    check_vocabulary,
    check_weights,
    fetch_weights,
    find_model_folder,
)
from sipo.files import FileError, load_tensors

Scorer = Callable[[list[Tensor], list[str]], Sequence[float]]


class ScorerError(ValueError):
    """A scorer that cannot be loaded, or that does not return a number for each image."""


class _Clip:
    """A CLIP model of transformers in float32 with its processor; embeddings have length 1."""

    def __init__(self, path: str, processor: str | None, device: str) -> None:
        # Resizes with Pillow, as in the models' training, even if torchvision is installed.
        from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

        try:
            torch.empty(0, dtype=torch.float32, device=device)
        except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
            raise ScorerError(f"device={device!r}: {str(error).splitlines()[0]}, expected another") from error
        try:
            # Weights come only from safetensors, and no code from the folder is run: nothing is unpickled.
            folder = find_model_folder(path, "CLIPModel", CONFIG)
            fetch_weights(path, [""])
            check_weights(folder, "CLIPModel", None)
            beside = folder
            if processor is not None:
                beside = Path(processor)
                if not beside.is_dir():
                    beside = find_model_folder(processor, "CLIPProcessor", "preprocessor_config.json")
            check_tokenizer(beside, "CLIPTokenizer")
            model: Any = CLIPModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
            self.tokenizer = AutoTokenizer.from_pretrained(beside, trust_remote_code=False)
            check_vocabulary(beside, self.tokenizer, model.config.text_config.vocab_size)
            self.images = CLIPImageProcessorPil.from_pretrained(beside)
        except (OSError, ValueError, RuntimeError) as error:
            raise ScorerError(f"{path}: no CLIP model with its processor: {' '.join(str(error).split())}") from error
        self.model = model.to(device).eval()
        self.device = device
        self.scale = float(self.model.logit_scale.detach().exp())

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Embeds images and clips: ``[frames, D]`` float32 for each, one frame for an image."""
        clips = [image if image.ndim == 4 else image[None] for image in images]
        frames = [frame.permute(1, 2, 0).numpy() for clip in clips for frame in clip]
        pixels = self.images(images=frames, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        features = self.model.get_image_features(pixel_values=pixels.to(self.device)).pooler_output
        return list(_unit(features).split([len(clip) for clip in clips]))

    @torch.inference_mode()
    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """Embeds prompts: ``[N, D]`` float32."""
        tokens = self.tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)
        features = self.model.get_text_features(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return _unit(features)


class ClipScorer:
    """Scores by a CLIP model trained for this (PickScore, HPSv2, or CLIP itself): ``exp(logit_scale) * cos``.

    A clip's score is the mean over its frames.

    Args:
        path: a folder or hub id with a ``CLIPModel`` of transformers in safetensors.
        processor: folder or hub id of tokenizer and image processor, if ``path`` has none.
        device: device of the model.

    Raises:
        ScorerError: no such model, or it cannot be loaded.
    """

    def __init__(self, path: str, *, processor: str | None = None, device: str = "cpu") -> None:
        self._clip = _Clip(path, processor, device)

    def __call__(self, images: list[Tensor], prompts: list[str]) -> list[float]:
        texts = self._clip.embed_text(prompts)
        embedded = self._clip.embed_images(images)
        return [float((frames @ text).mean()) * self._clip.scale for frames, text in zip(embedded, texts, strict=True)]


class AestheticScorer:
    """Scores by linear layers on a CLIP model's image embeddings, as LAION's aesthetic predictors; ignores prompts.

    A clip's score is the mean over its frames.

    Args:
        clip, processor, device: as for :class:`ClipScorer`.
        head: safetensors file with the layers' ``weight`` and ``bias``, numbered in order.
        activation: between the layers. LAION's predictors have none, except the one with "relu" in its name.

    Raises:
        ScorerError: no such model or file, or layers of the wrong shape.
    """

    def __init__(
        self,
        clip: str,
        head: str | Path,
        *,
        processor: str | None = None,
        activation: Literal["none", "relu"] = "none",
        device: str = "cpu",
    ) -> None:
        if activation not in ("none", "relu"):
            raise ValueError(f"activation={activation!r}: expected 'none' or 'relu'")
        self._clip = _Clip(clip, processor, device)
        self._layers = _load_head(Path(head), self._clip.model.config.projection_dim, device)
        self._activation = activation

    @torch.inference_mode()
    def __call__(self, images: list[Tensor], prompts: list[str]) -> list[float]:
        return [float(self._rate(frames).mean()) for frames in self._clip.embed_images(images)]

    def _rate(self, values: Tensor) -> Tensor:
        for number, (weight, bias) in enumerate(self._layers):
            if number and self._activation == "relu":
                values = values.relu()
            values = torch.nn.functional.linear(values, weight, bias)
        return values


def _load_head(path: Path, width: int, device: str) -> list[tuple[Tensor, Tensor | None]]:
    try:
        state = {name: tensor.to(device) for name, tensor in load_tensors(path).items()}
    except OSError as error:
        raise ScorerError(f"{path}: {error.strerror or error}, expected a safetensors file") from error
    except FileError as error:
        raise ScorerError(str(error)) from error
    names = [name for name in state if re.fullmatch(r"(.*\.)?weight", name) and state[name].ndim == 2]
    # "layers.10.weight" comes after "layers.9.weight".
    names.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    layers: list[tuple[Tensor, Tensor | None]] = []
    for name in names:
        weight, bias = state[name].float(), state.get(f"{name.removesuffix('weight')}bias")
        if weight.shape[1] != width:
            raise ScorerError(f"{path}: {name} takes {weight.shape[1]} numbers, expected {width}")
        layers.append((weight, None if bias is None else bias.float()))
        width = weight.shape[0]
    if not layers or width != 1:
        raise ScorerError(f"{path}: has {len(layers)} linear layers with {width} outputs, expected one output")
    return layers


def load_function(name: str) -> Scorer:
    """Imports a Python function named ``module:function``; modules in the working directory are found too.

    Raises:
        ScorerError: no such module or function.
    """
    module_name, separator, function_name = name.partition(":")
    if not separator or not module_name or not function_name:
        raise ScorerError(f"scorer {name!r}: expected module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function: Any = importlib.import_module(module_name)
        for part in function_name.split("."):
            function = getattr(function, part)
    except (ImportError, AttributeError) as error:
        raise ScorerError(f"scorer {name!r}: {error}") from error
    if not callable(function):
        raise ScorerError(f"scorer {name!r}: is {type(function).__name__}, expected a function")
    return cast(Scorer, function)


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1)
