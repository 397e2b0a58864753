"""The training loop that ``sipo.training`` is measured against: what a researcher writes by hand, and no more.

Plain torch after the published Diffusion-DPO script: two networks, chosen and rejected samples stacked, the loss from
means of squared differences. What that script does besides is left out, so that the loop is as fast as such a loop can
be: no metrics, no logging, no ``.item()``, no images encoded again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

if TYPE_CHECKING:  # accelerate comes with it
    from sipo.protocols import Predict

MAX_GRAD_NORM = 1.0

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def diffusion_dpo(model_pred: Tensor, ref_pred: Tensor, target: Tensor, beta: float) -> Tensor:
    """Computes the published loss: -log σ(-β/2 · (chosen sample's gap - rejected sample's gap)), mean over pairs."""
    dims = list(range(1, model_pred.ndim))
    model_error = (model_pred.float() - target).pow(2).mean(dims)
    ref_error = (ref_pred.float() - target).pow(2).mean(dims)
    gap_w, gap_l = (model_error - ref_error).chunk(2)
    return -F.logsigmoid(-0.5 * beta * (gap_w - gap_l)).mean()


def hand_written(
    policy: nn.Module,
    reference: nn.Module,
    pairs: Any,
    predict: Predict,
    levels: tuple[Tensor, Tensor] | None,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    batch_size: int,
    device: str,
    precision: str = "no",
    velocity: bool = False,
) -> None:
    """Trains ``policy`` for some optimiser steps.

    Args:
        policy: what is trained.
        reference: its frozen copy.
        pairs: a data set.
        predict: calls a network.
        levels: α and σ by timestep, ``[T]`` on the device, of a discrete schedule; ``None`` for a flow.
        loss: of policy's prediction, reference's, target and timesteps.
        optimizer: of the policy.
        steps: how many.
        batch_size: pairs in a step.
        device: where the networks are.
        precision: "no" or "bf16".
        velocity: whether a network that is no flow predicts v in place of noise.
    """
    loader: DataLoader[Any] = DataLoader(
        pairs, batch_size, shuffle=True, drop_last=True, pin_memory=device.startswith("cuda")
    )
    parameters = [p for p in policy.parameters() if p.requires_grad]
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    policy.train()
    for _ in range(steps):
        batch = next(batches)
        latents = torch.cat([batch["chosen"], batch["rejected"]]).to(device, non_blocking=True)
        condition = {name: torch.cat([t, t]).to(device, non_blocking=True) for name, t in batch["condition"].items()}
        for name, own in batch.get("own_condition", {}).items():  # SDXL's time ids
            condition[name] = torch.cat([own[:, 0], own[:, 1]]).to(device, non_blocking=True)
        noise, level = _draw(batch, latents, levels)
        shape = (-1, *[1] * (latents.ndim - 1))
        if levels is None:
            sigma, timesteps = level.view(shape), level * 1000
            noisy, target = (1 - sigma) * latents + sigma * noise, noise - latents
        else:
            timesteps = level
            alpha, sigma = (table[timesteps].view(shape) for table in levels)
            noisy = alpha * latents + sigma * noise
            target = alpha * noise - sigma * latents if velocity else noise
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            model_pred = predict(policy, noisy, timesteps, condition)
            with torch.no_grad():
                ref_pred = predict(reference, noisy, timesteps, condition)
        loss(model_pred, ref_pred, target, level).backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()


def _draw(batch: dict[str, Any], latents: Tensor, levels: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Returns noise and noise levels, which both samples of a pair share; the items' own if they have them."""
    half, device = len(latents) // 2, latents.device
    if "noise" in batch:
        noise, level = batch["noise"].to(device), batch["level"].to(device)
    else:
        noise = torch.randn_like(latents[:half])
        if levels is None:
            level = 1 - torch.rand(half, device=device)
        else:
            level = torch.randint(len(levels[0]), (half,), device=device)
    return torch.cat([noise, noise]), torch.cat([level, level])
