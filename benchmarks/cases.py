"""What is measured: latents of real training, one shape, number of pairs, dtype and mode at a time; and the inputs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

# One sample's shape: latents as the network sees them.
SHAPES: dict[str, tuple[int, ...]] = {
    "SD1.5": (4, 64, 64),
    "SDXL": (4, 128, 128),
    "FLUX": (4096, 64),
    "CogVideoX": (13, 16, 60, 90),
    "Wan 480p": (16, 21, 60, 104),
    "Wan 720p": (16, 21, 90, 160),
    "HunyuanVideo": (16, 33, 90, 160),
}
PAIRS = (4, 1, 16)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
FORWARD, BOTH = "forward", "forward+backward"
MODES = (BOTH, FORWARD)
BETA = 1000.0


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        label: whose latents these are.
        sample: one sample's shape.
        pairs: ``B``; tensors are ``[2B, *sample]``.
        dtype: a name in ``DTYPES``, of all three large inputs.
        mode: ``"forward"`` (under ``torch.no_grad``) or ``"forward+backward"``.
    """

    label: str
    sample: tuple[int, ...]
    pairs: int
    dtype: str
    mode: str

    @property
    def shape(self) -> tuple[int, ...]:
        return (2 * self.pairs, *self.sample)

    @property
    def elements(self) -> int:
        """``N``: elements of one stacked tensor."""
        return prod(self.shape)

    @property
    def tensor_bytes(self) -> int:
        """``N·b``: bytes of one stacked tensor."""
        return self.elements * DTYPES[self.dtype].itemsize

    @property
    def floor_bytes(self) -> int:
        """Fewest bytes to move: three inputs read once (``3N·b``), and the gradient written once (``4N·b``)."""
        return (4 if self.mode == BOTH else 3) * self.tensor_bytes

    @property
    def name(self) -> str:
        """What ``--only`` is matched with: ``"SD1.5, 1 pair, bfloat16, forward"``."""
        return f"{self.label}, {count(self.pairs)}, {self.dtype}, {self.mode}"

    def fields(self) -> dict[str, object]:
        """The case's part of a results entry."""
        return {
            "label": self.label,
            "shape": list(self.shape),
            "pairs": self.pairs,
            "dtype": self.dtype,
            "mode": self.mode,
        }


def count(pairs: int) -> str:
    """``"1 pair"``, ``"4 pairs"``."""
    return f"{pairs} pair{'s' if pairs != 1 else ''}"


def kernel_cases() -> Iterator[Case]:
    """All cases of the kernel benchmark, most telling first: a run that is cut off keeps the breadth.

    bfloat16 before float32 before float16; 4 pairs before 1 before 16; small latents before large.
    """
    for dtype in DTYPES:
        for pairs in PAIRS:
            for label, sample in SHAPES.items():
                for mode in MODES:
                    yield Case(label, sample, pairs, dtype, mode)


def sweep_cases(low: int, high: int, dtypes: tuple[str, ...], pairs: int = 4) -> Iterator[Case]:
    """One stacked tensor of 2^low … 2^high elements, 4 pairs, forward + backward."""
    for dtype in dtypes:
        for power in range(low, high + 1):
            yield Case(f"2^{power}", (2**power // (2 * pairs),), pairs, dtype, BOTH)


def select(cases: Iterator[Case], only: str | None) -> list[Case]:
    """Cases whose name the regular expression ``only`` is found in (all for ``None``)."""
    return [case for case in cases if only is None or re.search(only, case.name)]


def make_inputs(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``model_pred``, ``ref_pred``, ``target`` and ``ratio_scale``, random, the same every time.

    A batch early in training: the reference near the policy, ratios inside the clip's range, no pair masked, so that
    every gradient is computed and written.
    """
    g = torch.Generator(device).manual_seed(0)
    dtype = DTYPES[case.dtype]

    def noise() -> Tensor:
        return torch.randn(case.shape, generator=g, device=device)

    model = noise()
    ref = noise().mul_(0.01).add_(model).to(dtype)
    target = noise().add_(model).to(dtype)
    model = model.to(dtype).requires_grad_(case.mode == BOTH)
    return model, ref, target, torch.full((case.shape[0],), 0.02, device=device)
