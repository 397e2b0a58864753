"""The implementations that ``benchmarks.training`` compares, and what they train in turns."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import baselines
from benchmarks.training_baseline import MAX_GRAD_NORM, diffusion_dpo, hand_written
from benchmarks.training_setup import Setup, lora_networks, reference_for
from sipo import SIPOLoss
from sipo.batch import level_argument

SKIPPED = 5  # first steps of a chunk that do not count: the iterator starts, the first log line is written
LOG_EVERY = 10
COUNTED = 2 * LOG_EVERY  # whole rounds of log lines
LEARNING_RATE = 1e-6  # the policy hardly moves: the last step costs what the first did
BETA = {"sd15": 5000.0, "sdxl": 5000.0, "cogvideox": 2000.0, "wan": 2000.0}
MAX_ERROR = {"no": 1e-3, "bf16": 0.1}  # of a gradient, relative; bfloat16's own error against float32 is as large
PERTURBED = 1e-3  # for the comparison of gradients: a policy that is not its reference


@dataclass(frozen=True)
class Implementation:
    """One implementation.

    Attributes:
        name: in the results.
        ours: ``sipo.training.train``, or the hand-written loop.
        method: the loss.
        lora: adapters on a frozen network, or all weights.
        reference: "copy", "errors" or "adapter_off".
        fused: whether AdamW is one call, as our loop has it unless told otherwise; torch's own default is not.
        target: of its ratio, where the project has set itself one.
    """

    name: str
    ours: bool = True
    method: str = "sipo"
    lora: bool = False
    reference: str = "copy"
    fused: bool = True
    target: float | None = None


HAND, HAND_LORA = "hand-written, two networks", "hand-written LoRA, two networks"
IMPLEMENTATIONS = [
    Implementation(HAND, ours=False, method="diffusion_dpo"),
    Implementation("hand-written, AdamW as torch makes it", ours=False, method="diffusion_dpo", fused=False),
    Implementation("ours, Diffusion-DPO, frozen copy", method="diffusion_dpo", target=1.0),
    Implementation("ours, SIPO, frozen copy", target=1.0),
    Implementation("ours, SIPO, reference errors", reference="errors", target=0.8),
    Implementation(HAND_LORA, ours=False, method="diffusion_dpo", lora=True),
    Implementation("ours, LoRA, SIPO, adapter off", lora=True, reference="adapter_off", target=1.0),
]


class Clock:
    """The moments at which an optimiser has stepped: the host's, on a GPU also the device's."""

    def __init__(self, device: str) -> None:
        self.on_gpu = torch.device(device).type == "cuda"
        self.host: list[float] = []
        self.events: list[Any] = []

    def __call__(self, *_: object) -> None:
        self.host.append(time.perf_counter())
        if self.on_gpu:
            self.events.append(torch.cuda.Event(enable_timing=True))
            self.events[-1].record()

    def steps(self) -> tuple[list[float], list[float]]:
        """Milliseconds of each counted step, on the device (on a CPU the host's) and on the host; starts again."""
        host = [1e3 * (end - begin) for begin, end in itertools.pairwise(self.host)]
        device = host
        if self.on_gpu:
            torch.cuda.synchronize()
            device = [begin.elapsed_time(end) for begin, end in itertools.pairwise(self.events)]
        self.host, self.events = [], []
        counted = slice(SKIPPED, SKIPPED + COUNTED)
        return device[counted], host[counted]


@dataclass
class TrainedNetworks:
    """What one kind of tuning trains: shared by all implementations, which take turns."""

    policy: nn.Module
    reference: nn.Module

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.policy.parameters() if p.requires_grad]


class Bench:
    """A case's networks, data and optimisers; :meth:`run` trains for some steps in one of the ways."""

    def __init__(self, setup: Setup, device: str, folder: Path) -> None:
        self.setup, self.device, self.folder = setup, device, folder
        self.clock = Clock(device)
        self.trained = {
            False: TrainedNetworks(
                copy.deepcopy(setup.base).requires_grad_(True), reference_for(setup.base, setup.case)
            )
        }
        self.missing: dict[str, str] = {}
        try:
            self.trained[True] = TrainedNetworks(*lora_networks(setup, device))
        except ImportError as error:
            self.missing = {way.name: str(error) for way in IMPLEMENTATIONS if way.lora}
        if importlib.util.find_spec("accelerate") is None:
            self.missing |= {way.name: "accelerate is not installed" for way in IMPLEMENTATIONS if way.ours}
        self.implementations = [way for way in IMPLEMENTATIONS if way.name not in self.missing]
        self.optimizers: dict[tuple[bool, bool], torch.optim.Optimizer] = {}
        for key in dict.fromkeys((way.lora, way.fused) for way in self.implementations):
            fused = True if key[1] else None
            optimizer = torch.optim.AdamW(self.trained[key[0]].parameters, lr=LEARNING_RATE, fused=fused)
            optimizer.register_step_post_hook(self.clock)
            self.optimizers[key] = optimizer
        self.levels: tuple[Tensor, Tensor] | None = None
        if setup.schedule.kind == "discrete":
            alpha, sigma = setup.schedule.alpha_sigma(torch.arange(setup.schedule.num_train_timesteps))
            self.levels = alpha.float().to(device), sigma.float().to(device)

    def run(
        self, way: Implementation, steps: int, *, pairs: Any = None, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Trains for some steps; on the case's pairs and with the way's AdamW unless others are given."""
        setup, case, trained = self.setup, self.setup.case, self.trained[way.lora]
        if pairs is None:
            pairs = setup.with_errors if way.reference == "errors" else setup.pairs
        optimizer = optimizer or self.optimizers[way.lora, way.fused]
        if not way.ours:
            velocity = setup.schedule.prediction_type == "v_prediction"
            hand_written(
                trained.policy, trained.reference, pairs, setup.predict, self.levels, self._plain_loss(way), optimizer,
                device=self.device, precision=case.precision, steps=steps, batch_size=case.batch_size,
                velocity=velocity,
            )  # fmt: skip
            return
        from accelerate import Accelerator

        from sipo.families.tuning import adapter_off
        from sipo.training import AdapterOff, TrainingConfig, train

        references = {"copy": trained.reference, "errors": None, "adapter_off": AdapterOff(adapter_off)}
        shutil.rmtree(self.folder / "run", ignore_errors=True)  # of the chunk before: a folder with a run is refused
        config = TrainingConfig(
            output_dir=self.folder / "run", max_train_steps=steps, train_batch_size=case.batch_size,
            max_grad_norm=MAX_GRAD_NORM, mixed_precision=case.precision,  # type: ignore[arg-type]
            logging_steps=LOG_EVERY, progress=None, checkpointing_steps=0, report_to="none", alarms="off",
        )  # fmt: skip
        # No alarms: every chunk but the first goes on with a policy that has left its reference.
        train(
            trained.policy,
            references[way.reference],
            SIPOLoss(setup.schedule, method=way.method, beta=BETA[case.family]),
            pairs,
            setup.predict,
            config,
            optimizer=optimizer,
            accelerator=Accelerator(cpu=self.device == "cpu", mixed_precision=case.precision),
        )

    def gradient(self, way: Implementation) -> Tensor:
        """Returns the clipped gradient ``[P]`` of one step on fixed draws; weights stay as they are."""
        items = sorted(range(len(self.setup.drawn)), key=lambda i: -float(self.setup.drawn[i]["level"]))
        source = self.setup.with_errors if way.reference == "errors" else self.setup.drawn
        # The noisiest: there SIPO's mask lets pairs through.
        pairs = [source[i] for i in items[: self.setup.case.batch_size]]
        parameters = self.trained[way.lora].parameters
        optimizer = torch.optim.SGD(parameters, lr=0.0)
        found: list[Tensor] = []

        def keep(*_: object) -> None:
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            found.append(torch.cat([g.double().flatten() for g in gradients]))

        optimizer.register_step_pre_hook(keep)
        self.run(way, 1, pairs=pairs, optimizer=optimizer)
        return found[0]

    def errors(self) -> tuple[dict[str, float], dict[str, str]]:
        """Relative error of each way's gradient against the hand-written loop's, with SIPO's loss where the way has it.

        Taken with a policy that has moved a little, so that the reference counts. The second dictionary has the ways
        that are wrong or fail: name → why.
        """
        errors: dict[str, float] = {}
        failed: dict[str, str] = {}
        limit = MAX_ERROR[self.setup.case.precision]
        for lora, trained in self.trained.items():
            kept = [p.detach().clone() for p in trained.parameters]
            with torch.no_grad():
                for p in trained.parameters:
                    p.add_(torch.randn_like(p), alpha=PERTURBED)
            for way in self.implementations:
                if way.lora != lora:
                    continue
                true = self.gradient(Implementation("", ours=False, method=way.method, lora=lora))
                try:
                    error = float((self.gradient(way) - true).norm() / true.norm())
                except Exception as problem:  # whatever an implementation dies of is a result, not the benchmark's end
                    failed[way.name] = f"{type(problem).__name__}: {(str(problem) or '?').splitlines()[0][:200]}"
                    continue
                errors[way.name] = error
                if not error <= limit:  # NaN is no number below the limit
                    failed[way.name] = f"wrong gradient, not timed: relative error {error:.3g}"
            with torch.no_grad():
                for p, value in zip(trained.parameters, kept, strict=True):
                    p.copy_(value)
        return errors, failed

    def resident_mb(self, way: Implementation) -> float:
        """Returns the size of weights, reference and AdamW's moments between two steps, in MB (1e6 bytes)."""
        trained = self.trained[way.lora]
        tensors: list[Any] = [*trained.policy.parameters(), *trained.policy.buffers()]
        if way.reference == "copy":
            tensors += [*trained.reference.parameters(), *trained.reference.buffers()]
        for state in self.optimizers[way.lora, way.fused].state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
        return sum(t.nbytes for t in tensors) / 1e6

    def _plain_loss(self, way: Implementation) -> Any:
        beta, schedule = BETA[self.setup.case.family], self.setup.schedule
        if way.method == "diffusion_dpo":
            return lambda model, ref, target, levels: diffusion_dpo(model, ref, target, beta)
        return lambda model, ref, target, levels: baselines.upcast(
            model, ref, target, schedule.ratio_scale(**level_argument(schedule, levels)).float(), beta
        )
