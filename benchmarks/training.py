"""Whole optimiser steps of ``sipo.training`` beside a hand-written loop's: ``python -m benchmarks.training``.

A step is everything from one update of the weights to the next: loading the batch, noise, forward passes, loss,
backward, clipping, AdamW and, in ours, metrics and log lines (one in ten steps; no progress bar, no TensorBoard). The
hand-written loop (``training_baseline.py``) has the published loss and no log at all. All of them train the same networks
with the same AdamW on the same pairs, in chunks of some steps, in an order drawn anew each round. ``ratio`` is the mean
step of a chunk over the mean step of the hand-written loop's chunk in the same round: log lines count, and a slow moment
of the machine meets both.

First of all, a process of its own trains for ``--steps`` steps and says how much memory it has on the way. Before anything is timed, each implementation's gradient is compared with the hand-written loop's on the same draws.
Timings are results, never assertions.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import importlib.util
import itertools
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import baselines, measure
from benchmarks.footprint import extra_memory_mb
from benchmarks.machine import OthersLoad
from benchmarks.suite import default_output
from benchmarks.training_baseline import MAX_GRAD_NORM, diffusion_dpo, hand_written
from benchmarks.training_memory import growth, print_growth
from benchmarks.training_setup import Setup, TrainingCase, frozen_copy, lora_networks, make_setup
from sipo import SIPOLoss

SKIPPED = 5  # first steps of a chunk that do not count: the iterator starts, the first log line is written
LOG_EVERY = 10
COUNTED = 2 * LOG_EVERY  # whole rounds of log lines
MIN_ROUNDS = 3
LEARNING_RATE = 1e-6  # the policy hardly moves: the last step costs what the first did
BETA = {"sd15": 5000.0, "wan": 2000.0}
MAX_ERROR = {"no": 1e-3, "bf16": 0.05}  # of a gradient, relative
PERTURBED = 1e-3  # for the comparison of gradients: a policy that is not its reference
SECONDS = {"cpu": 120.0, "cuda": 60.0}


@dataclass(frozen=True)
class Way:
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
WAYS = [
    Way(HAND, ours=False, method="diffusion_dpo"),
    Way("hand-written, AdamW as torch makes it", ours=False, method="diffusion_dpo", fused=False),
    Way("ours, Diffusion-DPO, frozen copy", method="diffusion_dpo", target=1.0),
    Way("ours, SIPO, frozen copy", target=1.0),
    Way("ours, SIPO, reference errors", reference="errors", target=0.8),
    Way(HAND_LORA, ours=False, method="diffusion_dpo", lora=True),
    Way("ours, LoRA, SIPO, adapter off", lora=True, reference="adapter_off", target=1.0),
]

_WAN_WIDTH = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "text_dim": 1536}
CASES = {
    "cpu": [
        TrainingCase("SD1.5, toy", "sd15", 4, {"block_out_channels": (32, 64)}, pixels=(128, 128, 1)),
        TrainingCase(
            "Wan, toy", "wan", 2,
            {"num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 512, "num_layers": 3}, pixels=(64, 64, 9),
        ),
    ],
    "cuda": [
        TrainingCase(
            "SD1.5 at 512 pixels, one layer in each block", "sd15", 4,
            {"layers_per_block": 1, "cross_attention_dim": 768},
            sample=(4, 64, 64), text=(77, 768), precision="bf16",
        ),
        TrainingCase(
            "Wan 480p, 1.3B's width with 2 of 30 layers", "wan", 1, {**_WAN_WIDTH, "num_layers": 2},
            sample=(16, 21, 60, 104), text=(512, 1536), precision="bf16",
        ),
    ],
}  # fmt: skip
TINY = [
    TrainingCase("SD1.5, tiny", "sd15", 2, pixels=(32, 32, 1)),
    TrainingCase("Wan, tiny", "wan", 2, pixels=(32, 32, 5)),
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
        """Milliseconds of each counted step, on the device (on a CPU the host's) and on the host; starts anew."""
        host = [1e3 * (end - begin) for begin, end in itertools.pairwise(self.host)]
        device = host
        if self.on_gpu:
            torch.cuda.synchronize()
            device = [begin.elapsed_time(end) for begin, end in itertools.pairwise(self.events)]
        self.host, self.events = [], []
        counted = slice(SKIPPED, SKIPPED + COUNTED)
        return device[counted], host[counted]


@dataclass
class Trained:
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
        self.trained = {False: Trained(copy.deepcopy(setup.base).requires_grad_(True), frozen_copy(setup))}
        self.missing: dict[str, str] = {}
        try:
            self.trained[True] = Trained(*lora_networks(setup, device))
        except ImportError as error:
            self.missing = {way.name: str(error) for way in WAYS if way.lora}
        if importlib.util.find_spec("accelerate") is None:
            self.missing |= {way.name: "accelerate is not installed" for way in WAYS if way.ours}
        self.ways = [way for way in WAYS if way.name not in self.missing]
        self.optimizers: dict[tuple[bool, bool], torch.optim.Optimizer] = {}
        for key in dict.fromkeys((way.lora, way.fused) for way in self.ways):
            options = {"fused": True} if key[1] else {}
            optimizer = torch.optim.AdamW(self.trained[key[0]].parameters, lr=LEARNING_RATE, **options)
            optimizer.register_step_post_hook(self.clock)
            self.optimizers[key] = optimizer
        self.levels: tuple[Tensor, Tensor] | None = None
        if setup.schedule.kind == "discrete":
            alpha, sigma = setup.schedule.alpha_sigma(torch.arange(setup.schedule.num_train_timesteps))
            self.levels = alpha.float().to(device), sigma.float().to(device)

    def run(self, way: Way, steps: int, *, pairs: Any = None, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Trains for some steps; on the case's pairs and with the way's AdamW unless others are given."""
        setup, case, trained = self.setup, self.setup.case, self.trained[way.lora]
        if pairs is None:
            pairs = setup.with_errors if way.reference == "errors" else setup.pairs
        optimizer = optimizer or self.optimizers[way.lora, way.fused]
        options: dict[str, Any] = {"steps": steps, "batch_size": case.batch_size}
        if not way.ours:
            hand_written(
                trained.policy, trained.reference, pairs, setup.predict, self.levels, self._plain_loss(way), optimizer,
                device=self.device, precision=case.precision, **options,
            )  # fmt: skip
            return
        from accelerate import Accelerator

        from sipo.families.tuning import adapter_off
        from sipo.training import AdapterOff, TrainingConfig, train

        references = {"copy": trained.reference, "errors": None, "adapter_off": AdapterOff(adapter_off)}
        config = TrainingConfig(
            output_dir=self.folder / "run", max_grad_norm=MAX_GRAD_NORM, mixed_precision=case.precision,  # type: ignore[arg-type]
            log_every=LOG_EVERY, progress=False, tensorboard=False, **options,
        )  # fmt: skip
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

    def gradient(self, way: Way) -> Tensor:
        """The clipped gradient ``[P]`` of one step on fixed draws; weights stay as they are."""
        items = sorted(range(len(self.setup.drawn)), key=lambda i: -float(self.setup.drawn[i]["timestep"]))
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
        found, failed = {}, {}
        limit = MAX_ERROR[self.setup.case.precision]
        for lora, trained in self.trained.items():
            kept = [p.detach().clone() for p in trained.parameters]
            with torch.no_grad():
                for p in trained.parameters:
                    p += PERTURBED * torch.randn_like(p)
            for way in self.ways:
                if way.lora != lora:
                    continue
                true = self.gradient(Way("", ours=False, method=way.method, lora=lora))
                try:
                    error = float((self.gradient(way) - true).norm() / true.norm())
                except Exception as problem:  # whatever an implementation dies of is a result, not the benchmark's end
                    failed[way.name] = f"{type(problem).__name__}: {(str(problem) or '?').splitlines()[0][:200]}"
                    continue
                found[way.name] = error
                if not error <= limit:  # NaN is no number below the limit
                    failed[way.name] = f"wrong gradient, not timed: relative error {error:.3g}"
            with torch.no_grad():
                for p, value in zip(trained.parameters, kept, strict=True):
                    p.copy_(value)
        return found, failed

    def resident_mb(self, way: Way) -> float:
        """Weights, reference and AdamW's moments between two steps, in MB (1e6 bytes)."""
        trained = self.trained[way.lora]
        tensors: list[Any] = [*trained.policy.parameters(), *trained.policy.buffers()]
        if way.reference == "copy":
            tensors += [*trained.reference.parameters(), *trained.reference.buffers()]
        for state in self.optimizers[way.lora, way.fused].state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
        return sum(t.nbytes for t in tensors) / 1e6

    def _plain_loss(self, way: Way) -> Any:
        beta, schedule = BETA[self.setup.case.family], self.setup.schedule
        if way.method == "diffusion_dpo":
            return lambda model, ref, target, timesteps: diffusion_dpo(model, ref, target, beta)
        return lambda model, ref, target, timesteps: baselines.upcast(
            model, ref, target, schedule.ratio_scale(timesteps).float(), beta
        )


def measure_case(
    case: TrainingCase, device: str, seconds: float, folder: Path
) -> tuple[dict[str, Any], dict[str, str]]:
    """One entry of the results file, and the implementations that were left out: name → why.

    Raises:
        ImportError: a package is missing that the case needs.
    """
    setup = make_setup(case, device, folder)
    bench = Bench(setup, device, folder)
    gradient_errors, failed = bench.errors()
    calls = {way.name: functools.partial(bench.run, way) for way in bench.ways if way.name not in failed}
    load = OthersLoad()
    rounds = _rounds(calls, bench.clock, seconds)
    entry: dict[str, Any] = {
        "label": case.label,
        "network": setup.network,
        "parameters": sum(p.numel() for p in setup.base.parameters()),
        "pairs": case.batch_size,
        "sample": list(setup.pairs[0]["winner"].shape),
        "precision": case.precision,
        "others_cores": load.cores(),
        "rounds": len(next(iter(rounds.values()), [])),
        "results": {},
    }
    for way in bench.ways:
        if way.name not in rounds:
            continue
        chunks, base = rounds[way.name], rounds.get(HAND_LORA if way.lora else HAND)
        result: dict[str, Any] = {
            "step_ms": measure.summary([step for chunk, _ in chunks for step in chunk]),
            "host_ms": measure.summary([step for _, chunk in chunks for step in chunk]) if device == "cuda" else None,
            "gradient_error": gradient_errors[way.name],
            "resident_mb": bench.resident_mb(way),
            "step_mb": extra_memory_mb(functools.partial(bench.run, way, 2), device=device),
        }
        result["peak_mb"] = result["resident_mb"] + result["step_mb"]
        if base is not None:
            each = zip(chunks, base, strict=True)
            ratio = measure.summary([sum(ours) / sum(hand) for (ours, _), (hand, _) in each])
            result.update(ratio=ratio, target=way.target)
            result["met"] = None if way.target is None else ratio["median"] <= way.target
        entry["results"][way.name] = result
    return entry, bench.missing | failed


def _rounds(
    calls: dict[str, Callable[[int], None]], clock: Clock, seconds: float
) -> dict[str, list[tuple[list[float], list[float]]]]:
    """Name → for each round, milliseconds of each counted step on the device and on the host."""
    chunk = SKIPPED + COUNTED + 1
    order, draw = list(calls), random.Random(0)
    for call in calls.values():  # what is made once: AdamW's moments, buffers, modules
        call(SKIPPED)
    clock.steps()
    found: dict[str, list[tuple[list[float], list[float]]]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for done in itertools.count():
        spent = time.perf_counter() - begin
        # Another round only where it will end in time.
        if not calls or (done >= MIN_ROUNDS and spent * (done + 1) / done > seconds):
            return found
        draw.shuffle(order)
        for name in order:
            gc.collect()  # nobody pays for another's litter
            calls[name](chunk)
            found[name].append(clock.steps())
    raise AssertionError  # for the type checker: count has no end


def print_entry(entry: dict[str, Any]) -> None:
    """A line for each implementation: the step, over the hand-written loop's, memory."""
    shape = "×".join(map(str, entry["sample"]))
    print(
        f"\n{entry['label']}: {entry['network']}, {entry['parameters'] / 1e6:.2f}M parameters, {entry['pairs']} pairs of "
        f"{shape}, {entry['rounds']} rounds, others kept {entry['others_cores']} cores busy"
    )
    for name, result in entry["results"].items():
        low, high = result["step_ms"]["quartiles"]
        cells = [f"step {result['step_ms']['median']:8.2f} ms [{low:.2f}, {high:.2f}]"]
        if result["host_ms"] is not None:
            cells.append(f"host {result['host_ms']['median']:7.2f} ms")
        if "ratio" in result:
            low, high = result["ratio"]["quartiles"]
            cells.append(f"ratio {result['ratio']['median']:.3f} [{low:.3f}, {high:.3f}]")
        cells.append(f"peak {result['peak_mb']:.1f} MB, {result['resident_mb']:.1f} between steps")
        if result.get("met") is not None:
            cells.append(f"target {result['target']:.1f} {'met' if result['met'] else 'missed'}")
        print(f"  {name:38} {'  '.join(cells)}", flush=True)


def run(cases: Sequence[TrainingCase], device: str, seconds: float, steps: int, output: Path) -> dict[str, Any]:
    """Measures memory over ``steps`` steps and then ``cases``, ``seconds`` of timing each; returns the file's content."""
    begin = time.perf_counter()
    results: dict[str, Any] = {
        "kind": "training",
        "machine": measure.machine(device),
        "options": {"seconds": seconds, "steps": steps, "chunk": {"skipped": SKIPPED, "counted": COUNTED}},
        "complete": False,
        "memory": None,
        "cases": [],
        "skipped": [],
    }
    print(measure.caption(results["machine"]), flush=True)

    def skip(case: str, name: str, why: str) -> None:
        print(f"{case}: {name or 'every implementation'} is left out: {why}", flush=True)
        results["skipped"].append({"label": case, "implementation": name, "reason": why})

    if steps:
        results["memory"], why = growth(steps, device)
        if results["memory"] is None:
            skip("memory", "", why)
        else:
            print_growth(results["memory"])
        measure.write(results, output)
    for case in cases:
        entry, failed = None, {}
        with tempfile.TemporaryDirectory() as folder:
            try:
                entry, failed = measure_case(case, device, seconds, Path(folder))
            except torch.OutOfMemoryError as error:
                failed = {"": f"out of memory: {str(error).splitlines()[0][:200]}"}
            except ImportError as error:
                failed = {"": str(error)}
        gc.collect()
        if entry is not None:
            print_entry(entry)
            results["cases"].append(entry)
        for name, why in failed.items():
            skip(case.label, name, why)
        measure.write(results, output)
    results["complete"] = True
    measure.write(results, output)
    print(f"\n{len(results['cases'])} entries, {time.perf_counter() - begin:.0f} s: {output}")
    return results


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default=measure.default_device())
    parser.add_argument("--seconds", type=float, help="of timing for each case (default 120, on a GPU 60)")
    parser.add_argument("--steps", type=int, help="of the memory run (default 2000); 0 leaves it out")
    parser.add_argument("--quick", action="store_true", help="tiny networks and 200 steps, to see that it works")
    parser.add_argument("--output", type=Path, help="results file (default benchmarks/results/training-<device>.json)")
    args = parser.parse_args(argv)
    seconds = args.seconds if args.seconds is not None else (4.0 if args.quick else SECONDS[args.device])
    steps = args.steps if args.steps is not None else (200 if args.quick else 2000)
    output = args.output or default_output("training", args.device, partial=args.quick)
    run(TINY if args.quick else CASES[args.device], args.device, seconds, steps, output)


if __name__ == "__main__":
    main()
