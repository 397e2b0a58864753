"""What is measured: latents of real training, in the types and with the upstream gradient of training; and the inputs.

A :class:`Case` is one shape, number of pairs, types of predictions and target, upstream gradient and mode.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any, NamedTuple

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
RATIO_SCALE = 0.02  # ratios inside the clip's range: no pair is masked, so that every gradient is computed and written
# Training: a network in bfloat16, a target in float32 (noise, or what follows from it), 8 passes to a step.
TRAINED, TARGET, UPSTREAM = "bfloat16", "float32", 1 / 8
# Batches of the headline table, each with a target of either type and an upstream gradient of 1/8 and of 1; one with
# more pairs; and those of the float32 cases.
TABLE = (("Wan 480p", 1), ("CogVideoX", 4), ("SDXL", 4), ("SD1.5", 1))
MORE_PAIRS = (("Wan 480p", 4),)
FLOAT32_VIDEO = (("CogVideoX", 4), ("Wan 480p", 1), ("Wan 480p", 4))


@dataclass(frozen=True)
class Case:
    """One thing to timing.

    Attributes:
        label: whose latents these are.
        sample: one sample's shape.
        pairs: ``B``; predictions are ``[2B, *sample]``.
        dtype: a name in ``DTYPES``, of the predictions and so of the gradient.
        target: the same of the target.
        mode: ``"forward"`` (under ``torch.no_grad``) or ``"forward+backward"``.
        upstream: what ``backward`` is given.
        shared_target: the target is ``[B, *sample]``.
        ref_error: the reference's errors are numbers, computed beforehand, and there is no reference tensor.
    """

    label: str
    sample: tuple[int, ...]
    pairs: int
    dtype: str
    target: str
    mode: str = BOTH
    upstream: float = 1.0
    shared_target: bool = False
    ref_error: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return (2 * self.pairs, *self.sample)

    @property
    def elements(self) -> int:
        """``N``: elements of the policy's stacked predictions."""
        return prod(self.shape)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of one stacked tensor of predictions, and of the gradient."""
        return self.elements * DTYPES[self.dtype].itemsize

    @property
    def target_bytes(self) -> int:
        """Bytes of the target."""
        return self.elements * DTYPES[self.target].itemsize // (2 if self.shared_target else 1)

    @property
    def input_bytes(self) -> int:
        """Bytes of all large inputs."""
        return self.tensor_bytes * (1 if self.ref_error else 2) + self.target_bytes

    @property
    def floor_bytes(self) -> int:
        """Fewest bytes to move: inputs read once, and the gradient written once."""
        return self.input_bytes + (self.tensor_bytes if self.mode == BOTH else 0)

    @property
    def types(self) -> str:
        """``"bfloat16"``, ``"bfloat16, float32 target"``, ``"bfloat16, shared float32 target, ref_error"``."""
        parts = [self.dtype]
        if self.shared_target or self.target != self.dtype:
            parts.append(f"{'shared ' if self.shared_target else ''}{self.target} target")
        return ", ".join(parts + ["ref_error"] * self.ref_error)

    @property
    def name(self) -> str:
        """What ``--only`` matches: ``"SD1.5, 1 pair, bfloat16, float32 target, upstream 1/8, forward+backward"``."""
        upstream = f"upstream {fraction(self.upstream)}, " if self.mode == BOTH else ""
        return f"{self.label}, {count(self.pairs)}, {self.types}, {upstream}{self.mode}"

    def fields(self) -> dict[str, Any]:
        """Returns the case's part of a results entry; :meth:`of` reads it."""
        return {
            "label": self.label,
            "shape": list(self.shape),
            "pairs": self.pairs,
            "dtype": self.dtype,
            "target": self.target,
            "shared_target": self.shared_target,
            "ref_error": self.ref_error,
            "upstream": self.upstream,
            "mode": self.mode,
        }

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Case:
        """Returns the case of a results entry."""
        names = ("label", "pairs", "dtype", "target", "shared_target", "ref_error", "upstream", "mode")
        return cls(sample=tuple(entry["shape"][1:]), **{name: entry[name] for name in names})


class LossInputs(NamedTuple):
    """What every implementation of a case gets.

    Attributes:
        model_pred, ref_pred, target, ratio_scale, ref_error: as :func:`sipo_kernels.pair_loss` takes them.
        upstream: 0-d, for ``loss.backward``.
    """

    model_pred: Tensor
    ref_pred: Tensor | None
    target: Tensor
    ratio_scale: Tensor
    ref_error: Tensor | None
    upstream: Tensor


def count(pairs: int) -> str:
    """Formats the number of pairs: ``"1 pair"``, ``"4 pairs"``."""
    return f"{pairs} pair{'s' if pairs != 1 else ''}"


def fraction(number: float) -> str:
    """Formats a number as a fraction: ``"1/8"``, ``"1"``."""
    return str(Fraction(number).limit_denominator(1000))


def table_cases() -> Iterator[Case]:
    """Yields the 16 cells of the headline table."""
    for label, pairs in TABLE:
        for target in (TARGET, TRAINED):
            for upstream in (UPSTREAM, 1.0):
                yield Case(label, SHAPES[label], pairs, TRAINED, target, upstream=upstream)


def training_cases() -> Iterator[Case]:
    """What else training has: targets that a pair shares, references' errors as numbers, more pairs of a video."""
    for shared, ref_error in ((True, False), (False, True), (True, True)):
        for label, pairs in TABLE:
            yield Case(
                label, SHAPES[label], pairs, TRAINED, TARGET,
                upstream=UPSTREAM, shared_target=shared, ref_error=ref_error,
            )  # fmt: skip
    for label, pairs in MORE_PAIRS:
        yield Case(label, SHAPES[label], pairs, TRAINED, TARGET, upstream=UPSTREAM)


def float32_video_cases() -> Iterator[Case]:
    """Yields videos whose network is in float32."""
    for label, pairs in FLOAT32_VIDEO:
        yield Case(label, SHAPES[label], pairs, "float32", "float32", upstream=UPSTREAM)


def headline_cases() -> dict[str, list[Case]]:
    """Returns what is quoted, by group."""
    return {
        "table": list(table_cases()),
        "other training cases": list(training_cases()),
        "float32 video": list(float32_video_cases()),
    }


def is_headline(case: Case) -> bool:
    """Whether a case is one of those."""
    return any(case in group for group in headline_cases().values())


def kernel_cases() -> Iterator[Case]:
    """Yields all cases of the kernel benchmark, most telling first: a run that is cut off keeps the breadth.

    After the headline cases all tensors are of one type and the upstream gradient is 1: bfloat16 before float32 before
    float16; 4 pairs before 1 before 16; small latents before large.
    """
    for group in headline_cases().values():
        yield from group
    for dtype in DTYPES:
        for pairs in PAIRS:
            for label, sample in SHAPES.items():
                for mode in MODES:
                    case = Case(label, sample, pairs, dtype, dtype, mode)
                    if not is_headline(case):
                        yield case


def sweep_cases(low: int, high: int, dtypes: tuple[str, ...], pairs: int = 4) -> Iterator[Case]:
    """Yields 4 pairs of 2^low … 2^high elements, with the target and the upstream gradient of training."""
    for dtype in dtypes:
        for power in range(low, high + 1):
            yield Case(f"2^{power}", (2**power // (2 * pairs),), pairs, dtype, TARGET, upstream=UPSTREAM)


def select(cases: Iterator[Case], only: str | None) -> list[Case]:
    """Cases whose name the regular expression ``only`` is found in (all for ``None``)."""
    return [case for case in cases if only is None or re.search(only, case.name)]


def make_inputs(case: Case, device: str) -> LossInputs:
    """A case's tensors, random, the same every time: a batch early in training, the reference near the policy."""
    g = torch.Generator(device).manual_seed(0)
    dtype, target_dtype = DTYPES[case.dtype], DTYPES[case.target]

    def noise() -> Tensor:
        return torch.randn(case.shape, generator=g, device=device)

    model = noise()
    ref = noise().mul_(0.01).add_(model).to(dtype)
    target = noise().add_(model)
    target = (target[: case.pairs] if case.shared_target else target).to(target_dtype)
    ref_error = None
    if case.ref_error:
        difference = ref.unflatten(0, (-1, case.pairs)).float() - target.unflatten(0, (-1, case.pairs)).float()
        ref_error = difference.square().flatten(2).mean(2, dtype=torch.float64).flatten().float()
    return LossInputs(
        model.to(dtype).requires_grad_(case.mode == BOTH),
        None if case.ref_error else ref,
        target,
        torch.full((case.shape[0],), RATIO_SCALE, device=device),
        ref_error,
        torch.tensor(case.upstream, device=device),
    )
