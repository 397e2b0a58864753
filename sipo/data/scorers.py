"""Scorers of images and clips: CLIP models, aesthetic heads on them, and any Python function.

A scorer is a function ``scores(images, prompts)``: as many numbers as images, higher is better. An image is uint8
``[3, H, W]``, a clip a few evenly spaced frames of it, ``[F, 3, H, W]``.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

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
    """A scorer that cannot be loaded, or that returns something else than a number for each image."""


class _Clip:
    """A CLIP model of transformers with its processor; embeddings have length 1."""

    def __init__(self, path: str, processor: str | None, device: str, dtype: torch.dtype) -> None:
        # Pillow's way of resizing, as the models were trained with, whether torchvision is installed or not.
        from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

        try:
            torch.empty(0, dtype=torch.float32, device=device)
        except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled for it
            raise ScorerError(f"device={device!r}: {str(error).splitlines()[0]}, expected another") from error
        try:
            # From safetensors alone, and no code of the folder: nothing is unpickled.
            folder = _checked(path)
            beside = folder
            if processor is not None:
                beside = Path(processor)
                if not beside.is_dir():
                    beside = find_model_folder(processor, {}, "CLIPProcessor", "preprocessor_config.json")
            check_tokenizer(beside, "CLIPTokenizer")
            model: Any = CLIPModel.from_pretrained(folder, dtype=dtype, use_safetensors=True)
            self.tokenizer = AutoTokenizer.from_pretrained(beside, trust_remote_code=False)
            check_vocabulary(beside, self.tokenizer, model.config.text_config.vocab_size)
            self.images = CLIPImageProcessorPil.from_pretrained(beside)
        except (OSError, ValueError, RuntimeError) as error:
            raise ScorerError(f"{path}: no CLIP model with its processor: {' '.join(str(error).split())}") from error
        self.model = model.to(device).eval()
        self.device = device
        self.dtype = dtype
        self.scale = float(self.model.logit_scale.detach().exp())

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Tensor]) -> list[Tensor]:
        """For each image or clip ``[frames, D]`` float32, one frame for an image."""
        clips = [image if image.ndim == 4 else image[None] for image in images]
        frames = [frame.permute(1, 2, 0).numpy() for clip in clips for frame in clip]
        pixels = self.images(images=frames, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        features = self.model.get_image_features(pixel_values=pixels.to(self.device, self.dtype)).pooler_output
        return list(_unit(features).split([len(clip) for clip in clips]))

    @torch.inference_mode()
    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """``[N, D]`` float32."""
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


def _checked(path: str) -> Path:
    """The folder of a CLIP model, on disk or from the hub, with weights in safetensors alone."""
    folder = find_model_folder(path, {}, "CLIPModel", CONFIG)
    fetch_weights(path, {}, [""], None)
    check_weights(folder, "CLIPModel", None)
    return folder


class ClipScorer:
    """A CLIP model that was trained to score (PickScore, HPSv2, or CLIP itself): ``exp(logit_scale) * cos``.

    A clip's score is the mean of its frames'.

    Args:
        path: a folder or hub id with a ``CLIPModel`` of transformers in safetensors.
        processor: another one to take tokenizer and image processor from, where the first has none.
        device: that it runs on.
        dtype: of the model.

    Raises:
        ScorerError: nothing of the kind there.
    """

    def __init__(
        self, path: str, *, processor: str | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self._clip = _Clip(path, processor, device, dtype)

    def __call__(self, images: list[Tensor], prompts: list[str]) -> list[float]:
        texts = self._clip.embed_text(prompts)
        embedded = self._clip.embed_images(images)
        return [float((frames @ text).mean()) * self._clip.scale for frames, text in zip(embedded, texts, strict=True)]


class AestheticScorer:
    """Linear layers on a CLIP model's image embeddings, as LAION's aesthetic predictors are; prompts play no part.

    A clip's score is the mean of its frames'.

    Args:
        clip: as for :class:`ClipScorer`.
        head: safetensors file with the layers' ``weight`` and ``bias``, numbered in their order.
        processor: as for :class:`ClipScorer`.
        activation: between the layers. LAION's have none, but for the one with "relu" in its name.
        device: that both run on.
        dtype: of the CLIP model; the head is float32.

    Raises:
        ScorerError: nothing of the kind there, or layers that do not fit.
    """

    def __init__(
        self,
        clip: str,
        head: str | Path,
        *,
        processor: str | None = None,
        activation: Literal["none", "relu"] = "none",
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if activation not in ("none", "relu"):
            raise ValueError(f"activation={activation!r}: expected 'none' or 'relu'")
        self._clip = _Clip(clip, processor, device, dtype)
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
    """A Python function by ``module:function``; modules of the working directory are found as well.

    Raises:
        ScorerError: no such module or function.
    """
    module_name, separator, function_name = name.partition(":")
    if not separator or not module_name or not function_name:
        raise ScorerError(f"scorer {name!r}: expected module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
        for part in function_name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ScorerError(f"scorer {name!r}: {error}") from error
    if not callable(found):
        raise ScorerError(f"scorer {name!r}: is {type(found).__name__}, expected a function")
    scorer: Scorer = found
    return scorer


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1)
