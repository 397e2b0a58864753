"""CogVideoX 2B and 5B: v-prediction on clips, frames before channels; the 5B network has rotary embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from sipo.families.base import Family
from sipo.families.network import PROMPT, Condition, pick


class CogVideoX(Family):
    """CogVideoX 2B and 5B (text to video), distinguished by the network's configuration."""

    name = "cogvideox"
    pipeline_class = "CogVideoXPipeline"
    network_class = "CogVideoXTransformer3DModel"
    text_width_key = "text_embed_dim"
    schedule_kind = "discrete"
    video = True
    latent_layout = "FCHW"
    guidance = 6.0
    frame_stride = 4
    text_options: ClassVar[Mapping[str, Any]] = {"max_sequence_length": 226}

    def _check_network(self, path: str | Path, network: Any) -> None:
        super()._check_network(path, network)
        if network.config.patch_size_t is not None:  # its latents are padded in time
            raise ValueError(f"{path}: patch_size_t={network.config.patch_size_t}, a CogVideoX 1.5: expected 2B or 5B")

    def check_network_size(self, config: Any, height: int, width: int, frames: int) -> None:
        """See :meth:`Family.check_network_size`: learned positions have one size."""
        super().check_network_size(config, height, width, frames)
        learned = [self.latent_pixels * side for side in (config.sample_height, config.sample_width)]
        if config.use_learned_positional_embeddings and [height, width] != learned:
            expected = f"height={learned[0]}, width={learned[1]}, whose positions the network has learned"
            raise ValueError(f"height={height}, width={width}: expected {expected}")

    def network_inputs(
        self, config: Any, noisy: Tensor, time: Tensor, condition: Condition, guidance: float
    ) -> dict[str, Any]:
        """See :meth:`Family.network_inputs`."""
        (text,) = pick(condition, PROMPT)
        rotary = None
        if config.use_rotary_positional_embeddings:
            _, frames, _, height, width = noisy.shape
            patch = config.patch_size
            rotary = _rotary(
                config.attention_head_dim,
                (config.sample_height // patch, config.sample_width // patch),
                (height // patch, width // patch),
                frames,
                noisy.device,
            )
        return {"hidden_states": noisy, "encoder_hidden_states": text, "timestep": time, "image_rotary_emb": rotary}


@lru_cache(maxsize=16)
def _rotary(
    head_dim: int, base: tuple[int, int], grid: tuple[int, int], frames: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines ``[frames · rows · columns, head_dim]`` of a grid within the network's own."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    cosines, sines = get_3d_rotary_pos_embed(
        embed_dim=head_dim,
        crops_coords=get_resize_crop_region_for_grid(grid, base[1], base[0]),
        grid_size=grid,
        temporal_size=frames,
        device=device,
    )
    return cosines, sines
