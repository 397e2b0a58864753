"""A few cases of the kernel benchmark for pytest-benchmark's table and history: ``pytest benchmarks/test_kernel.py``.

Few enough to run often, and to compare with a saved run (``--benchmark-save``, ``--benchmark-compare``);
``benchmarks.kernel`` is the measurement to quote. No timing is asserted. Wall time with the device synchronised, caches
warm.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from benchmarks import baselines
from benchmarks.cases import FORWARD, SHAPES, TARGET, TRAINED, UPSTREAM, Case, make_inputs
from benchmarks.machine import default_device
from benchmarks.suite import MAX_ERROR, make_before, make_calls
from benchmarks.timing import sync

DEVICE = default_device()
CASES = [
    Case("SD1.5", SHAPES["SD1.5"], 1, TRAINED, TARGET, upstream=UPSTREAM),
    Case("SDXL", SHAPES["SDXL"], 4, TRAINED, TARGET, upstream=UPSTREAM),
    Case("SDXL", SHAPES["SDXL"], 4, TRAINED, TARGET, FORWARD),
    Case("Wan 480p", SHAPES["Wan 480p"], 1, "float32", "float32", upstream=UPSTREAM),
]
NAMES = [baselines.UPCAST, baselines.COMPILED, *(baselines.OURS + name for name in baselines.available(DEVICE)[0])]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pair_loss(benchmark: Any, case: Case, name: str) -> None:
    batch = make_inputs(case, DEVICE)
    call, before = make_calls(case, batch, DEVICE, autotune=False)[name], make_before(batch)

    def timed() -> Tensor:
        loss = call()
        sync(DEVICE)
        return loss

    benchmark.group = case.name
    benchmark.extra_info.update(case.fields(), device=DEVICE)
    loss = benchmark.pedantic(timed, setup=before, rounds=20, iterations=1, warmup_rounds=5)
    true_loss, true_grad = baselines.truth(batch)
    assert float(loss) == pytest.approx(float(true_loss), rel=0.05)
    if case.mode != FORWARD:
        assert batch.model_pred.grad is not None
        assert (batch.model_pred.grad.double() - true_grad).norm() <= MAX_ERROR * true_grad.norm()
