"""The network of ``benchmarks.step``: diffusers' Wan transformer, or plain torch where diffusers is not installed."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.step_cases import StepCase

PLAIN = "plain torch transformer (diffusers is not installed)"
WAN = "diffusers WanTransformer3DModel"


@lru_cache(maxsize=1)
def _say_once(line: str) -> None:
    print(line, flush=True)


def make_network(case: StepCase, device: str, dtype: torch.dtype) -> tuple[nn.Module, str]:
    """Makes a transformer of the case's size from ``(latents, timesteps, text)`` to its output; also names it."""
    width = case.heads * case.head_dim
    try:
        from diffusers import WanTransformer3DModel
    except ImportError as error:
        _say_once(f"diffusers cannot be imported ({error}): a plain torch transformer of similar shape takes its place")
        return _Plain(case.sample[0], width, case.heads, case.feed_forward, case.layers).to(device, dtype), PLAIN
    network = WanTransformer3DModel(
        num_attention_heads=case.heads, attention_head_dim=case.head_dim, in_channels=case.sample[0],
        out_channels=case.sample[0], text_dim=width, ffn_dim=case.feed_forward, num_layers=case.layers,
    )  # fmt: skip
    return _Wan(network).to(device, dtype), WAN


class _Wan(nn.Module):
    """Diffusers' network, called by position."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        (output,) = self.network(latents, timesteps, text, return_dict=False)
        return output


class _Plain(nn.Module):
    """Patches of 1×2×2, a time embedding, attention over latents and text, and back."""

    def __init__(self, channels: int, width: int, heads: int, feed_forward: int, layers: int) -> None:
        super().__init__()
        self.patches = nn.Conv3d(channels, width, (1, 2, 2), (1, 2, 2))
        self.time = nn.Linear(1, width)
        block = nn.TransformerEncoderLayer(width, heads, feed_forward, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.back = nn.ConvTranspose3d(width, channels, (1, 2, 2), (1, 2, 2))

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        patches = self.patches(latents)
        tokens = patches.flatten(2).transpose(1, 2)
        tokens = tokens + self.time(timesteps[:, None].to(tokens.dtype) / 1000)[:, None]
        tokens = self.blocks(torch.cat([tokens, text], 1))[:, : tokens.shape[1]]
        return self.back(tokens.transpose(1, 2).reshape(patches.shape))
