"""Trains the demo's base model, the small digit UNet shipped in ``sipo/demo/base``.

    python -m sipo.demo.train_base --output sipo/demo/base

About 2.5 minutes on two CPU cores. Plain noise prediction on the training digits, with Stable Diffusion's
noise schedule, so that the demo's importance ratios are those people meet in practice.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sipo.demo.digits import load_digits
from sipo.demo.model import SCHEDULER_FOLDER, build_model, build_scheduler, save_aside
from sipo.progress import StepProgress


def train_base_model(steps: int, seed: int) -> tuple[Any, float]:
    """Trains from scratch on the training digits.

    Args:
        steps: optimiser steps.
        seed: of initialisation, data order, noise and timesteps.

    Returns:
        The averaged model (:func:`fit`) and its noise-prediction loss on the held-out digits.
    """
    torch.manual_seed(seed)
    digits, held_out = load_digits()
    model, scheduler = build_model(), build_scheduler()

    def loss() -> torch.Tensor:
        index = torch.randint(len(digits.labels), (64,))
        return _noise_loss(model, scheduler, digits.images[index], digits.labels[index])

    averaged = fit(model, loss, steps, learning_rate=2e-3, warmup=100, weight_decay=1e-3, name="base model")
    repeats = 20
    with torch.no_grad():
        losses = [_noise_loss(averaged, scheduler, *held_out) for _ in range(repeats)]
    return averaged, torch.stack(losses).mean().item()


def fit(
    model: Any,
    loss: Callable[[], torch.Tensor],
    steps: int,
    learning_rate: float,
    *,
    warmup: int,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    name: str = "",
) -> Any:
    """Trains a small model from scratch with AdamW.

    Args:
        model: trained in place.
        loss: draws a batch and computes its loss.
        steps: optimiser steps.
        learning_rate: its peak, after a linear warm-up and before a cosine decay to 0.
        warmup: steps of the warm-up.
        weight_decay: AdamW's.
        betas: AdamW's.
        name: for the progress bar.

    Returns:
        An exponential moving average of the weights, in evaluation mode: single-step weights of so short a run give
        ragged samples.
    """
    averaged = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True
    )
    warmup = min(warmup, steps)
    shown = StepProgress(True, steps, 0)
    running = math.nan
    for step in range(steps):
        for group in optimizer.param_groups:
            decay = 0.5 * (1.0 + math.cos(math.pi * step / steps))
            group["lr"] = learning_rate * min(1.0, (step + 1) / warmup) * decay
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        # The window grows with the run, so that the average forgets the random initialisation.
        momentum = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1.0 - momentum)
        running = value.item() if math.isnan(running) else 0.98 * running + 0.02 * value.item()
        shown.advance()
        if step % 50 == 0 or step + 1 == steps:
            shown.show(step + 1, f"{name}: loss {running:.4f}")
    shown.close()
    return averaged


def _noise_loss(model: Any, scheduler: Any, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Computes the mean squared error of the predicted noise at uniform timesteps."""
    noise = torch.randn_like(images)
    timesteps = torch.randint(scheduler.config["num_train_timesteps"], (len(images),))
    noisy = scheduler.add_noise(images, noise, timesteps)
    predicted = model(noisy, timesteps, class_labels=labels).sample
    return torch.nn.functional.mse_loss(predicted, noise)


def save_model(model: Any, output: Path) -> None:
    """Writes the model and its noise schedule into folder ``output`` in diffusers format."""
    save_aside(model, output)
    save_aside(build_scheduler(), output / SCHEDULER_FOLDER)


def main(argv: Sequence[str] | None = None) -> int:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(prog="python -m sipo.demo.train_base", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--steps", type=int, default=2500, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}, expected at least 1")
    model, loss = train_base_model(steps=options.steps, seed=options.seed)
    save_model(model, options.output)
    print(f"{options.output}: {model.num_parameters():,} parameters, held-out noise loss {loss:.4f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
