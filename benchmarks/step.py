"""The loss's share of a whole training step: ``python -m benchmarks.step``.

A step is what preference training does: forward of the policy, forward of the frozen reference, loss, backward, AdamW.
The target is in float32, and the loss's upstream gradient 1/8, as for a pass of eight that make a step.
The network is diffusers' ``WanTransformer3DModel`` at reduced depth (on a CPU, also at reduced width and with a smaller
latent), so the shares here are upper bounds of those in a full network. Every loss takes its turn on the same network
and data, next to a step with a trivial loss. What a loss costs is told in two ways: the step's time minus that of the
trivial step (``difference_ms``, with a bootstrap interval: where it straddles 0, the loss does not show in a step),
and the loss's forward and backward timed by itself on the step's own tensors with cold caches (``direct_ms``).

The results file has the layout of ``benchmarks.suite``, with ``"kind": "step"``; timings are results, never assertions.
"""

from __future__ import annotations

import functools
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import baselines, timing
from benchmarks.cases import BETA, DTYPES, RATIO_SCALE, LossInputs
from benchmarks.footprint import extra_memory_mb
from benchmarks.machine import OthersLoad
from benchmarks.step_cases import CASES, TINY, StepCase
from benchmarks.step_network import make_network
from benchmarks.suite import MAX_ERROR, default_output, make_parser, new_results, run_cases
from sipo_kernels import backends
from sipo_kernels.layout import pair_dtype

TRIVIAL = "trivial loss (mean of the output)"
SECONDS = {"cpu": 60.0, "cuda": 60.0}
LEARNING_RATE = 1e-6  # the policy hardly moves: the last step costs what the first did

Loss = Callable[[LossInputs], Tensor]


class Step:
    """A policy, its frozen copy, an optimizer and one batch; :meth:`run` is one training step."""

    def __init__(self, case: StepCase, device: str) -> None:
        torch.manual_seed(0)
        dtype = DTYPES[case.dtype]
        self.device = device
        self.policy, self.network = make_network(case, device, dtype)
        self.reference, _ = make_network(case, device, dtype)
        self.reference.load_state_dict(self.policy.state_dict())
        self.reference.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=LEARNING_RATE)

        self.latents, self.target = torch.randn(case.shape).to(device, dtype), torch.randn(case.shape).to(device)
        self.text = torch.randn(case.shape[0], case.text_tokens, case.heads * case.head_dim).to(device, dtype)
        self.timesteps = torch.randint(1, 1000, (case.pairs,)).repeat(2).to(device)
        self.ratio_scale = torch.full((case.shape[0],), RATIO_SCALE, device=device)
        self.upstream = torch.tensor(case.upstream, device=device)

    def predict(self) -> tuple[Tensor, Tensor]:
        """Returns the outputs of policy and reference."""
        inputs = self.latents, self.timesteps, self.text
        model_pred = self.policy(*inputs)
        with torch.no_grad():
            return model_pred, self.reference(*inputs)

    def run(self, loss: Loss) -> None:
        """Runs forward, reference, loss, backward and AdamW."""
        loss(self.batch(*self.predict())).backward(self.upstream)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def batch(self, model_pred: Tensor, ref_pred: Tensor) -> LossInputs:
        """Returns the loss's inputs."""
        return LossInputs(model_pred, ref_pred, self.target, self.ratio_scale, None, self.upstream)

    def frozen(self) -> LossInputs:
        """Returns the loss's inputs in this step, cut off from the networks."""
        model_pred, ref_pred = self.predict()
        return self.batch(model_pred.detach().requires_grad_(), ref_pred)


def losses(device: str) -> dict[str, Loss]:
    """Returns name → loss of a batch; the trivial one first."""
    auto = backends.choose("auto", torch.device(device))
    expected = torch.ones((), dtype=pair_dtype(torch.device(device)), device=device)

    def of(function: Callable[..., Tensor]) -> Loss:
        return lambda batch: function(*batch[:4], BETA)

    return {
        TRIVIAL: lambda batch: batch.model_pred.mean(),
        baselines.PUBLISHED: of(baselines.published),
        baselines.UPCAST: of(baselines.upcast),
        baselines.COMPILED: of(torch.compile(baselines.upcast, dynamic=False, fullgraph=True)),
        baselines.OURS + auto: lambda batch: baselines.ours(auto, batch, expected)(),
    }


def measure_case(
    case: StepCase, device: str, seconds: float, copy_gb_s: float
) -> tuple[dict[str, Any], dict[str, str]]:
    """Measures one case; returns its entry in the results file, and the losses left out: name → why."""
    torch._dynamo.reset()
    step = Step(case, device)
    functions = losses(device)
    calls = {name: functools.partial(step.run, function) for name, function in functions.items()}
    failed = timing.warm_up(calls, device=device, runs=3)
    batch = step.frozen()
    errors = {name: _errors(functions[name], batch) for name in functions if name not in failed and name != TRIVIAL}
    for name, (loss_error, grad_error) in errors.items():
        # The published form is timed whatever it computes in half precision. NaN is no number below the limit.
        if name != baselines.PUBLISHED and not (loss_error <= MAX_ERROR and grad_error <= MAX_ERROR):
            failed[name] = f"wrong result, not timed: {loss_error=:.3g} {grad_error=:.3g}"
    calls = {name: call for name, call in calls.items() if name not in failed}

    load = OthersLoad()
    times = timing.time_alternately(calls, seconds=0.8 * seconds, device=device, device_times=False)
    timed = {name: functions[name] for name in calls if name != TRIVIAL}
    direct = _time_directly(timed, batch, device, 0.2 * seconds)
    entry: dict[str, Any] = {
        **case.fields(),
        "network": step.network,
        "layers": case.layers,
        "parameters": sum(p.numel() for p in step.policy.parameters()),
        "elements": case.elements,
        "floor_bytes": case.floor_bytes,
        "floor_ms": case.floor_bytes / copy_gb_s / 1e6,
        "copy_gb_s": copy_gb_s,
        "others_cores": load.cores(),
        "results": {},
    }
    base = times.get(TRIVIAL)
    peaks = {name: extra_memory_mb(call, device=device) for name, call in calls.items()}
    for name, found in times.items():
        result = {**found.summary(), "peak_mb": peaks[name], "extra_mb": None}
        if name != TRIVIAL and base is not None:
            step_ms = result["wall_ms"]["median"]
            result["difference_ms"] = difference(found.wall_ms, base.wall_ms)
            result["share_by_difference"] = result["difference_ms"]["median"] / step_ms
            result["direct_ms"] = direct[name].summary()
            result["share_direct"] = _alone(result["direct_ms"]) / step_ms
            result["extra_mb"] = peaks[name] - peaks[TRIVIAL]
            result["loss_error"], result["grad_error"] = errors[name]
        entry["results"][name] = result
    return entry, failed


def _alone(direct: dict[str, Any]) -> float:
    """Device time where there is one: a step's kernels queue up, and the loss among them does not wait for Python."""
    return float((direct["device_ms"] or direct["wall_ms"])["median"])


def _errors(loss: Loss, batch: LossInputs) -> tuple[float, float]:
    """Returns errors of loss and gradient against float64 on the step's tensors: absolute, and relative in L2."""
    true_loss, true_grad = baselines.truth(batch)
    value = loss(batch)
    (grad,) = torch.autograd.grad(value, batch.model_pred, batch.upstream)
    error = (grad.double() - true_grad).norm() / true_grad.norm()
    return abs(float(value.detach()) - float(true_loss)), float(error)


def _time_directly(
    functions: dict[str, Loss], batch: LossInputs, device: str, seconds: float
) -> dict[str, timing.Times]:
    """Times forward and backward of each loss alone, caches cold as a network leaves them."""

    def work(function: Loss) -> None:
        torch.autograd.grad(function(batch), batch.model_pred, batch.upstream)

    calls = {name: functools.partial(work, function) for name, function in functions.items()}
    timing.warm_up(calls, device=device, runs=3)
    return timing.time_alternately(calls, seconds=seconds, device=device, state="cold")


def difference(values: list[float], base: list[float], draws: int = 1000) -> dict[str, Any]:
    """``{"median", "interval"}``: of ``values`` over ``base``, and where 90 % of ``draws`` resampled ones lie."""
    draw = random.Random(0)

    def resampled(data: list[float]) -> float:
        return statistics.median(draw.choices(data, k=len(data)))

    drawn = sorted(resampled(values) - resampled(base) for _ in range(draws))
    interval = [drawn[int(0.05 * draws)], drawn[int(0.95 * draws) - 1]]
    return {"median": statistics.median(values) - statistics.median(base), "interval": interval}


def print_entry(entry: dict[str, Any]) -> None:
    """A line for each loss: the step, what the loss adds to it, the loss alone, memory."""
    shape = "×".join(map(str, entry["shape"]))
    network = f"{entry['network']}, {entry['parameters'] / 1e6:.1f}M parameters"
    print(f"\n{entry['label']} [{shape}] {entry['dtype']}, {entry['target']} target, {network}")
    for name, result in entry["results"].items():
        low, high = result["wall_ms"]["quartiles"]
        cells = [f"step {result['wall_ms']['median']:9.2f} ms [{low:.2f}, {high:.2f}]"]
        if "difference_ms" in result:
            low, high = result["difference_ms"]["interval"]
            alone = _alone(result["direct_ms"])
            cells.append(f"loss {result['difference_ms']['median']:+7.2f} ms [{low:+.2f}, {high:+.2f}] by difference")
            cells.append(f"{alone:8.3f} ms alone, {result['share_direct']:.2%} of the step")
            cells.append(f"{result['extra_mb']:+.1f} MB at the peak")
        else:
            cells.append(f"peak {result['peak_mb']:.1f} MB")
        print(f"  {name:34} {'  '.join(cells)}  ({result['wall_ms']['runs']} runs)", flush=True)


def run(cases: Sequence[StepCase], device: str, seconds: float, output: Path) -> dict[str, Any]:
    """Measures ``cases``, ``seconds`` of timing each; writes the file after each and returns its content."""
    copy = timing.CopyBandwidth(device)
    copy.measure("start", 15)
    results = new_results("step", device, copy, seconds=seconds)

    def measure(case: StepCase) -> tuple[dict[str, Any], dict[str, str]]:
        entry, failed = measure_case(case, device, seconds, copy.measure("between", 3))
        print_entry(entry)
        results["copy_bandwidth_gb_s"] = copy.summary()
        return entry, failed

    return run_cases(results, cases, output, measure)


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser("step", __doc__, SECONDS).parse_args(argv)
    cases = [TINY] if args.quick else CASES[args.device]
    seconds = args.seconds if args.seconds is not None else (5.0 if args.quick else SECONDS[args.device])
    run(cases, args.device, seconds, args.output or default_output("step", args.device, partial=args.quick))


if __name__ == "__main__":
    main()
