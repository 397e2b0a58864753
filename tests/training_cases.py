"""A small network, pairs and one-call runs on the CPU, for the tests of training."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sipo import NoiseSchedule, SIPOLoss
from sipo.training import TrainingConfig, TrainingResult, train


class Network(nn.Module):
    """A few parameters that see the image, the timestep and the class."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.inward = nn.Conv2d(1, 6, 3, padding=1)
        self.classes = nn.Embedding(3, 6)
        self.dropout = nn.Dropout(dropout)
        self.outward = nn.Conv2d(6, 1, 3, padding=1)

    def forward(self, noisy: Tensor, timesteps: Tensor, classes: Tensor) -> Tensor:
        shift = self.classes(classes) + timesteps[:, None] / 1000
        hidden = torch.nn.functional.silu(self.inward(noisy) + shift[:, :, None, None])
        return self.outward(self.dropout(hidden))


def predict(module: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
    return module(noisy, timesteps, condition["class"])


class Pairs:
    """Chosen samples are bright, rejected ones dark; ``augment`` draws from every generator that there is."""

    def __init__(self, count: int = 24, augment: bool = False, fail_after: int | None = None) -> None:
        generator = torch.Generator().manual_seed(3)
        self.images = torch.randn(count, 2, 1, 4, 4, generator=generator)
        self.images[:, 0] += 0.5
        self.augment = augment
        self.left = fail_after
        self.seen: list[int] = []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        self.seen.append(index)
        chosen, rejected = self.images[index]
        if self.augment:
            chosen = chosen + 0.1 * torch.rand(()) + 0.1 * random.random() + 0.1 * np.random.rand()
        return {"chosen": chosen, "rejected": rejected, "condition": {"class": torch.tensor(index % 3)}}


class Broken(Pairs):
    """NaN in every pair, or only in those that come up in the given steps of 4 pairs."""

    def __init__(self, steps: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.steps = steps

    def __getitem__(self, index: int) -> dict[str, Any]:
        step = len(self.seen) // 4 + 1
        item = super().__getitem__(index)
        if self.steps is None or step in self.steps:
            item["chosen"] = torch.full_like(item["chosen"], math.nan)
        return item


class Signalled(Pairs):
    """Sends SIGTERM to this process when so many items have been read."""

    def __init__(self, *after: int) -> None:
        super().__init__()
        self.after = after

    def __getitem__(self, index: int) -> dict[str, Any]:
        if len(self.seen) in self.after:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)


class PlainSchedule:
    """The schedule protocol met by hand, without looking at a value."""

    prediction_type = "epsilon"

    def add_noise(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return sample + timesteps[:, None, None, None] / 1000 * noise

    def target(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise

    def sample_levels(self, n: int, generator: Any = None, *, distribution: str = "uniform", device: Any = None):  # type: ignore[no-untyped-def]
        return torch.randint(1000, (n,), generator=generator)


class PlainOutput(NamedTuple):
    loss: Tensor

    def metrics(self) -> dict[str, Tensor]:
        return {"loss": self.loss.detach(), "active_fraction": torch.ones(())}


class PlainLoss:
    schedule = PlainSchedule()

    def __call__(self, model_pred: Tensor, ref_pred: Tensor, target: Tensor, timesteps: Tensor) -> PlainOutput:
        return PlainOutput((model_pred - ref_pred - target.repeat(2, 1, 1, 1)).square().mean())


def networks(dropout: float = 0.0) -> tuple[Network, Network]:
    torch.manual_seed(1)
    policy = Network(dropout)
    return policy, copy.deepcopy(policy)


class Adapted(nn.Module):
    """A frozen network and an adapter on its output."""

    def __init__(self, base: Network) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.adapter = nn.Conv2d(1, 1, 3, padding=1)
        nn.init.zeros_(self.adapter.weight)
        nn.init.zeros_(self.adapter.bias)
        self.on = True

    def forward(self, noisy: Tensor, timesteps: Tensor, classes: Tensor) -> Tensor:
        out = self.base(noisy, timesteps, classes)
        return out + self.adapter(noisy) if self.on else out


@contextlib.contextmanager
def without_adapter(network: nn.Module) -> Iterator[None]:
    assert isinstance(network, Adapted) and not torch.is_grad_enabled()
    network.on = False
    try:
        yield
    finally:
        network.on = True


def loss(**options: Any) -> SIPOLoss:
    return SIPOLoss(NoiseSchedule.discrete(), **({"beta": 50.0, "mask_threshold": 0.0} | options))


def settings(folder: Path, **options: Any) -> TrainingConfig:
    quiet: dict[str, Any] = {"max_train_steps": 4, "train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    quiet |= {"checkpointing_steps": 0, "progress": False, "report_to": "none"}
    return TrainingConfig(output_dir=folder, **(quiet | options))


def fit(
    folder: Path, *, policy: Any = None, data: Any = None, accelerator: Accelerator | None = None, **options: Any
) -> tuple[Any, TrainingResult]:
    """Trains on the CPU and returns the policy and the result.

    ``options`` are the configuration's, or :func:`train`'s own.
    """
    new, reference = networks(options.pop("dropout", 0.0))
    policy = new if policy is None else policy
    loss_fn = options.pop("loss_fn", None) or loss()
    names: tuple[str, ...] = ("resume_from", "validation", "on_validation", "offload_reference", "identity")
    if not isinstance(options.get("optimizer"), str):
        names += ("optimizer",)
    own = {name: options.pop(name) for name in names if name in options}
    reference = options.pop("reference", reference)
    predictor = options.pop("predict", predict)
    config = settings(folder, **options)
    accelerator = accelerator or Accelerator(
        cpu=True, mixed_precision=config.mixed_precision, gradient_accumulation_steps=config.gradient_accumulation_steps
    )
    data = Pairs() if data is None else data
    return policy, train(policy, reference, loss_fn, data, predictor, config, accelerator=accelerator, **own)


def events_in(folder: Path) -> Any:
    """Returns what TensorBoard reads back from a run's folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    return events


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(n == m and torch.equal(x, y) for (n, x), (m, y) in pairs)


def untimed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
