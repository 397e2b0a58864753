"""Seeds of every stream of random numbers in the package, and the state of a process's global generators."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import torch
from torch import Tensor


class RandomStream(IntEnum):
    """The streams of random numbers; no two share a seed.

    The numbers are part of what a seed means: a changed number changes every run, cache and score that uses it.
    """

    # training
    ORDER = 0
    """Order of the data set, by epoch."""
    NOISE = 1
    """Noise of a pair, by its position in the run's stream."""
    LEVELS = 2
    """Noise levels of an optimiser step."""
    PROCESS = 3
    """Global generators of a process (dropout, data augmentation)."""
    WORKERS = 4
    """Generators of the data loader's workers."""
    GROUPS = 5
    """Order of the groups of pairs that share a shape."""
    CAPTIONS = 6
    """Which captions are dropped, by position in the run's stream."""
    VALIDATION = 7
    """Validation: 0 is its noise levels, 1 its noise."""
    SAMPLER = 8
    """Noise that a sampler adds while it draws a sample, from the sample's own seed."""

    # caches
    FLIP = 100
    """Which images are flipped, by row of the source."""
    CROP = 101
    """Where images are cropped, by row."""
    POSTERIOR = 102
    """Samples of the VAE's posterior, by row."""
    FIXED_NOISE = 103
    """Noise of fixed draws, by row and draw."""
    FIXED_LEVEL = 104
    """Noise levels of fixed draws, by row and draw."""
    FIXED_CAPTION = 105
    """Which fixed draws have no caption, by row and draw."""
    HELD_OUT = 106
    """Which prompts are held out for validation."""

    # scoring
    SCORE_LEVELS = 200
    """The sample of noise levels that stands for their distribution."""
    SCORE_PICKS = 201
    """Noise levels of a pair within their strata."""
    SCORE_NOISE = 202
    """Noise of a pair's draws."""


_MASK = (1 << 64) - 1


def derive_seed(seed: int, stream: int, counter: int) -> int:
    """Derives a well-mixed 63-bit seed for entry ``counter`` of one of a run's streams.

    Neighbouring counters give unrelated seeds in their low 32 bits too, which is all that torch's CPU
    generator looks at.
    """
    state = seed & _MASK
    for word in (stream, counter):
        state = _mix((state ^ _mix(word + 1)) & _MASK)
    return state >> 1


def happens(probability: float, seed: int, stream: int, counter: int) -> bool:
    """Whether entry ``counter`` of a stream of independent events happens."""
    return derive_seed(seed, stream, counter) < probability * (1 << 63)


def _mix(value: int) -> int:
    """Applies SplitMix64's finaliser, a bijection of 64-bit words in which every bit depends on all."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def seed_process(seed: int, process: int) -> None:
    """Seeds torch's, Python's and NumPy's generators, which data sets that augment draw from."""
    import numpy as np

    own = derive_seed(seed, RandomStream.PROCESS, process)
    torch.manual_seed(own)
    random.seed(own)
    np.random.seed(own % (1 << 32))


def get_random_state(device: torch.device) -> tuple[dict[str, Tensor], str]:
    """Returns the states of the process's generators: torch's as tensors, Python's and NumPy's as JSON."""
    import numpy as np

    tensors = {"rng.torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
    # Data sets that augment may use either of these; both states are small and plain.
    host = {"python": random.getstate(), "numpy": np.random.get_state(legacy=False)}
    return tensors, json.dumps(host, default=np.ndarray.tolist)


def set_random_state(tensors: dict[str, Tensor], text: str, device: torch.device) -> None:
    """Undoes :func:`get_random_state`."""
    import numpy as np

    host = json.loads(text)
    version, python_words, gauss = host["python"]
    random.setstate((version, tuple(python_words), gauss))
    words = host["numpy"]["state"]
    np.random.set_state(host["numpy"] | {"state": words | {"key": np.array(words["key"], dtype=np.uint32)}})
    torch.set_rng_state(tensors["rng.torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["rng.cuda"], device)


@contextmanager
def preserve_random_state(device: torch.device) -> Iterator[None]:
    """Restores the process's generators at the end, whatever is drawn inside."""
    tensors, text = get_random_state(device)
    try:
        yield
    finally:
        set_random_state(tensors, text, device)
