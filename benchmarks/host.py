"""What the loss costs Python, where arithmetic is nothing: ``python -m benchmarks.host``.

Microseconds until a call returns, on batches so small that the rest is overhead: ``pair_loss`` forward and backward for
one SD1.5 pair; and the loss of a training pass (with metrics and statistics by noise level, and the backward for an
upstream gradient of 1/8) with its parts by themselves. Loops of many calls take turns in a random order, nothing is
cleared between them, and the results file has median and quartiles over the loops, for one call. Timings are results,
never assertions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import baselines, timing
from benchmarks.cases import BETA, SHAPES, TARGET, TRAINED, UPSTREAM, Case, LossInputs, make_inputs
from benchmarks.machine import OthersLoad
from benchmarks.suite import default_output, make_before, make_parser, new_results, run_cases
from sipo import NoiseSchedule, SIPOLoss
from sipo.training.statistics import TimestepStatistics
from sipo_kernels import METRICS, backends, pair_loss

SECONDS = 5.0  # for each batch
LOOP = 200  # calls
TINY = (4, 8, 8)
CASES = (
    Case("SD1.5", SHAPES["SD1.5"], 1, TRAINED, TRAINED),
    Case("SD1.5", SHAPES["SD1.5"], 1, "float32", "float32"),
    Case("tiny", TINY, 1, TRAINED, TARGET, upstream=UPSTREAM),
)
LOSS = "pair_loss, forward + backward"
PASS, METRIC_PASS = "SIPOLoss with totals, forward + backward", "SIPOLoss, metrics(), forward + backward"
FORWARD, METRICS_ALONE = "pair_loss, forward without gradient", "metrics()"

Call = Callable[[], Any]


def calls_of(case: Case, device: str) -> dict[str, Call]:
    """Returns the calls that are timed, by name."""
    batch = make_inputs(case, device)
    before = make_before(batch)
    loss = baselines.ours(backends.choose("auto", torch.device(device)), batch)

    def both() -> None:
        before()
        loss().backward(batch.upstream)

    return {LOSS: both, **(_training_pass(batch, device) if case.label == "tiny" else {})}


def _training_pass(batch: LossInputs, device: str) -> dict[str, Call]:
    """Returns calls for a pass of ``sipo.training``'s loop without its networks, and for its parts."""
    loss_fn = SIPOLoss(NoiseSchedule.discrete())
    statistics = TimestepStatistics.of(loss_fn, torch.device(device))
    assert statistics is not None
    timesteps = torch.full((batch.model_pred.shape[0],), 500, device=device)
    totals = statistics.totals(torch.zeros(2, len(METRICS), device=device))
    totals = totals._replace(pair_levels=timesteps[: len(timesteps) // 2])
    before = make_before(batch)
    tensors = batch.model_pred, batch.ref_pred, batch.target, timesteps

    def whole() -> None:
        before()
        loss_fn(*tensors, totals=totals).loss.backward(batch.upstream)

    def with_metrics() -> None:
        before()
        out = loss_fn(*tensors)
        out.loss.backward(batch.upstream)
        out.metrics()

    def forward() -> None:
        with torch.no_grad():
            pair_loss(*batch[:3], method="sipo", beta=BETA, ratio_scale=batch.ratio_scale)

    return {PASS: whole, METRIC_PASS: with_metrics, FORWARD: forward, METRICS_ALONE: loss_fn(*tensors).metrics}


def _loop(call: Call) -> None:
    for _ in range(LOOP):
        call()


def measure_case(case: Case, device: str, seconds: float) -> dict[str, Any]:
    """Measures one case, and returns its entry in the results file."""
    calls = calls_of(case, device)
    loops = {name: functools.partial(_loop, call) for name, call in calls.items()}
    failed = timing.warm_up(loops, device=device)
    if failed:
        raise RuntimeError(f"{case.name}: {failed}")
    load = OthersLoad()
    times = timing.time_alternately(loops, seconds=seconds, device=device, state="in turn", device_times=False)
    entry: dict[str, Any] = {**case.fields(), "state": "in turn", "others_cores": load.cores(), "results": {}}
    print(f"\n{case.name}")
    for name, found in times.items():
        each = [milliseconds / LOOP for milliseconds in found.host_ms or found.wall_ms]
        entry["results"][name] = {"host_ms": timing.summary(each)}
        low, high = (1e3 * quartile for quartile in entry["results"][name]["host_ms"]["quartiles"])
        median = 1e3 * entry["results"][name]["host_ms"]["median"]
        print(f"  {name:42} {median:8.1f} µs [{low:.1f}, {high:.1f}]  ({len(each)} loops of {LOOP})", flush=True)
    return entry


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser("host", __doc__, {"cpu": SECONDS, "cuda": SECONDS}).parse_args(argv)
    seconds = args.seconds if args.seconds is not None else SECONDS / (20 if args.quick else 1)
    results = new_results("host", args.device, seconds=seconds, loop=LOOP)
    output = args.output or default_output("host", args.device, partial=args.quick)
    run_cases(results, CASES, output, lambda case: (measure_case(case, args.device, seconds), {}))


if __name__ == "__main__":
    main()
