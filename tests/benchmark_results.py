"""What tests of the benchmarks share: a small machine, made-up results files, and the comparison of two of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import baselines, cases, compare, kernel_summary, machine, suite, timing


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small buffers, so that flushing and copying take no time; one thread, which a busy machine does not hold up.

    torch.compile, which takes seconds, stands aside.
    """
    flusher, threads = timing._flusher, torch.get_num_threads()
    flusher.cache_clear()
    torch.set_num_threads(1)
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 1 << 18)
    monkeypatch.setattr(machine, "memory_bytes", lambda device: 1 << 24)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    yield
    flusher.cache_clear()
    torch.set_num_threads(threads)


def summary(median: float) -> dict[str, Any]:
    return {"median": median, "quartiles": [0.98 * median, 1.02 * median], "runs": 9}


def made_up(kind: str = "kernel", device_type: str = "cpu", copy_gb_s: float = 20.0) -> dict[str, Any]:
    """A results file with every kind of entry; its times are not measurements."""
    entries = []
    if kind == "sweep":
        chosen = list(cases.sweep_cases(12, 16, ("bfloat16",)))
    else:
        plain = [case for case in cases.kernel_cases() if case.types == "bfloat16" and case.upstream == 1]
        chosen = [case for case in plain if case.label in ("SD1.5", "Wan 480p") and case.pairs in (1, 4)]
        chosen += [case for case in cases.kernel_cases() if cases.is_headline(case) and case not in chosen]
    for case in chosen:
        for state in ("cold", "warm") if kind == "sweep" else kernel_summary.STATES:
            results = {}
            for name, factor in ((baselines.UPCAST, 5.0), (baselines.COMPILED, 0.9), ("sipo native", 1.0)):
                wall = factor * (0.1 + case.floor_bytes / 1e7)
                on_gpu = summary(0.8 * wall) if device_type == "cuda" else None
                results[name] = {"wall_ms": summary(wall), "host_ms": on_gpu, "device_ms": on_gpu, "extra_mb": 3.0}
                results[name].update(launches=None, loss_error=0.0, grad_error=0.0)
            entry = {**case.fields(), "state": state, "elements": case.elements, "floor_bytes": case.floor_bytes}
            entries.append({**entry, "copy_gb_s": copy_gb_s, "others_cores": 0.0, "results": results})
            suite.derive(entries[-1], copy_gb_s)
    return {
        "kind": kind,
        "machine": {**machine.describe("cpu"), "device_type": device_type, "cpu_cache_mib": 32.0},
        "auto": "sipo native",
        "complete": True,
        "copy_bandwidth_gb_s": {**summary(copy_gb_s), "moments": {}},
        "cases": entries,
        "skipped": [],
    }


def run_compare(tmp_path: Path, old: dict[str, Any], new: dict[str, Any], *options: str) -> int:
    for name, results in (("old", old), ("new", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps(results))
    return compare.main([str(tmp_path / "old.json"), str(tmp_path / "new.json"), *options])


def slow_down(results: dict[str, Any], factor: float, name: str, where: Any = lambda entry: True) -> dict[str, Any]:
    results = copy.deepcopy(results)
    for entry in filter(where, results["cases"]):
        wall = entry["results"][name]["wall_ms"]
        wall["median"] *= factor
        wall["quartiles"] = [factor * quartile for quartile in wall["quartiles"]]
    return results
