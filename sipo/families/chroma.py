"""Chroma: FLUX.1's architecture without CLIP and without a guidance scale, sampled with a negative prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sipo.families.flux import Flux, token_positions
from sipo.families.network import PROMPT, Condition, inner_network, pick

_MASK = "prompt_attention_mask"  # as the pipeline's argument is called


class Chroma(Flux):
    """Chroma: 512 tokens of T5 with a mask, 1 for the prompt's tokens and one more.

    The mask is kept as the pipeline makes it. Up to diffusers 0.42 it is a float mask, which is added to the scores of
    attention: tokens with 0 count less, but are not left out. So all 512 tokens are stored.
    """

    name = "chroma"
    pipeline_class = "ChromaPipeline"
    network_class = "ChromaTransformer2DModel"
    guidance = 5.0
    negative_prompt = ""
    text_outputs: ClassVar[Mapping[str, int]] = {PROMPT: 0, _MASK: 2}

    def predict(
        self, module: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Any, *, guidance: float | None = None
    ) -> Tensor:
        """See :meth:`Family.predict`: with gradient checkpointing too, every block gets the mask."""
        network = inner_network(module)
        if network.gradient_checkpointing and not isinstance(network._gradient_checkpointing_func, _Checkpointing):
            network._gradient_checkpointing_func = _Checkpointing()
        return super().predict(module, noisy, timesteps, condition, guidance=guidance)

    def network_inputs(
        self, config: Any, noisy: Tensor, time: Tensor, condition: Condition, guidance: float
    ) -> dict[str, Any]:
        """See :meth:`Family.network_inputs`."""
        text, mask = pick(condition, PROMPT, _MASK)
        tokens = self.pack(noisy)
        return {
            "hidden_states": tokens,
            "timestep": time,
            "encoder_hidden_states": text,
            "txt_ids": torch.zeros(text.shape[1], 3, device=noisy.device, dtype=torch.float32),
            "img_ids": token_positions(noisy),
            "attention_mask": torch.cat([mask, mask.new_ones(tokens.shape[:2])], dim=1),
        }


class _Checkpointing:
    """Checkpoints the network's blocks, all with the mask.

    Up to diffusers 0.42.1, ``ChromaTransformer2DModel.forward`` leaves the mask out when it checkpoints its single
    blocks. They get that of the double blocks here, which run before them.
    """

    def __init__(self) -> None:
        self._mask: Tensor | None = None

    def __call__(self, block: nn.Module, *inputs: Any) -> Any:
        if len(inputs) == 5:  # of a double block; the mask is the last one
            self._mask = inputs[4]
        elif len(inputs) == 3:
            inputs = (*inputs, self._mask)
        return checkpoint(block.__call__, *inputs, use_reentrant=False)
