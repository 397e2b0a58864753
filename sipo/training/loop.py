"""The training loop: preference pairs to an aligned policy.

One forward of the policy serves chosen and rejected samples, which share noise and noise level; the reference runs
without gradients, or not at all. The host waits for the device when a log line is due. With several processes it also
waits, at the end of each step, until the device has begun the step's last pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sipo.batch import BatchMode, PairBatch
from sipo.locks import locked
from sipo.processes import from_main
from sipo.protocols import PairDataset, PairLoss, PairLossResult, Predict
from sipo.schedule import schedule_for
from sipo.seeds import RandomStream, derive_seed, seed_process
from sipo.training import checkpoint
from sipo.training.alarms import AlarmWatch
from sipo.training.config import (
    TrainingAlarmError,
    TrainingConfig,
    TrainingDivergedError,
    TrainingInterruptedError,
    TrainingWarning,
)
from sipo.training.first_step import FirstStep, Mismatch, check_start
from sipo.training.forward import PairForward, ReferenceModel
from sipo.training.log import Recorder
from sipo.training.log_reader import read_metrics
from sipo.training.measurements import Measurements
from sipo.training.optimization import WeightUpdates, make_optimizer
from sipo.training.preparation import check_setup, make_accelerator, prepare
from sipo.training.run_folder import earlier_run
from sipo.training.sharding import reshard, unwrapped
from sipo.training.stopping import StopAgreement, StopRequest, memory_advice
from sipo.training.stream import StreamSampler, drop_captions, pair_loader, step_levels
from sipo.training.validation import OnValidation, Validation


@dataclass(frozen=True)
class TrainingResult:
    """The result of a run.

    The policy passed to :func:`train` holds the trained weights; under FSDP2 each process holds its part.

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

    A step whose gradient is not finite counts as one with a gradient of zero: the weights move only by what the
    optimiser does without a gradient (momentum, weight decay). The choice is made on the device.

    At a step where both are due, the checkpoint is written before the validation. A run resumed from that checkpoint
    does the validation first, where its log has none of that step.

    Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2 lets the step finish and writes a checkpoint; a validation that is due
    is left to the resumed run. One process stops at the step it is in, several at this step or the next.

    Args:
        policy: trained where ``requires_grad`` is set; moved to the accelerator's device.
        reference: what the policy is compared with: a frozen copy of it; :class:`AdapterOff` for LoRA; or ``None``
            where the items carry its errors. A copy is moved to the device and set to eval mode, and may be bfloat16;
            FSDP2 with mixed precision makes it so.
        loss_fn: the loss; training uses its ``schedule``.
        dataset: the pairs.
        predict: calls a network; see :class:`Predict`.
        config: all other settings.
        optimizer: of the policy's parameters; made from ``config`` if left out.
        accelerator: made from ``config`` if left out. One made by the caller sets the device and mixed precision, and
            must have ``gradient_accumulation_steps=config.gradient_accumulation_steps``.
        resume_from: a checkpoint's folder, or "latest" for the newest sound one in ``config.checkpoints``.
        validation: held-out pairs, measured every ``config.validation_steps`` steps.
        on_validation: called at the same steps, for instance to draw samples; see :data:`OnValidation`.
        offload_reference: keep a frozen copy in host memory while it is not running.
        identity: further JSON values that a resumed run must share with the one it continues.
        mismatch: what to do where policy and reference differ before the first step by more than their types round
            (docs/math.md §8): "warn", or "raise" before any weight moves, for runs where both start from the same
            weights. With ``alarms="off"`` neither happens.

    Raises:
        TypeError, ValueError: arguments that cannot be trained with, or a folder that holds another run.
        ImportError: an optimiser or a tracker that is not installed.
        LockedError: another process is writing to ``config.folder``.
        CheckpointError: a checkpoint that is absent, damaged or of another run.
        TrainingDivergedError: too many non-finite steps in a row.
        TrainingMismatchError: ``mismatch="raise"``, and policy and reference differ before the first step.
        TrainingAlarmError: ``alarms="stop"``, and an alarm went off.
        TrainingInterruptedError: asked to stop.
        TrainingOutOfMemoryError: the device's memory is too small; says what to lower.
    """
    if accelerator is None:
        accelerator = make_accelerator(config)
    check_setup(policy, reference, dataset, config, accelerator)
    with locked(config.folder, f"training.output_dir={str(config.output_dir)!r}", accelerator=accelerator):
        # The main process decides: on a network folder others may still see what it has removed.
        earlier = from_main(accelerator, lambda: earlier_run(config))
        if resume_from is None and earlier:
            ways = "resume_from or another output_dir" if earlier.checkpoints else "another output_dir"
            raise ValueError(f"output_dir={str(config.output_dir)!r} holds a run already ({earlier}), expected {ways}")
        if config.validation_steps and validation is None and on_validation is None:
            raise ValueError(f"validation_steps={config.validation_steps}: expected pairs to validate on, or a hook")
        if validation is not None and len(validation) == 0:
            raise ValueError("the validation set holds 0 pairs, expected at least 1")
        forward = PairForward(loss_fn, predict, reference, accelerator, offload=offload_reference)
        validate = Validation(validation, on_validation, forward, config, accelerator)
        loop = TrainingLoop(policy, forward, dataset, validate, config, optimizer, accelerator, mismatch)
        loop.identity |= identity or {}
        with StopRequest(accelerator.num_processes) as request:
            return loop.run(resume_from, request)


class TrainingLoop:
    """The loop of one :func:`train` call: :meth:`run` takes the steps; :meth:`_after` logs, saves and validates."""

    recorder: Recorder
    agreement: StopAgreement

    def __init__(
        self,
        policy: nn.Module,
        forward: PairForward,
        dataset: PairDataset,
        validation: Validation,
        config: TrainingConfig,
        optimizer: Any,
        accelerator: Accelerator,
        mismatch: Mismatch,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.forward = forward
        self.dataset = dataset
        self.validation = validation
        self.mismatch = mismatch
        self.network = unwrapped(policy)
        # Before the optimiser is made, so that it holds the parameters where they will be trained.
        policy.to(self.device).train()
        if optimizer is None:
            optimizer = make_optimizer(config, [p for p in policy.parameters() if p.requires_grad], self.device)
        self.policy, self.optimizer = prepare(policy, optimizer, config, accelerator)
        self.updates = WeightUpdates(self.network, self.optimizer, config, accelerator)
        self.measured = Measurements(forward.loss_fn, config, self.device)
        self.watch = AlarmWatch()
        self.alarms: list[str] = []  # that the run stops for
        self.levels: dict[tuple[int, ...], Tensor] = {}  # of this step's pairs, as if they had one size, by that size
        self.backwards = 0  # in this step
        self.saved: Path | None = None
        self.start: dict[str, float] = {}  # for the first log line
        self.identity = checkpoint.run_identity(config, forward.loss_fn, dataset, accelerator.num_processes)

    def run(self, resume_from: str | Path | None, request: StopRequest) -> TrainingResult:
        """Trains from the start or a checkpoint to the last step."""
        config, accelerator = self.config, self.accelerator
        seed_process(config.seed, accelerator.process_index)
        accelerator.step = 0  # of accumulation; a run that broke off may have left it in mid-step
        first = 0 if resume_from is None else self._resume(resume_from)
        self.recorder = Recorder(config, first, accelerator)
        self.agreement = StopAgreement(request, accelerator)
        try:
            if first and self._validation_due(first) and not self._validated(first):
                self._validate(first)
            batches = self._batches(first)
            for step in range(first, config.max_train_steps):
                with memory_advice(config, self.device, step + 1):
                    rate = self._step(step, batches)
                self.recorder.advance()
                if self._after(step + 1, rate):
                    assert self.saved is not None
                    if self.alarms:
                        raise TrainingAlarmError(step + 1, self.saved, self.alarms)
                    raise TrainingInterruptedError(step + 1, self.saved, request.signal)
        finally:
            self.recorder.close()
        ema = None if self.updates.average is None else self.updates.average.tensors()
        history, lines = self.recorder.history, self.recorder.validation
        return TrainingResult(config.max_train_steps, history, config.metrics_path, self.saved, lines, ema)

    def _batches(self, first: int) -> Iterator[tuple[PairBatch, range]]:
        """This process's batches from step ``first`` on, with the pairs' positions in the run's stream."""
        config, accelerator = self.config, self.accelerator
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
        # The loader draws a seed from it whenever it starts, and a resumed run starts it again.
        generator = torch.Generator().manual_seed(derive_seed(config.seed, RandomStream.WORKERS, first))
        loader = pair_loader(self.dataset, sampler, config, self.device, generator)
        for items, number in zip(loader, sampler.passes, strict=True):
            yield PairBatch.of_items(items), sampler.positions(number)

    # ---- One step ----

    def _step(self, step: int, batches: Iterator[tuple[PairBatch, range]]) -> float:
        """Takes one optimiser step of several passes; returns its learning rate."""
        config = self.config
        rate = self.updates.set_rate(step)
        self.levels.clear()
        self.forward.first = FirstStep(self.accelerator) if step == 0 else None
        for number in range(config.gradient_accumulation_steps):
            if number == config.gradient_accumulation_steps - 1:
                self.agreement.ask()
            with self.accelerator.accumulate(self.policy):
                batch, positions = next(batches)
                self._pass(batch, positions, self._levels(step, number, batch))
        if self.forward.first is not None:
            self.start = check_start(self.forward.first, config, self.mismatch)
            self.forward.first = None
        self.updates.apply(self.measured, gradient=self.backwards > 0)
        self.backwards = 0
        return rate

    def _levels(self, step: int, number: int, batch: PairBatch) -> Tensor:
        """This process's noise levels in a pass of an optimiser step, whose draws are the same whatever the size."""
        config, world = self.config, self.accelerator.num_processes
        size = batch.chosen.shape[-2:]
        if size not in self.levels:
            schedule = schedule_for(self.forward.schedule, batch.chosen)
            n = config.pairs_in_step(world)
            if self.measured.informative is not None:
                self.levels[size] = self.measured.informative.sample(schedule, n, step)
            else:
                self.levels[size] = step_levels(schedule, n, step, config.seed, config.timestep_distribution)
        return self.levels[size].split(config.train_batch_size)[number * world + self.accelerator.process_index]

    def _pass(self, batch: PairBatch, positions: range, levels: Tensor) -> None:
        """Runs forward and backward of ``B`` pairs."""
        config = self.config
        if batch.mode is not BatchMode.FRESH_DRAWS:
            if self.measured.informative is not None:
                raise ValueError("timestep_sampling='informative': the items have draws of their own, expected 'all'")
        elif config.proportion_empty_prompts:
            empty = self.dataset.unconditional  # type: ignore[attr-defined]
            drop_captions(batch.condition, empty, positions, config.seed, config.proportion_empty_prompts)
        totals = self.measured.totals()
        output, levels = self.forward(self.policy, batch, positions, levels, seed=config.seed, totals=totals)
        if not config.skip_inactive or self._active(output):
            self.accelerator.backward(output.loss)
            self.backwards += 1
        else:
            self.measured.skipped += 1
            reshard(self.policy)
        self.measured.add(output, levels, batch.chosen.shape)

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

    # ---- After a step ----

    def _after(self, done: int, rate: float) -> bool:
        """Logs, writes a checkpoint and validates, each where due, in this order; returns whether to stop here."""
        config = self.config
        last = done == config.max_train_steps
        asked = self.agreement.answer()
        # The first step always has a line: the policy still is the reference there, and a wrong set-up shows.
        if last or done == 1 or done % config.logging_steps == 0:
            self._log(done, rate)
        # Samples or a validation may run out of memory or time: what has been trained is saved before.
        saves = bool(config.checkpointing_steps) and (last or done % config.checkpointing_steps == 0)
        saves = saves or asked or bool(self.alarms)
        if saves:
            self._save(done)
        if self._validation_due(done) and (last or not asked):
            self._validate(done)
            if not last:  # it may have taken long
                self.agreement.ask()
                asked = self.agreement.answer()
                if asked and not saves:
                    self._save(done)
        return not last and (asked or bool(self.alarms))

    def _log(self, step: int, rate: float) -> None:
        """Writes a line, and notes an alarm that the run is to stop for."""
        config = self.config
        line = self.measured.read(step, self.accelerator, {"learning_rate": rate, **self.start})
        self.start = {}
        self.recorder.write(step, line.metrics, line.statistics)
        if line.nonfinite_row >= config.max_nonfinite_steps:
            raise TrainingDivergedError(
                f"step {step}: {line.nonfinite_row} optimiser steps in a row had a non-finite gradient, expected fewer "
                f"than max_nonfinite_steps={config.max_nonfinite_steps}; see {config.metrics_path}"
            )
        messages = self.watch.update(line.metrics) if config.alarms != "off" else []
        if config.alarms == "stop" and step < config.max_train_steps:  # after the last there is nothing to stop
            self.alarms, messages = messages, []
        for message in messages if self.accelerator.is_main_process else ():
            warnings.warn(f"step {step}: {message}", TrainingWarning, stacklevel=2)

    def _validation_due(self, step: int) -> bool:
        every = self.config.validation_steps
        return bool(every) and (step == self.config.max_train_steps or step % every == 0)

    def _validate(self, step: int) -> None:
        self.recorder.write_validation(step, self.validation(self.policy, step, self.network))

    def _validated(self, step: int) -> bool:
        """Whether the log has the validation of the step that a run was resumed from; every process calls it."""

        def is_logged() -> bool:
            path = self.config.metrics_path
            return any(line["step"] == step for kind in ("validation", "hook") for line in read_metrics(path, kind))

        return from_main(self.accelerator, is_logged)

    # ---- Checkpoints ----

    def _save(self, step: int) -> None:
        window, progress = self.measured.state()
        self.saved = checkpoint.save_checkpoint(
            self.config.checkpoints,
            step=step,
            identity=self.identity,
            model=self.network,
            optimizer=self.optimizer,
            average=self.updates.average,
            window=window,
            progress=progress | {"alarms": self.watch.lines},
            keep=self.config.checkpoints_total_limit,
            accelerator=self.accelerator,
        )

    def _resume(self, source: str | Path) -> int:
        """Restores a checkpoint; returns the steps done."""

        def restore(window: dict[str, Tensor], progress: dict[str, Any]) -> None:
            self.measured.restore(window, progress)
            self.watch.lines |= progress["alarms"]

        step = checkpoint.load_checkpoint(
            source,
            self.config.checkpoints,
            identity=self.identity,
            model=self.network,
            optimizer=self.optimizer,
            average=self.updates.average,
            restore=restore,
            accelerator=self.accelerator,
        )
        most = self.config.max_train_steps
        if step > most:  # as many: a run that was stopped between its last step and what comes after
            raise ValueError(f"max_train_steps={most}: the checkpoint has {step} already, expected at least as many")
        return step
