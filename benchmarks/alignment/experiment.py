"""One cell: train, then measure what came out."""

from __future__ import annotations

import copy
import functools
import math
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.alignment import gradient_variance, tasks
from benchmarks.alignment.cells import Cell
from benchmarks.alignment.variants import make_loss
from sipo.demo.digits import CLASSES
from sipo_kernels.options import METHODS

CACHE = Path("out/alignment")
"""Samples of base models, which all cells share."""

SCORED_PAIRS, DRAWS = 100, 4
"""Pairs of each set that implicit preferences are measured on, and draws of noise and noise level for each."""

PROBED = Cell(method="diffusion_dpo")
"""The cells, of any seed, that have all methods' gradients measured, at their policy and at the base model."""

_STATISTICS = ("count", "ratio", "active", "clipped", "coef", "coef_sq", "grad_sq")
_WINDOWS = ((0.0, 1 / 3), (2 / 3, 1.0))  # early and late, as shares of a run
_CURVE = (
    "loss",
    "rewards/accuracies",
    "active_fraction",
    "chosen_gap",
    "rejected_gap",
    "model_mse",
    "ref_mse",
    "grad_norm",
)


def run_cell(cell: Cell, *, steps: int | None = None, samples: int | None = None) -> dict[str, Any]:
    """Trains and measures one cell, on a GPU where there is one.

    Args:
        cell: which.
        steps: in place of the task's own.
        samples: in place of the task's own, and with it twice as many of the base model.

    Returns:
        JSON values: the cell's fields, and what the functions below return. A run that broke down has ``"diverged"``
        and no measurements.
    """
    from sipo.training import TrainingConfig, TrainingDivergedError, make_accelerator, train

    started = time.perf_counter()
    task = tasks.get(cell.task)
    base, scheduler = task.load_base()
    policy = copy.deepcopy(base)
    policy.requires_grad_(True)
    beta = cell.beta or 1000.0
    loss_fn = make_loss(scheduler, cell.method, beta, cell.variant)
    drawn = tasks.BASE_SAMPLES if samples is None else 2 * samples
    pairs = make_pairs(task, cell, drawn)
    steps = (steps or task.steps) * cell.length
    folder = Path(tempfile.mkdtemp(prefix="sipo-alignment-"))
    record: dict[str, Any] = {**asdict(cell), "steps": steps}
    config = TrainingConfig(
        max_train_steps=steps,
        output_dir=folder,
        train_batch_size=task.batch_size,
        learning_rate=task.learning_rate,
        lr_scheduler="constant_with_warmup",
        lr_warmup_steps=min(20, steps),
        timestep_distribution=task.distribution,
        seed=cell.seed,
        logging_steps=10,
        progress=None,
        checkpointing_steps=0,
        report_to="none",
        alarms="off",
    )
    try:
        result = train(policy, base, loss_fn, pairs, task.predict, config, accelerator=make_accelerator(config))
        record |= _training(folder, result.history)
    except TrainingDivergedError:
        return {**record, "diverged": True, "seconds": round(time.perf_counter() - started, 1)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    trained = time.perf_counter()
    policy.eval()
    classes = torch.arange(samples or task.samples) % CLASSES
    record |= measure_samples(task, task.sample(policy, scheduler, classes, cell.seed), classes)
    record["accuracy"] = preference_accuracy(task, policy, base, scheduler, cell.seed, drawn)
    if cell.like(seed=PROBED.seed) == PROBED:
        losses = {method: make_loss(scheduler, method, beta) for method in METHODS}
        record["probe"] = gradient_variance.gradient_spread(task, policy, base, losses, pairs, cell.seed)
        record["probe_base"] = gradient_variance.gradient_spread(
            task, copy.deepcopy(base).requires_grad_(True), base, losses, pairs, cell.seed
        )
    record["seconds"] = round(time.perf_counter() - started, 1)
    record["training_seconds"] = round(trained - started, 1)
    return record


def make_pairs(task: tasks.Task, cell: Cell, drawn: int = tasks.BASE_SAMPLES) -> tasks.RewardPairs:
    """Returns the pairs that a cell trains on; on-policy ones are made of so many samples of the base model."""
    images = (task.data() if cell.source == "data" else tasks.base_samples(task, CACHE, drawn))[0]
    return tasks.RewardPairs(
        images, task.rewards[cell.reward], count=tasks.PAIRS, noise=cell.noise, fraction=cell.fraction, seed=cell.seed
    )


def measure_samples(task: tasks.Task, images: Tensor, classes: Tensor) -> dict[str, Any]:
    """What samples are worth: every reward's mean, agreement with the class asked for, distance to the data, diversity.

    ``distance`` is the Fréchet distance to the real training data in the judge's features, ``diversity`` the mean
    distance of two samples of one class there, as a share of the real data's.
    """
    judge = task.judge()
    real = task.data()[0]
    features, real_features = judge.features(images), _real_features(task.name)
    return {
        "rewards": {name: reward(images).double().mean().item() for name, reward in task.rewards.items()},
        "agreement": (judge.read(images) == classes).double().mean().item(),
        "distance": tasks.frechet_distance(features, real_features),
        "diversity": tasks.spread_within(features, classes) / tasks.spread_within(real_features, real.labels),
    }


@functools.cache
def _real_features(name: str) -> Any:
    task = tasks.get(name)
    return task.judge().features(task.data()[0].images)


@functools.cache
def measure_base(name: str) -> dict[str, Any]:
    """Runs :func:`measure_samples` on a task's base model, and adds the real data's rewards: every run's start."""
    task = tasks.get(name)
    model, scheduler = task.load_base()
    classes = torch.arange(task.samples) % CLASSES
    measured = measure_samples(task, task.sample(model, scheduler, classes, 0), classes)
    images = task.data()[0].images
    measured["real_rewards"] = {name: r(images).double().mean().item() for name, r in task.rewards.items()}
    measured["real_spread"] = {name: r(images).double().std().item() for name, r in task.rewards.items()}
    return measured | {"judge_accuracy": task.judge().accuracy}


def preference_accuracy(
    task: tasks.Task, policy: Any, base: Any, scheduler: Any, seed: int, drawn: int = tasks.BASE_SAMPLES
) -> dict[str, dict[str, float]]:
    """Returns how often the model's implicit reward agrees with each true reward, on held-out pairs from each source.

    Returns:
        ``{source: {reward: share}}``: of real pairs, and pairs from the base model, that nothing was trained on.
    """
    from sipo.analysis.score import score_pairs
    from sipo.schedule import NoiseSchedule

    schedule = NoiseSchedule.from_scheduler(scheduler)
    measured: dict[str, dict[str, float]] = {}
    for source in ("data", "base"):
        images = (task.data() if source == "data" else tasks.base_samples(task, CACHE, drawn))[1]
        measured[source] = {}
        for name, reward in task.rewards.items():
            held_out = tasks.RewardPairs(images, reward, count=SCORED_PAIRS, seed=1_000 + seed)
            scores = score_pairs(
                policy,
                base,
                schedule,
                held_out,
                task.predict,
                beta=1.0,
                draws=DRAWS,
                seed=seed,
                batch_size=64,
                distribution=task.distribution,
            )
            measured[source][name] = scores.summary()["accuracy"]
    return measured


def _training(folder: Path, history: list[dict[str, Any]]) -> dict[str, Any]:
    """The curves, how the gradient's norm spreads over the last half, and statistics by noise level, early and late."""
    from sipo.training.statistics import merge, read_statistics

    lines = [line for line in history if line["step"] > 1]
    late = lines[len(lines) // 2 :]
    norms, spreads = ([line[name] for line in late] for name in ("grad_norm", "grad_norm_std"))
    mean = sum(norms) / len(norms)
    # Within the log windows and between them.
    variance = sum(s * s for s in spreads) / len(spreads) + sum((x - mean) ** 2 for x in norms) / len(norms)
    measured: dict[str, Any] = {
        "curve": {name: [_rounded(line.get(name)) for line in lines] for name in _CURVE},
        "grad_norm": {"mean": mean, "std": math.sqrt(variance)},
        "end": {name: late[-1][name] for name in _CURVE},
    }
    statistics = read_statistics(folder / "timesteps.jsonl")
    last = statistics[-1]["step"]
    measured["timesteps"] = {
        label: _thinned(merge([line for line in statistics if low * last < line["step"] <= high * last]))
        for label, (low, high) in zip(("early", "late"), _WINDOWS, strict=True)
    }
    return measured


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) and math.isfinite(value) else value


def _thinned(line: dict[str, Any]) -> dict[str, Any]:
    """Returns what the figures need of a merged line, with four digits."""
    return {name: [_rounded(x) for x in line[name]] for name in _STATISTICS}
