"""How much a method's gradient varies, by noise level: gradients of the weights, measured, for many small batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.alignment.tasks import RewardPairs, Task
from sipo.batch import PairBatch, collate, level_argument, noisy_pairs

BATCHES = 8
"""Small batches at each level, of :data:`PAIRS` pairs."""

PAIRS = 8


def levels_of(schedule: Any, count: int = 12) -> Tensor:
    """Returns the noise levels ``[count]`` to look at, closer together where the signal is nearly clean."""
    top = float(schedule.num_train_timesteps - 1) if schedule.kind == "discrete" else 1.0
    fractions = torch.logspace(-2, 0, count, dtype=torch.float64)
    return (fractions * top).round().long() if schedule.kind == "discrete" else fractions.float()


def gradient_spread(
    task: Task, policy: nn.Module, reference: nn.Module, losses: dict[str, Any], pairs: RewardPairs, seed: int
) -> dict[str, Any]:
    """Returns the variance and mean of the weights' gradient at each noise level.

    For a level and a loss, the gradients g_k of :data:`BATCHES` batches: ``variance`` is the mean of ‖g_k − ḡ‖² with
    Bessel's correction (the trace of the covariance of a batch's gradient), ``signal`` is ‖ḡ‖² less what that variance
    leaves in a mean of so many, which is unbiased and may come out below 0. All losses see the same pairs and noise.

    Args:
        task: how the network is called.
        policy: whose gradient; in evaluation mode, weights as they are.
        reference: the base model.
        losses: by name.
        pairs: drawn from.
        seed: of pairs and noise.

    Returns:
        ``levels``, ``active`` (share of pairs the mask lets through), ``variance`` and ``signal`` by loss, lists over
        the levels. β is divided out: gradients are those of loss / β.
    """
    device = next(policy.parameters()).device
    schedule = next(iter(losses.values())).schedule
    levels = levels_of(schedule)
    spread: dict[str, Any] = {"levels": levels.tolist()}
    for key in ("variance", "signal", "active"):
        spread[key] = {name: [] for name in losses}
    parameters = [p for p in policy.parameters() if p.requires_grad]
    for number, level in enumerate(levels):
        generator = torch.Generator().manual_seed(seed * 1000 + number)
        gradients: dict[str, list[Tensor]] = {name: [] for name in losses}
        active: dict[str, list[float]] = {name: [] for name in losses}
        for _ in range(BATCHES):
            items = [pairs[int(i)] for i in torch.randint(len(pairs), (PAIRS,), generator=generator)]
            batch = PairBatch.of_items(collate(items))
            noise = torch.randn(batch.chosen.shape, generator=generator)
            noisy = noisy_pairs(batch.with_draws(noise, level.repeat(PAIRS)).to(device), schedule)
            with torch.no_grad():
                ref_pred = task.predict(reference, noisy.samples, noisy.timesteps, noisy.condition)
            model_pred = task.predict(policy, noisy.samples, noisy.timesteps, noisy.condition)
            for name, loss_fn in losses.items():
                out = loss_fn(model_pred, ref_pred, noisy.target, **level_argument(schedule, noisy.levels))
                grads = torch.autograd.grad(out.loss / loss_fn.options.beta, parameters, retain_graph=True)
                gradients[name].append(torch.cat([g.flatten() for g in grads]).double())
                active[name].append(out.mask.double().mean().item())
        for name in losses:
            stack = torch.stack(gradients[name])
            mean = stack.mean(0)
            variance = ((stack - mean) ** 2).sum().item() / (BATCHES - 1)
            spread["variance"][name].append(variance)
            spread["signal"][name].append((mean**2).sum().item() - variance / BATCHES)
            spread["active"][name].append(sum(active[name]) / BATCHES)
    return spread
