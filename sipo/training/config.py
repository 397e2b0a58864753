"""Settings of a training run and the ways a run can end early."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from sipo.fields import Allowed, AtLeast0, AtLeast1, NotNegative, Positive, Share, check_fields

MixedPrecision = Literal["no", "bf16", "fp16"]
Optimizer = Literal["adamw", "adamw8bit", "paged_adamw8bit"]
RateSchedule = Literal["constant", "constant_with_warmup", "cosine", "linear"]
TimestepSampling = Literal["all", "informative"]
Alarms = Literal["warn", "stop", "off"]

# Of seconds; datetime's own limit is 86,400 times as much.
Timeout = Annotated[AtLeast1, Allowed(lambda value: value <= 10**9, "at most 1000000000 seconds")]

_FREE_ON_RESUME = frozenset(
    {
        "max_train_steps",
        "logging_steps",
        "validation_steps",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "max_nonfinite_steps",
        "timestep_statistics",
        "alarms",
        "output_dir",
        "dataloader_num_workers",
        "ddp_timeout",
        "progress",
        "report_to",
        "skip_inactive",
    }
)


class TrainingDivergedError(RuntimeError):
    """Too many optimiser steps in a row had a gradient that was not finite."""


class TrainingInterruptedError(RuntimeError):
    """The run was asked to stop, finished its step and wrote a checkpoint.

    Attributes:
        step: optimiser steps done.
        checkpoint: where to resume from.
        signal: what asked: "SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2" or "another process".
    """

    def __init__(self, step: int, checkpoint: Path, signal: str) -> None:
        super().__init__(f"stopped by {signal} after step {step}; {_how_to_resume(checkpoint)}")
        self.step = step
        self.checkpoint = checkpoint
        self.signal = signal


class TrainingAlarmError(RuntimeError):
    """An alarm of ``sipo.training.alarms`` was raised, and the run stopped after writing a checkpoint.

    Attributes:
        step: optimiser steps done.
        checkpoint: where to resume from.
        said: which alarm it was and why, without how to resume.
    """

    def __init__(self, step: int, checkpoint: Path, messages: Sequence[str]) -> None:
        said = f"step {step}: {'; '.join(messages)}; alarms='stop'"
        super().__init__(f"{said}: {_how_to_resume(checkpoint)}")
        self.said = said
        self.step = step
        self.checkpoint = checkpoint


class TrainingMismatchError(ValueError):
    """Policy and reference differ before the first step, by more than their types round; no weight has moved."""


class TrainingOutOfMemoryError(RuntimeError):
    """The device ran out of memory in a step; the message says what to lower."""


class TrainingWarning(UserWarning):
    """Training continues, but not quite as asked, or may no longer have any effect."""


class CheckpointError(ValueError):
    """A checkpoint that is absent, damaged, or of another run."""


@dataclass(frozen=True)
class TrainingConfig:
    """Everything about a run that is not a model, a loss or data.

    Attributes:
        max_train_steps: optimiser steps of the whole run, those before a resume included.
        output_dir: where ``metrics.jsonl``, ``timesteps.jsonl``, ``tensorboard/`` and ``checkpoints/`` go.
        train_batch_size: preference pairs in one forward pass of one process (``2 * train_batch_size`` samples).
        gradient_accumulation_steps: forward passes per optimiser step. The run's random numbers belong to pairs and not
            to passes, so ``train_batch_size=32`` and ``train_batch_size=16, gradient_accumulation_steps=2`` see the
            same noise and noise levels, and the same data where all pairs have one shape.
        optimizer: "adamw" is torch's. "adamw8bit" keeps its moments in 8 bits and "paged_adamw8bit" lets them
            overflow into host memory; both are bitsandbytes'. Used, like the next four, where none is passed in.
        learning_rate: its peak, once warmed up.
        adam_beta1: AdamW's decay of the first moment.
        adam_beta2: AdamW's decay of the second moment.
        adam_epsilon: AdamW's.
        adam_weight_decay: AdamW's.
        lr_scheduler: diffusers' names. "constant" has no warm-up; "constant_with_warmup" is constant after it. "cosine"
            and "linear" fall to 0 at the last step after it: they depend on ``max_train_steps``, which a resumed run
            must then keep.
        lr_warmup_steps: optimiser steps over which the learning rate rises linearly; 0 with "constant".
        max_grad_norm: gradients are scaled down to this global norm; ``None`` leaves them alone.
        use_ema: keep an exponential moving average of the trained weights.
        ema_decay: the average's decay per step, once its own warm-up is over. Used with ``use_ema`` only.
        mixed_precision: "no", "bf16" or "fp16". Prefer bf16: fp16 needs a loss scaler, and torch's reads the
            device once a step.
        timestep_distribution: passed to the schedule's ``sample_levels``, which knows which it has.
        timestep_sampling: "all", or "informative": noise levels at which the mask drops pairs on average are drawn
            no more, but for a small share that notices when they recover (see ``sipo.training.timesteps``).
        proportion_empty_prompts: share of pairs that are trained without their caption, with the data set's
            ``unconditional`` in its place. Items with fixed draws have it decided already.
        skip_inactive: leave out the backward pass where the mask has dropped every pair of a forward pass, on every
            process. The result is the same; the device is read once a pass.
        seed: data order, noise, noise levels, and torch's global generators (dropout) are functions of it.
        logging_steps: optimiser steps between log lines; the device is read for these alone.
        validation_steps: optimiser steps between validations, and one after the last step; 0 for none.
        checkpointing_steps: optimiser steps between checkpoints; 0 writes none. With any, the last step gets one too.
            Each is checked by size and hash before it is used, and the one before it stands in for a damaged one.
        checkpoints_total_limit: newest checkpoints to keep; ``None`` or 0 keeps all.
        max_nonfinite_steps: stop with :class:`TrainingDivergedError` when this many steps in a row had a
            non-finite gradient. Counted on the device and read with the log, so a run stops at the first log
            line after.
        timestep_statistics: whether to write ``timesteps.jsonl``, statistics by noise level (docs/math.md §8), with
            each log line.
        alarms: what to do when a log line shows that the policy drifts or collapses, or that the mask has stopped
            training (docs/math.md §8): "warn", "stop" with a checkpoint and :class:`TrainingAlarmError`, or "off". With
            "off" a run whose policy is not its reference at the first step continues too.
        dataloader_num_workers: data loader processes.
        ddp_timeout: seconds that a process waits for the others before the run ends with an error; under DDP and FSDP2
            alike, by the name that transformers has for it. Not used where the caller passes in an accelerator.
        progress: ``True`` draws a bar where standard error is a terminal, and prints a line there for each log line
            where it is none; ``False`` prints the lines in any case, and ``None`` nothing.
        report_to: trackers by accelerate's names ("tensorboard", "wandb", ...), or one name. "all" stands for those
            that are installed, "none" or an empty list for none. "tensorboard" is used where it is installed; any other
            must be installed.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range.
    """

    max_train_steps: AtLeast1
    output_dir: str | Path
    train_batch_size: AtLeast1 = 8
    gradient_accumulation_steps: AtLeast1 = 1
    optimizer: Optimizer = "adamw"
    learning_rate: Positive = 1e-5
    adam_beta1: Share = 0.9
    adam_beta2: Share = 0.999
    adam_epsilon: Positive = 1e-8
    adam_weight_decay: NotNegative = 1e-2
    lr_scheduler: RateSchedule = "constant"
    lr_warmup_steps: AtLeast0 = 0
    max_grad_norm: Positive | None = 1.0
    use_ema: bool = False
    ema_decay: Share = 0.9999
    mixed_precision: MixedPrecision = "no"
    timestep_distribution: str = "uniform"
    timestep_sampling: TimestepSampling = "all"
    proportion_empty_prompts: Share = 0.0
    skip_inactive: bool = False
    seed: AtLeast0 = 0
    logging_steps: AtLeast1 = 10
    validation_steps: AtLeast0 = 0
    checkpointing_steps: AtLeast0 = 500
    checkpoints_total_limit: AtLeast0 | None = 2
    max_nonfinite_steps: AtLeast1 = 20
    timestep_statistics: bool = True
    alarms: Alarms = "warn"
    dataloader_num_workers: AtLeast0 = 0
    ddp_timeout: Timeout = 1800
    progress: bool | None = True
    report_to: str | tuple[str, ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            raise ValueError(
                f"lr_warmup_steps={self.lr_warmup_steps}: expected 0 with lr_scheduler='constant', which has no "
                "warm-up; lr_scheduler='constant_with_warmup' has one"
            )

    @property
    def folder(self) -> Path:
        """``output_dir`` as a path."""
        return Path(self.output_dir)

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.folder / "checkpoints"

    @property
    def metrics_path(self) -> Path:
        """The run's log, one JSON object a line."""
        return self.folder / "metrics.jsonl"

    @property
    def statistics_path(self) -> Path:
        """The run's statistics by noise level, one JSON object a line."""
        return self.folder / "timesteps.jsonl"

    def pairs_in_step(self, processes: int) -> int:
        """Counts the pairs in an optimiser step of all processes together."""
        return self.train_batch_size * self.gradient_accumulation_steps * processes

    def identity(self) -> dict[str, Any]:
        """Returns the settings that a resumed run must share with the one that it continues, as JSON values."""
        free = set(_FREE_ON_RESUME)
        if not self.lr_scheduler.startswith("constant"):
            free.remove("max_train_steps")
        if self.timestep_sampling == "informative":
            free.remove("logging_steps")  # what is drawn changes when a log line is read
        if not self.use_ema:
            free.add("ema_decay")
        settings = {k: v for k, v in dataclasses.asdict(self).items() if k not in free}
        plain: dict[str, Any] = json.loads(json.dumps(settings))
        return plain


def _how_to_resume(checkpoint: Path) -> str:
    return f"resume with resume_from={str(checkpoint)!r}"
