"""The training loop: preference pairs to an aligned policy.

One policy forward serves chosen and rejected samples, which share noise and timestep; the reference runs without
gradients, or not at all. The host waits for the device when a log line is due; with several processes it also
waits, at the end of each step, until the device has begun the step's last pass.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sipo.batch import BatchMode, PairBatch
from sipo.locks import locked
from sipo.loss import SIPOLoss
from sipo.processes import from_main, on_main
from sipo.progress import say
from sipo.protocols import PairDataset, PairLoss, PairLossResult, Predict
from sipo.seeds import RandomStream, derive_seed, seed_process
from sipo.training import checkpoint, storage
from sipo.training.alarms import AlarmWatch
from sipo.training.config import (
    TrainingAlarmError,
    TrainingConfig,
    TrainingDivergedError,
    TrainingInterruptedError,
    TrainingMismatchError,
    TrainingWarning,
)
from sipo.training.first_step import NAMES, FirstStep, Mismatch
from sipo.training.forward import PairForward, ReferenceModel, takes_totals
from sipo.training.log import MetricWindow, Recorder, read_lines
from sipo.training.optimization import Average, make_optimizer, rate_factor
from sipo.training.preparation import check_setup, make_accelerator, prepare
from sipo.training.sharding import local, plain_name, reshard, unwrapped, whole
from sipo.training.statistics import TimestepStatistics
from sipo.training.stopping import StopAgreement, StopRequest, memory_advice, release_signals
from sipo.training.stream import StreamSampler, drop_captions, step_timesteps
from sipo.training.timesteps import InformativeTimesteps
from sipo.training.validation import OnValidation, Validation
from sipo_kernels import METRICS, Totals

ASKED = ("cpu",)
"""Devices that a number is read from at each step, as that takes no synchronisation there. Tests empty it."""


@dataclass(frozen=True)
class TrainingResult:
    """How a run went. The policy passed to :func:`train` holds the trained weights, under FSDP2 each process its part.

    Attributes:
        steps: optimiser steps of the run, those before a resume included.
        history: this call's log lines: ``step``, ``learning_rate``, ``grad_norm``, ``grad_norm_std``,
            ``nonfinite_steps``, ``seconds`` and the names of docs/math.md §8, each the mean since the line before; a
            run's first has ``start_difference`` and ``start_logit`` as well.
        metrics_path: the log on disk, with the lines from before a resume.
        checkpoint: the last checkpoint written by this call, if any.
        validation: this call's validation lines.
        ema: the moving average of the trained weights by name, whole and on the CPU; ``None`` without ``use_ema``.
            ``policy.load_state_dict(result.ema, strict=False)`` takes them.
    """

    steps: int
    history: list[dict[str, Any]]
    metrics_path: Path
    checkpoint: Path | None
    validation: list[dict[str, Any]] = field(default_factory=list)
    ema: dict[str, Tensor] | None = None


def train(
    policy: nn.Module,
    reference: ReferenceModel,
    loss_fn: PairLoss,
    dataset: PairDataset,
    predict: Predict,
    config: TrainingConfig,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    accelerator: Accelerator | None = None,
    resume_from: str | Path | None = None,
    validation: PairDataset | None = None,
    on_validation: OnValidation | None = None,
    offload_reference: bool = False,
    identity: Mapping[str, Any] | None = None,
    mismatch: Mismatch = "warn",
) -> TrainingResult:
    """Aligns ``policy`` on preference pairs, in place.

    A step whose gradient is not finite counts as one with a gradient of zero: nothing broken reaches the
    weights or the optimiser's moments, and they move only by what the optimiser does without a gradient
    (momentum, weight decay). The choice is made on the device.

    A checkpoint that is due is written before the validation that is due at the same step; a run that is resumed from
    there first does the validation, where its log has none of that step.

    Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2 lets the step finish and writes a checkpoint; a validation that is due
    is left to the resumed run. One process stops at the step it is in, several at this step or the next.

    Args:
        policy: trained where ``requires_grad`` is set; moved to the accelerator's device.
        reference: what the policy is compared with: a frozen copy of it; :class:`AdapterOff` for LoRA; or ``None``
            where the items carry its errors. A copy is moved to the device and set to eval mode, and may be bfloat16;
            FSDP2 with mixed precision makes it so.
        loss_fn: the loss; its ``schedule`` is the one trained with.
        dataset: the pairs.
        predict: calls a network; see :class:`Predict`.
        config: everything else.
        optimizer: of the policy's parameters; the configuration's if left out.
        accelerator: made from ``config`` if left out. One made by the caller decides about device and
            mixed precision, and must have ``gradient_accumulation_steps=config.gradient_accumulation_steps``.
        resume_from: a checkpoint's folder, or "latest" for the newest sound one in ``config.checkpoints``.
        validation: held-out pairs, measured every ``config.validation_steps`` steps.
        on_validation: called at the same steps, to draw samples for instance; see :data:`OnValidation`.
        offload_reference: keep a frozen copy in host memory while it is not running.
        identity: JSON values that a resumed run must share with the one it goes on from, beside the configuration's.
        mismatch: what to do where policy and reference differ before the first step by more than their types round
            (docs/math.md §8): "warn", or "raise" before any weight moves, for runs where both start from the same
            weights. ``alarms="off"`` does neither.

    Returns:
        How it went.

    Raises:
        TypeError, ValueError: arguments that cannot be trained with, or a folder with another run's checkpoints.
        ImportError: an optimiser or a tracker that is not installed.
        LockedError: another process is writing to ``config.folder``.
        CheckpointError: a checkpoint that is absent, damaged or of another run.
        TrainingDivergedError: too many non-finite steps in a row.
        TrainingMismatchError: ``mismatch="raise"``, and policy and reference differ before the first step.
        TrainingAlarmError: ``alarms="stop"`` and one went off; says why and where to resume from.
        TrainingInterruptedError: asked to stop; says where to resume from.
        TrainingOutOfMemoryError: says what to lower.
    """
    if accelerator is None:
        accelerator = make_accelerator(config)
    check_setup(policy, reference, dataset, config, accelerator)
    with locked(config.folder, f"training.output_dir={str(config.output_dir)!r}", accelerator=accelerator):
        on_main(accelerator, lambda: storage.clear(config.folder))
        # The main process says: on a network folder others may still see what it has removed.
        if resume_from is None and from_main(accelerator, lambda: checkpoint.found(config.checkpoints)):
            raise ValueError(
                f"{config.checkpoints} holds another run's checkpoints, expected resume_from or a new folder"
            )
        if config.validation_steps and validation is None and on_validation is None:
            raise ValueError(f"validation_steps={config.validation_steps}: expected pairs to validate on, or a hook")
        if validation is not None and len(validation) == 0:
            raise ValueError("the validation set holds 0 pairs, expected at least 1")
        forward = PairForward(loss_fn, predict, reference, accelerator, offload=offload_reference)
        run = _Run(policy, forward, dataset, config, optimizer, accelerator)
        run.identity.update(identity or {})
        run.validation = Validation(validation, on_validation, forward, config, accelerator)
        run.mismatch = mismatch
        with StopRequest(accelerator.num_processes) as request:
            return run.go(resume_from, request)


class _Run:
    """The state of one :func:`train` call."""

    validation: Validation
    mismatch: Mismatch

    def __init__(
        self,
        policy: nn.Module,
        forward: PairForward,
        dataset: PairDataset,
        config: TrainingConfig,
        optimizer: Any,
        accelerator: Accelerator,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.forward = forward
        self.dataset = dataset
        self.network = unwrapped(policy)
        # Before the optimiser is made, so that it holds the parameters where they will be trained.
        policy.to(self.device).train()
        if optimizer is None:
            optimizer = make_optimizer(config, [p for p in policy.parameters() if p.requires_grad], self.device)
        self.base_rates = [group["lr"] for group in optimizer.param_groups]
        self.policy, self.optimizer = prepare(policy, optimizer, config, accelerator)
        # FSDP2 has put others in their places.
        self.names = {plain_name(n): p for n, p in self.network.named_parameters() if p.requires_grad}
        self.parameters = list(self.names.values())
        self.average = Average(self.names, config.ema_decay) if config.use_ema else None
        # A loss that adds to sums on the device by itself saves a pass some thirty small operations.
        self.adds = takes_totals(forward.loss_fn)
        self.window = MetricWindow(self.device, METRICS if self.adds else ())
        self.watch = AlarmWatch()
        self.alarms: list[str] = []  # that the run stops for
        self.statistics = TimestepStatistics.of(forward.loss_fn, self.device) if config.timestep_statistics else None
        self.informative: InformativeTimesteps | None = None
        if config.timestep_sampling == "informative":
            self.informative = InformativeTimesteps(
                forward.loss_fn, self.device, config.seed, config.timestep_distribution
            )
        self.backwards = self.skipped = 0  # in this step; since the last log line
        self.saved: Path | None = None
        self.start: dict[str, float] = {}  # for the first log line
        loss_fn = forward.loss_fn
        self.identity = config.identity() | {
            "dataset_length": len(dataset),
            "groups": [len(group) for group in getattr(dataset, "groups", None) or ()],
            "processes": accelerator.num_processes,
            "loss": _describe(loss_fn),
        }

    def go(self, resume_from: str | Path | None, request: StopRequest) -> TrainingResult:
        """Trains from the start or a checkpoint to the last step."""
        config, accelerator = self.config, self.accelerator
        seed_process(config.seed, accelerator.process_index)
        accelerator.step = 0  # of accumulation; a run that broke off may have left it in mid-step
        first = 0 if resume_from is None else self._resume(resume_from)
        sampler = StreamSampler(
            len(self.dataset),
            config.train_batch_size,
            config.seed,
            first * config.gradient_accumulation_steps,
            config.max_train_steps * config.gradient_accumulation_steps,
            accelerator.process_index,
            accelerator.num_processes,
            getattr(self.dataset, "groups", None),
        )
        loader: DataLoader[Any] = DataLoader(
            self.dataset,  # type: ignore[arg-type]
            batch_sampler=sampler,
            num_workers=config.dataloader_num_workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=release_signals,
            # Its own generator: the loader draws a seed from it whenever it starts, and a resumed run starts
            # it anew.
            generator=torch.Generator().manual_seed(derive_seed(config.seed, RandomStream.WORKERS, first)),
        )
        recorder = Recorder(config, first, accelerator)
        agreement = StopAgreement(request, accelerator)
        try:
            if first and self._validation_due(first) and not self._validated(first):
                self._validate(recorder, first)
            batches = iter(loader)
            passes = iter(sampler.passes)
            for step in range(first, config.max_train_steps):
                with memory_advice(config, self.device, step + 1):
                    rate = self._set_learning_rate(step)
                    chunks = iter(self._timesteps(step))
                    self.forward.first = FirstStep(accelerator) if step == 0 else None
                    for number in range(config.gradient_accumulation_steps):
                        if number == config.gradient_accumulation_steps - 1:
                            agreement.ask()
                        with accelerator.accumulate(self.policy):
                            self._pass(PairBatch.of_items(next(batches)), next(chunks), sampler.positions(next(passes)))
                    if self.forward.first is not None:
                        self._check_start(self.forward.first)
                    self._update()
                recorder.advance()
                if self._after(recorder, step + 1, rate, agreement):
                    if self.alarms:
                        raise TrainingAlarmError(step + 1, self.saved, self.alarms)
                    raise TrainingInterruptedError(step + 1, self.saved, request.signal)
        finally:
            recorder.close()
        average = self.average.tensors() if self.average is not None else None
        history, lines = recorder.history, recorder.validation
        return TrainingResult(config.max_train_steps, history, config.metrics_path, self.saved, lines, average)

    # ---- One step ----

    def _timesteps(self, step: int) -> list[Tensor]:
        """This process's timesteps of each pass of an optimiser step."""
        config, world = self.config, self.accelerator.num_processes
        n = config.train_batch_size * config.gradient_accumulation_steps * world
        if self.informative is not None:
            timesteps = self.informative.sample(n, step)
        else:
            timesteps = step_timesteps(self.forward.schedule, n, step, config.seed, config.timestep_distribution)
        return list(timesteps.split(config.train_batch_size)[self.accelerator.process_index :: world])

    def _pass(self, batch: PairBatch, timesteps: Tensor, positions: range) -> None:
        """Forward and backward of ``B`` pairs."""
        config = self.config
        if batch.mode is not BatchMode.FRESH_DRAWS:
            if self.informative is not None:
                raise ValueError("timestep_sampling='informative': the items have draws of their own, expected 'all'")
        elif config.proportion_empty_prompts:
            empty = self.dataset.unconditional  # type: ignore[attr-defined]
            drop_captions(batch.condition, empty, positions, config.seed, config.proportion_empty_prompts)
        totals = self._totals() if self.adds else None
        output, levels = self.forward(self.policy, batch, positions, timesteps, seed=config.seed, totals=totals)
        if self.informative is not None:
            self.informative.add(levels, output)
        if self.statistics is not None and not self.adds:
            self.statistics.add(levels, output, batch.chosen.shape)
        if not config.skip_inactive or self._active(output):
            self.accelerator.backward(output.loss)
            self.backwards += 1
        else:
            self.skipped += 1
            reshard(self.policy)
        if not self.adds:
            self.window.add(output.metrics())

    def _check_start(self, first: FirstStep) -> None:
        """Compares policy and reference before any weight moves."""
        self.forward.first = None
        self.start = first.read()
        main = self.accelerator.is_main_process
        if self.config.progress is not None and main:
            difference, logit = (self.start[name] for name in NAMES)
            say(f"step 1: policy and reference differ by {difference:.2g}, logits by {logit:.2g}")
        beyond, message = first.judge(self.start)
        if message is None or self.config.alarms == "off":
            return
        if beyond and self.mismatch == "raise":
            raise TrainingMismatchError(f"step 1: {message}; alarms='off' trains all the same")
        if main:
            warnings.warn(f"step 1: {message}", TrainingWarning, stacklevel=2)

    def _totals(self) -> Totals:
        """Where the metrics of a pass go, and its statistics by noise level."""
        metrics = self.window.totals
        return Totals(metrics) if self.statistics is None else self.statistics.totals(metrics)

    def _active(self, output: PairLossResult) -> bool:
        """Whether a backward pass is due: for a pair of any process, or to reduce the gradients of earlier passes."""
        world = self.accelerator.num_processes
        if world > 1 and self.backwards and self.accelerator.sync_gradients:
            return True
        mask = getattr(output, "mask", None)
        if mask is None:
            raise ValueError(f"skip_inactive=True: {type(output).__name__} has no mask, expected a loss that masks")
        active = mask.sum()
        return bool(self.accelerator.reduce(active, reduction="sum") if world > 1 else active)

    def _update(self) -> None:
        """Clips and applies the accumulated gradient, or none where it is not finite."""
        if not self.backwards:  # a gradient of zero is not the same as none: moments and weight decay go on
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)
        self.backwards = 0
        limit = math.inf if self.config.max_grad_norm is None else self.config.max_grad_norm
        norm: Any = self.accelerator.clip_grad_norm_(self.parameters, limit)
        broken = ~self.window.add_step(whole(norm))
        if self.device.type not in ASKED or broken:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    local(parameter.grad).masked_fill_(broken, 0.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update()

    def _set_learning_rate(self, step: int) -> float:
        """A function of the step alone, so that there is no scheduler to save."""
        factor = rate_factor(self.config, step)
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * factor
        return float(self.base_rates[0]) * factor

    # ---- After a step ----

    def _after(self, recorder: Recorder, done: int, rate: float, agreement: StopAgreement) -> bool:
        """Log, checkpoint and validation, each where due and in this order; returns whether to stop here."""
        config = self.config
        last = done == config.max_train_steps
        asked = agreement.answer()
        # The first step always has a line: there the policy still is the reference, and a wrong
        # set-up shows.
        if last or done == 1 or done % config.logging_steps == 0:
            self._log(recorder, done, rate)
        # Samples or a validation may run out of memory or time: what has been trained is saved before.
        saved = bool(config.checkpointing_steps) and (last or done % config.checkpointing_steps == 0)
        if saved or asked or self.alarms:
            saved = self._save(done)
        if self._validation_due(done) and (last or not asked):
            self._validate(recorder, done)
            if not last:  # it may have taken long
                agreement.ask()
                asked = agreement.answer()
                if asked and not saved:
                    self._save(done)
        return not last and (asked or bool(self.alarms))

    def _validation_due(self, step: int) -> bool:
        every = self.config.validation_steps
        return bool(every) and (step == self.config.max_train_steps or step % every == 0)

    def _validate(self, recorder: Recorder, step: int) -> None:
        recorder.write_validation(step, self.validation(self.policy, step, self.network))

    def _validated(self, step: int) -> bool:
        """Whether the log has the validation of the step that a run was resumed from; every process calls it."""

        def look() -> bool:
            path = self.config.metrics_path
            return any(line["step"] == step for kind in ("validation", "hook") for line in read_lines(path, kind))

        return from_main(self.accelerator, look)

    def _log(self, recorder: Recorder, step: int, rate: float) -> None:
        """Writes a line, and notes an alarm that the run is to stop for."""
        # Not at the first and last line: what is drawn next must not depend on where a run began or ended.
        informative = self.informative if step % self.config.logging_steps == 0 else None
        windows = [taker.window.flatten() for taker in (informative, self.statistics) if taker is not None]
        metrics, row, sums = self.window.read(self.accelerator, torch.cat(windows) if windows else None)
        if informative is not None:
            informative.absorb(sums[: informative.window.numel()])
            del sums[: informative.window.numel()]
        metrics["learning_rate"] = rate
        metrics |= self.start
        self.start = {}
        if self.informative is not None:
            metrics["timestep_share"] = self.informative.share
        if self.config.skip_inactive:
            metrics["skipped_passes"], self.skipped = self.skipped, 0
        recorder.write(step, metrics, None if self.statistics is None else self.statistics.take(step, sums))
        if row >= self.config.max_nonfinite_steps:
            raise TrainingDivergedError(
                f"step {step}: {row} optimiser steps in a row had a non-finite gradient, expected fewer than "
                f"max_nonfinite_steps={self.config.max_nonfinite_steps}; see {self.config.metrics_path}"
            )
        messages = self.watch.update(metrics) if self.config.alarms != "off" else []
        if (
            self.config.alarms == "stop" and step < self.config.max_train_steps
        ):  # after the last there is nothing to stop
            self.alarms, messages = messages, []
        for message in messages if self.accelerator.is_main_process else ():
            warnings.warn(f"step {step}: {message}", TrainingWarning, stacklevel=2)

    # ---- Checkpoints ----

    def _save(self, step: int) -> bool:
        """Writes a checkpoint, where one can be written; returns whether."""
        window = self.window.state()
        progress: dict[str, Any] = {"alarms": self.watch.lines, "skipped": self.skipped}
        if self.informative is not None:
            window["ratios"] = self.informative.window
            progress["timesteps"] = self.informative.progress()
        if self.statistics is not None:
            window["statistics"] = self.statistics.window
        self.saved = checkpoint.save(
            self.config.checkpoints,
            step=step,
            identity=self.identity,
            model=self.network,
            optimizer=self.optimizer,
            average=self.average,
            window=window,
            progress=progress,
            keep=self.config.checkpoints_total_limit,
            accelerator=self.accelerator,
        )
        return True

    def _resume(self, source: str | Path) -> int:
        step = checkpoint.load(
            source,
            self.config.checkpoints,
            identity=self.identity,
            model=self.network,
            optimizer=self.optimizer,
            average=self.average,
            restore=self._restore,
            accelerator=self.accelerator,
        )
        if (
            step > self.config.max_train_steps
        ):  # as many is a run that was stopped between its last step and what comes after
            raise ValueError(
                f"max_train_steps={self.config.max_train_steps}: the checkpoint has {step} already, expected at least as many"
            )
        return step

    def _restore(self, window: dict[str, Tensor], progress: dict[str, Any]) -> None:
        for name, tensor in window.items():
            if tensor.dtype != torch.float32:
                raise ValueError(f"window.{name} is {tensor.dtype}, expected float32")
        self.window.restore(window)
        self.watch.lines |= progress["alarms"]
        self.skipped = progress["skipped"]
        if self.statistics is not None and "statistics" in window:
            if window["statistics"].shape != self.statistics.window.shape:
                raise ValueError(f"window.statistics has shape {[*window['statistics'].shape]}, expected this run's")
            self.statistics.window = window["statistics"].to(self.device)
        if self.informative is not None:
            self.informative.restore(progress["timesteps"], window["ratios"])


def _describe(loss_fn: PairLoss) -> Any:
    """What a resumed run's loss must share; JSON values."""
    if isinstance(loss_fn, SIPOLoss):
        return loss_fn.settings()
    return repr(loss_fn) if isinstance(loss_fn, nn.Module) else type(loss_fn).__name__
