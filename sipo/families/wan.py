"""Wan 2.1 and Wan 2.2 A14B, text to video: rectified flow on clips, with UMT5 as text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from sipo.families.base import Family
from sipo.families.experts import ExpertNetworks
from sipo.families.network import PROMPT, Condition, pick
from sipo.files import short


class Wan(Family):
    """Wan 2.1 (text to video): embeddings of 512 tokens, exactly zero after the end of the prompt."""

    name = "wan"
    pipeline_class = "WanPipeline"
    network_class = "WanTransformer3DModel"
    text_width_key = "text_dim"
    video = True
    latent_layout = "CFHW"
    guidance = 5.0
    frame_stride = 4
    text_options: ClassVar[Mapping[str, Any]] = {"max_sequence_length": 512}

    def _check_index(self, path: str | Path, index: Mapping[str, Any]) -> None:
        super()._check_index(path, index)
        if index.get("expand_timesteps"):
            raise ValueError(f"{path}: expand_timesteps=True, a Wan 2.2 5B: expected a model without it")
        boundary = index.get("boundary_ratio")
        if self.experts and boundary is None:
            raise ValueError(
                f"{path}: boundary_ratio=None, expected a Wan 2.2 with two networks; family 'wan' takes it"
            )
        if self.experts and not (isinstance(boundary, float) and 0 < boundary < 1):
            raise ValueError(f"{path}: boundary_ratio={short(boundary)}, expected a number in (0, 1)")
        if boundary is not None and not self.experts:
            raise ValueError(f"{path}: boundary_ratio={short(boundary)}, expected none; family 'wan2.2' takes it")

    def check_network_size(self, config: Any, height: int, width: int, frames: int) -> None:
        """See :meth:`Family.check_network_size`: the table of rotary embeddings is limited."""
        super().check_network_size(config, height, width, frames)
        parts = [(frames - 1) // self.frame_stride + 1, height // self.latent_pixels, width // self.latent_pixels]
        patches = [count // part for count, part in zip(parts, config.patch_size, strict=True)]
        if max(patches) > config.rope_max_seq_len:
            expected = f"at most {config.rope_max_seq_len} patches each way, by the network's rope_max_seq_len"
            raise ValueError(f"height={height}, width={width}, frames={frames}: expected {expected}")

    def network_inputs(
        self, config: Any, noisy: Tensor, time: Tensor, condition: Condition, guidance: float
    ) -> dict[str, Any]:
        """See :meth:`Family.network_inputs`."""
        (text,) = pick(condition, PROMPT)
        return {"hidden_states": noisy, "timestep": time, "encoder_hidden_states": text}


class Wan22(Wan):
    """Wan 2.2 A14B (text to video): one network for high noise levels, and one for low ones."""

    name = "wan2.2"
    experts = ("transformer", "transformer_2")

    def _whole_network(self, path: str | Path, parts: dict[str, nn.Module], **options: Any) -> nn.Module:
        super()._whole_network(path, parts, **options)
        _, index = self._open(path, **options)
        return ExpertNetworks(parts, index["boundary_ratio"])
