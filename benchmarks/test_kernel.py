"""A few cases of the kernel benchmark for pytest-benchmark's table and history: ``pytest benchmarks/test_kernel.py``.

Quick to run and to compare with a saved run (``--benchmark-save``, ``--benchmark-compare``); ``benchmarks.kernel`` is
the measurement to quote. No timing is asserted. Wall time with the device synchronised, caches warm.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from benchmarks import baselines
from benchmarks.cases import BOTH, FORWARD, SHAPES, Case, make_inputs
from benchmarks.measure import default_device, sync
from benchmarks.suite import make_before, make_calls

DEVICE = default_device()
CASES = [
    Case("SD1.5", SHAPES["SD1.5"], 1, "bfloat16", BOTH),
    Case("SDXL", SHAPES["SDXL"], 4, "bfloat16", BOTH),
    Case("SDXL", SHAPES["SDXL"], 4, "bfloat16", FORWARD),
    Case("Wan 480p", SHAPES["Wan 480p"], 1, "float32", BOTH),
]
NAMES = [baselines.UPCAST, baselines.COMPILED, *(baselines.OURS + name for name in baselines.available(DEVICE)[0])]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pair_loss(benchmark: Any, case: Case, name: str) -> None:
    inputs = make_inputs(case, DEVICE)
    call, before = make_calls(case, inputs, DEVICE, autotune=False)[name], make_before(inputs)

    def timed() -> Tensor:
        loss = call()
        sync(DEVICE)
        return loss

    benchmark.group = case.name
    benchmark.extra_info.update(case.fields(), device=DEVICE)
    loss = benchmark.pedantic(timed, setup=before, rounds=20, iterations=1, warmup_rounds=5)
    assert float(loss) == pytest.approx(float(baselines.truth(inputs)[0]), rel=0.05)
    assert case.mode == FORWARD or inputs[0].grad is not None
