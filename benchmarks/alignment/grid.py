"""Runs cells side by side, and keeps the results file: each finished cell is in it at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.alignment.cells import Cell
from benchmarks.alignment.experiment import measure_base, run_cell
from sipo.files import write_aside


def load(path: Path) -> dict[str, Any]:
    """Loads a results file, or returns an empty one if there is none.

    Raises:
        ValueError: a file of something else.
    """
    if not path.exists():
        return {"kind": "alignment", "machine": machine.describe(machine.default_device()), "bases": {}, "cells": []}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}), expected results of benchmarks.alignment") from error
    if not isinstance(results, dict) or results.get("kind") != "alignment":
        raise ValueError(f"{path}: expected results of benchmarks.alignment")
    return results


def save(path: Path, results: dict[str, Any]) -> None:
    """Writes results aside and renames them; one line for each cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {name: value for name, value in results.items() if name != "cells"}
    cells = ",\n".join(json.dumps(cell) for cell in results["cells"])
    write_aside(path, json.dumps(head, indent=1)[:-2] + ',\n "cells": [\n' + cells + "\n]}\n")


def run_grid(
    cells: Sequence[Cell], path: Path, *, workers: int, steps: int | None = None, samples: int | None = None
) -> dict[str, Any]:
    """Runs the cells that a results file lacks, and returns the file's content.

    Args:
        cells: in order.
        path: the results file; written after each cell.
        workers: processes of one thread each; 0 runs the cells in this one.
        steps: in place of each task's own.
        samples: likewise.
    """
    results = load(path)
    results["machine"] = machine.describe(machine.default_device())
    done = {Cell.of(record) for record in results["cells"]}
    left = [cell for cell in cells if cell not in done]
    print(f"{len(cells)} cells, {len(cells) - len(left)} done already, {len(left)} to run", flush=True)
    started = time.perf_counter()
    for number, (cell, record, base) in enumerate(_finished(left, workers, steps, samples), 1):
        results["bases"][cell.task] = base
        results["cells"].append({**record, "commit": machine.commit()})
        save(path, results)
        ahead = (time.perf_counter() - started) / number * (len(left) - number)
        print(f"{number}/{len(left)} {describe(record)}; {ahead / 60:.0f} min left", flush=True)
    return results


def describe(record: dict[str, Any]) -> str:
    """Describes a cell in a few words."""
    cell = Cell.of(record)
    changed = [f"{f.name}={getattr(cell, f.name)}" for f in fields(Cell) if getattr(cell, f.name) != f.default]
    text = " ".join(changed) or "the default cell"
    if record.get("diverged"):
        return f"{text}: diverged ({record['seconds']:.0f} s)"
    reward, agreement = record["rewards"][cell.reward], record["agreement"]
    return f"{text}: reward {reward:+.3f}, agreement {agreement:.2f} ({record['seconds']:.0f} s)"


def _finished(
    cells: Sequence[Cell], workers: int, steps: int | None, samples: int | None
) -> Iterator[tuple[Cell, dict[str, Any], dict[str, Any]]]:
    """Yields cells with their records and their task's base, as they finish."""
    if not workers:
        for cell in cells:
            yield cell, *_work(cell, steps, samples)
        return
    # Processes of their own from the start: forked ones would inherit torch's threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(cells) or 1), mp_context=context, initializer=_one_thread) as pool:
        running: dict[Future[Any], Cell] = {pool.submit(_work, cell, steps, samples): cell for cell in cells}
        try:
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), *future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _one_thread() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Where the process that reads the results is killed, those that make them go too."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(cell: Cell, steps: int | None, samples: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    return run_cell(cell, steps=steps, samples=samples), measure_base(cell.task)
