"""Trains the base models of the moving digits, shipped in ``benchmarks/alignment/base``.

    OMP_NUM_THREADS=1 python -m benchmarks.alignment.train_moving_digits cogvideox wan

Plain denoising of the clips to learn from, with the noise levels that alignment draws as well. On one thread of a
machine with other work to do it took 7 and 19 minutes. Weights are stored in float16: half the repository's share.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.alignment.moving_digits import (
    BASE,
    KINDS,
    ClipJudge,
    build_model,
    build_scheduler,
    ink,
    load_base,
    load_moving,
    predict,
    sample,
    smoothness,
)
from sipo import NoiseSchedule
from sipo.batch import level_argument, network_timesteps
from sipo.demo.digits import CLASSES, Digits
from sipo.demo.model import save_aside
from sipo.demo.train_base import fit

DISTRIBUTION = {"cogvideox": "uniform", "wan": "shifted"}
"""Of the noise levels drawn, by kind, as :meth:`sipo.NoiseSchedule.sample_levels` names them."""

STEPS = {"cogvideox": 3500, "wan": 6000}
"""Optimiser steps, by kind: after 3,500 the flow's samples are not as readable yet as the other's."""


def train(kind: str, steps: int, batch_size: int = 32, learning_rate: float = 2e-3, seed: int = 0) -> Any:
    """Trains from scratch on the clips of :func:`load_moving`.

    Args:
        kind: of :data:`KINDS`.
        steps: optimiser steps.
        batch_size: clips per step.
        learning_rate: AdamW's peak.
        seed: of initialisation, data order, noise and noise levels.

    Returns:
        The averaged network, in evaluation mode.
    """
    torch.manual_seed(seed)
    data = load_moving(kind)[0]
    model, schedule = build_model(kind), NoiseSchedule.from_scheduler(build_scheduler(kind))

    def loss() -> Tensor:
        rows = torch.randint(len(data.labels), (batch_size,))
        return _loss(kind, model, schedule, data.images[rows], data.labels[rows])

    optimizer: dict[str, Any] = {"warmup": 200, "betas": (0.9, 0.99), "weight_decay": 1e-2}
    return fit(model, loss, steps, learning_rate, name=f"{kind} base", **optimizer)


@torch.no_grad()
def held_out_loss(kind: str, model: Any, held_out: Digits, seed: int = 0) -> float:
    """Returns the training loss on other clips, with one draw of noise and noise level for each."""
    schedule = NoiseSchedule.from_scheduler(build_scheduler(kind))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # In batches of about those of training, whose activations stay in cache.
        batches = zip(held_out.images.split(40), held_out.labels.split(40), strict=True)
        losses = [(_loss(kind, model, schedule, clips, labels), len(clips)) for clips, labels in batches]
    return sum(loss.item() * count for loss, count in losses) / len(held_out.labels)


def _loss(kind: str, model: Any, schedule: NoiseSchedule, clips: Tensor, labels: Tensor) -> Tensor:
    noise = torch.randn_like(clips)
    levels = schedule.sample_levels(len(clips), distribution=DISTRIBUTION[kind])
    argument = level_argument(schedule, levels)
    noisy = schedule.add_noise(clips, noise, **argument)
    predicted = predict(kind)(model, noisy, network_timesteps(schedule, levels), labels)
    return torch.nn.functional.mse_loss(predicted, schedule.target(clips, noise, **argument))


def save(kind: str, model: Any, folder: Path) -> None:
    """Writes a network into ``folder`` in diffusers' format, weights in float16."""
    save_aside(copy.deepcopy(model).half(), folder)


def describe(kind: str, count: int = 400, seed: int = 0) -> str:
    """Returns how good the shipped model of a kind is, by ``count`` samples of it, beside the clips held out."""
    data, held_out = load_moving(kind)
    judge = ClipJudge(data, held_out)
    model, scheduler = load_base(kind)
    classes = torch.arange(count) % CLASSES
    clips = sample(model, scheduler, classes, seed)
    agreement = (judge.read(clips) == classes).double().mean().item()
    return (
        f"{kind}: {model.num_parameters():,} parameters, held-out loss {held_out_loss(kind, model, held_out):.4f}, "
        f"read as requested {agreement:.3f} (real clips: {judge.accuracy:.3f}), "
        f"ink {ink(clips).mean():.3f} (real: {ink(held_out.images).mean():.3f}), "
        f"smoothness {smoothness(clips).mean():.2f} (real: {smoothness(held_out.images).mean():.2f})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.alignment.train_moving_digits", description=__doc__.splitlines()[0]
    )
    parser.add_argument("kinds", nargs="+", choices=KINDS, help="models to train, one after the other")
    parser.add_argument("--steps", type=int, help=f"optimiser steps (default: {STEPS})")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args(argv)
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps is {options.steps}, expected at least 1")
    for kind in options.kinds:
        start = time.perf_counter()
        model = train(kind, options.steps or STEPS[kind], seed=options.seed)
        minutes = (time.perf_counter() - start) / 60.0
        save(kind, model, BASE / kind)
        print(f"{BASE / kind}: {minutes:.1f} minutes")
        print(describe(kind), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
