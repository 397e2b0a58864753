"""Runs the demo: aligns a small model on real digits, samples before and after, and writes the results."""

from __future__ import annotations

import copy
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sipo.demo.digits import CLASSES, InkPairs, ink, load_digits
from sipo.demo.measure import DigitClassifier, SampleScores, weight_by_timestep
from sipo.demo.model import load_base, predict, sample, save_aside
from sipo.fields import AtLeast0, AtLeast1, Positive, check_fields
from sipo.locks import locked
from sipo.loss import SIPOLoss
from sipo.schedule import NoiseSchedule

_LOG_EVERY = 10
_HELD_OUT = 256  # pairs of digits that the training pairs have none of
_WRITTEN = {"model", "metrics.jsonl", "timesteps.jsonl", "summary.json", "demo.png", "report.html"}
_WEIGHT_LEVELS = 28


@dataclass(frozen=True)
class DemoConfig:
    """Settings of the demo.

    Attributes:
        output: folder for ``model/``, ``metrics.jsonl``, ``timesteps.jsonl``, ``summary.json`` and ``demo.png``.
        method: one of the pair loss's methods.
        beta: β; ``None`` takes docs/math.md's default for the method and images.
        steps: optimiser steps.
        batch_size: pairs per step.
        learning_rate: AdamW's, after a short warm-up. Low enough that docs/math.md's default β holds the model:
            at 1e-4, with all else as it is here, one sample in ten still shows the digit asked for.
        samples: digits to draw before and after; a multiple of 10, as many of each.
        seed: of pairs, noise, timesteps and samples.
        device: "cpu" or "cuda". The same seed gives the same numbers on the CPU.

    Raises:
        TypeError: a value of another type.
        ValueError: a value out of range, or a method or β that the loss does not take.
    """

    output: Path = Path("out/demo")
    method: str = "sipo"
    beta: float | None = None
    steps: AtLeast1 = 300
    batch_size: AtLeast1 = 32
    learning_rate: Positive = 2e-5
    samples: int = 500
    seed: AtLeast0 = 0
    device: Literal["cpu", "cuda"] = "cpu"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.samples < CLASSES or self.samples % CLASSES:
            raise ValueError(f"samples={self.samples}: expected a positive multiple of {CLASSES}")
        # The loss has its own checks of these two.
        SIPOLoss(NoiseSchedule.discrete(), method=self.method, beta=self.beta)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device='cuda': torch sees no CUDA device, expected cpu")
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"output={str(self.output)!r} is a file, expected a folder")
        names = {path.name for path in self.output.glob("[!.]*")}
        if names & _WRITTEN and names - _WRITTEN:  # a folder of the demo alone is replaced
            listed = ", ".join(sorted(names)[:5])
            raise ValueError(f"output={str(self.output)!r} holds more than a demo ({listed}), expected another folder")


def run_demo(config: DemoConfig, *, progress: bool | None = True) -> dict[str, Any]:
    """Runs the demo and writes its outputs.

    Args:
        config: what to run.
        progress: as in :mod:`sipo.progress`.

    Returns:
        What ``summary.json`` holds. Everything but ``seconds`` is a function of the configuration and machine.

    Raises:
        LockedError: another process is writing to the output folder.
        OSError: the output folder cannot be written, or the package lacks its base model.
        TrainingDivergedError: the run broke down.
    """
    with locked(config.output, f"output={str(config.output)!r}"):
        return _run_demo(config, progress)


def _run_demo(config: DemoConfig, progress: bool | None) -> dict[str, Any]:
    started = time.perf_counter()
    from accelerate import Accelerator

    from sipo.demo.picture import DemoResult, ImportanceWeights, draw_picture
    from sipo.files import write_aside
    from sipo.training import TrainingConfig, train
    from sipo.training.log_reader import step_mean

    base, scheduler = load_base()
    # The ratio's stride is docs/math.md's (50 sampling steps), so that the weights compare with published ones;
    # the 20 steps that the digits are drawn with would mask more.
    loss_fn = SIPOLoss(scheduler, method=config.method, beta=config.beta)
    beta = loss_fn.options.beta_for(4)
    digits, held_out = load_digits()
    judge = DigitClassifier(digits, held_out)
    pairs = InkPairs(digits, seed=config.seed)
    classes = torch.arange(config.samples) % CLASSES
    base.to(config.device)
    before = sample(base, scheduler, classes, config.seed)

    for name in ("metrics.jsonl", "timesteps.jsonl"):  # an earlier demo's
        (config.output / name).unlink(missing_ok=True)
    policy = copy.deepcopy(base)
    training_started = time.perf_counter()
    result = train(
        policy,
        base,
        loss_fn,
        pairs,
        predict,
        TrainingConfig(
            max_train_steps=config.steps,
            output_dir=config.output,
            train_batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            lr_scheduler="constant_with_warmup",
            lr_warmup_steps=min(20, config.steps),
            seed=config.seed,
            logging_steps=_LOG_EVERY,
            validation_steps=config.steps,
            progress=progress,
            checkpointing_steps=0,
            report_to="none",
        ),
        accelerator=Accelerator(cpu=config.device == "cpu"),
        validation=InkPairs(held_out, count=_HELD_OUT, seed=config.seed),
    )
    training_seconds = time.perf_counter() - training_started

    policy.eval()
    after = sample(policy, scheduler, classes, config.seed)
    # Evenly spaced in log t: everything happens at low noise, where SNR changes fastest.
    last = loss_fn.schedule.num_train_timesteps - 1
    levels = torch.logspace(math.log10(20), math.log10(last), _WEIGHT_LEVELS, dtype=torch.float32)
    levels = levels.round().long().clamp(max=last)
    weights = ImportanceWeights(
        levels.tolist(),
        weight_by_timestep(base, base, loss_fn, pairs, levels, config.seed).tolist(),
        weight_by_timestep(policy, base, loss_fn, pairs, levels, config.seed).tolist(),
    )
    before_scores, after_scores = judge.score(before, classes), judge.score(after, classes)

    save_aside(policy, config.output / "model")
    draw_picture(
        config.output / "demo.png",
        DemoResult(
            method=config.method,
            beta=beta,
            steps=config.steps,
            threshold=None if config.method == "diffusion_dpo" else loss_fn.options.mask_threshold,
            classes=classes,
            before=before,
            after=after,
            before_scores=before_scores,
            after_scores=after_scores,
            judge_accuracy=judge.accuracy,
            history=result.history,
            weights=weights,
        ),
    )
    summary: dict[str, Any] = {
        "method": config.method,
        "beta": beta,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "samples": config.samples,
        "seed": config.seed,
        "real_ink": ink(digits.images).mean().item(),
        "judge_accuracy": judge.accuracy,
        "before": before_scores._asdict(),
        "after": after_scores._asdict(),
        "active_fraction": step_mean(result.history, "active_fraction"),
        "rewards/accuracies": step_mean(result.history, "rewards/accuracies"),
        "weights": weights._asdict(),
        "seconds": {
            "training": round(training_seconds, 1),
            "total": round(time.perf_counter() - started, 1),
        },
    }
    write_aside(config.output / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def describe(summary: dict[str, Any], output: Path) -> str:
    """Formats the result of the demo in a few lines for a terminal."""
    before, after = SampleScores(**summary["before"]), SampleScores(**summary["after"])
    seconds = summary["seconds"]
    return "\n".join(
        [
            f"{summary['method']}, beta {summary['beta']:g}: {summary['steps']} steps of "
            f"{summary['batch_size']} pairs in {seconds['training']:.0f} s ({seconds['total']:.0f} s in all)",
            f"mean ink             {before.ink:+.3f} -> {after.ink:+.3f}   "
            f"(-1 blank, +1 solid; real digits {summary['real_ink']:+.3f})",
            f"read as requested    {before.agreement:.1%} -> {after.agreement:.1%}   "
            f"(by a classifier that is right on {summary['judge_accuracy']:.1%} of held-out real digits)",
            f"mean active fraction {summary['active_fraction']:.1%}",
            f"picture, model and numbers: {output}",
            f"is it learning? `sipo analyze {output}` writes a report with a verdict",
        ]
    )
