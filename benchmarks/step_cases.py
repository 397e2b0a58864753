"""The cases of ``benchmarks.step``: a network and the batch that it trains on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.cases import SHAPES, TARGET, UPSTREAM, Case

MODE = "training step"


@dataclass(frozen=True, kw_only=True)
class StepCase(Case):
    """One network and batch; the loss's part of it is the :class:`~benchmarks.cases.Case`.

    Attributes:
        label: whose latents, and how much of the network.
        sample: one sample's latent ``[C, F, H, W]``.
        dtype: also of weights, activations and latents.
        heads, head_dim, feed_forward, layers: the transformer's size.
        text_tokens: length of the prompt.
    """

    upstream: float = UPSTREAM
    heads: int
    head_dim: int
    feed_forward: int
    layers: int
    text_tokens: int

    def fields(self) -> dict[str, Any]:
        """Returns the case's part of a results entry."""
        return {**super().fields(), "mode": MODE, "state": "in turn"}


def _case(label: str, sample: tuple[int, ...], pairs: int, dtype: str, *size: int) -> StepCase:
    heads, head_dim, feed_forward, layers, text_tokens = size
    return StepCase(
        label, sample, pairs, dtype, TARGET,
        heads=heads, head_dim=head_dim, feed_forward=feed_forward, layers=layers, text_tokens=text_tokens,
    )  # fmt: skip


_WAN = SHAPES["Wan 480p"]
CASES = {
    # 1.3B's width; its depth is 30.
    "cuda": [
        _case("Wan 480p, 1.3B with 2 of 30 layers", _WAN, pairs, "bfloat16", 12, 128, 8960, 2, 512) for pairs in (1, 2)
    ],
    "cpu": [_case("Wan, small", (16, 5, 16, 26), 1, "float32", 4, 32, 512, 2, 64)],
}
TINY = _case("Wan, tiny", (16, 1, 4, 8), 1, "float32", 2, 12, 32, 1, 4)
