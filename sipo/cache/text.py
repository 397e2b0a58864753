"""How text embeddings are stored: under a hash of their prompt, without the zeros that pad them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def text_key(prompt: str) -> str:
    """Gives the key of a prompt's embeddings: 128 bits of its SHA-256."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def trim(tensor: Tensor) -> Tensor:
    """Removes the rows at the end of a sequence ``[L, ...]`` that are all zeros (+0); :func:`pad` undoes it."""
    if tensor.ndim < 2 or not tensor.is_floating_point():
        return tensor
    filled = ((tensor != 0) | torch.signbit(tensor)).flatten(1).any(1).nonzero()
    return tensor[: int(filled[-1]) + 1 if len(filled) else 0]


def pad(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Appends rows of zeros up to ``shape``."""
    if tensor.ndim < 2 or tensor.shape[0] == shape[0]:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(shape[0] - tensor.shape[0], *tensor.shape[1:])])
