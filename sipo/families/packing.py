"""Latents as the tokens that transformers take: squares of neighbouring latents become one token each."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def stack_patches(latents: Tensor, side: int) -> Tensor:
    """Stacks the latents of each square along the channels.

    Args:
        latents: ``[N, C, H, W]``; ``H`` and ``W`` are multiples of ``side``.
        side: of a square, in latents.

    Returns:
        ``[N, C · side², H / side, W / side]``: channels in the order channel, row, column.
    """
    n, channels, height, width = latents.shape
    squares = latents.reshape(n, channels, height // side, side, width // side, side)
    return squares.permute(0, 1, 3, 5, 2, 4).reshape(n, channels * side**2, height // side, width // side)


def unstack_patches(latents: Tensor, side: int) -> Tensor:
    """Undoes :func:`stack_patches`."""
    n, channels, height, width = latents.shape
    squares = latents.reshape(n, channels // side**2, side, side, height, width)
    return squares.permute(0, 1, 4, 2, 5, 3).reshape(n, channels // side**2, height * side, width * side)


def pack(latents: Tensor, side: int) -> Tensor:
    """Makes a token of each square of latents, row by row.

    Args:
        latents: ``[N, C, H, W]``.
        side: of a square, in latents.

    Returns:
        ``[N, H / side · W / side, C · side²]``, contiguous as the pipelines' own: in half precision, a product rounds
        otherwise in another layout.
    """
    return stack_patches(latents, side).flatten(2).transpose(1, 2).contiguous()


def unpack(tokens: Tensor, shape: Sequence[int], side: int) -> Tensor:
    """Undoes :func:`pack`; tokens beyond those of the latents are left out.

    Args:
        tokens: ``[N, L, C · side²]``.
        shape: ``[N, C, H, W]`` of the latents.
        side: of a square, in latents.
    """
    height, width = shape[-2] // side, shape[-1] // side
    return unstack_patches(tokens[:, : height * width].transpose(1, 2).unflatten(2, (height, width)), side)
