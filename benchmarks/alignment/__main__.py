"""Does it align? ``python -m benchmarks.alignment --grid quick``.

    python -m benchmarks.alignment --grid quick        # digits, ink: four methods, five β, three seeds
    python -m benchmarks.alignment --grid standard     # everything: hours; stop it when you like, and go on later
    python -m benchmarks.alignment --summary           # what the results file says, without running anything
    python -m benchmarks.alignment --figures docs/alignment --output benchmarks/alignment/results/cells.json
    python -m benchmarks.alignment --page docs/alignment.md --output benchmarks/alignment/results/cells.json

Each finished cell is written at once, and cells that are in the file already are not run again. Cells run side by side
in as many processes as there are cores, one thread each (on a GPU: one process). At the end the claims of
docs/alignment.md are computed from the file, and compared with those of the committed one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.alignment import conclusions
from benchmarks.alignment.cells import GRIDS, Cell
from benchmarks.alignment.estimates import Results
from benchmarks.alignment.grid import load, run_grid
from benchmarks.machine import default_device
from sipo.files import write_aside

COMMITTED = Path(__file__).parent / "results" / "cells.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Command-line entry point; exit status 1 where a claim disagrees with the committed results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.alignment", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--grid", choices=tuple(GRIDS), default="quick", help="which cells (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("out/alignment/cells.json"), help="results file")
    parser.add_argument("--workers", type=int, help="processes (default: one a core; on a GPU one)")
    parser.add_argument("--only", metavar="TEXT", help="cells whose name has this in it, as in method=sipo/variant=ipo")
    parser.add_argument("--list", action="store_true", help="name the cells, and whether they are done, and stop")
    parser.add_argument("--summary", action="store_true", help="compute the claims from the file, and stop")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="draw the pictures from the file, and stop")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the claims below their markers, and stop")
    options = parser.parse_args(argv)
    if options.workers is not None and options.workers < 0:
        parser.error(f"--workers={options.workers}: expected at least 0")
    try:
        results = load(options.output)
        committed = load(COMMITTED)
    except ValueError as error:
        parser.error(str(error))
    cells = [cell for cell in GRIDS[options.grid]() if options.only is None or options.only in cell.key]
    if not cells:
        parser.error(f"--only={options.only!r}: no cell of the grid has this in its name, expected one of --list")
    if options.list:
        done = {Cell.of(record) for record in results["cells"]}
        for cell in cells:
            print("done   " if cell in done else "missing", cell.key)
        return 0
    if options.figures:
        from benchmarks.alignment.page_figures import draw_all

        for path in draw_all(results, options.figures):
            print(path)
        return 0
    if options.page:
        try:
            text = conclusions.quoted(options.page.read_text(encoding="utf-8"), Results(results))
        except (OSError, ValueError) as error:
            parser.error(str(error))
        write_aside(options.page, text)
        return 0
    if not options.summary:
        cores = 1 if default_device() == "cuda" else multiprocessing.cpu_count()
        results = run_grid(cells, options.output, workers=cores if options.workers is None else options.workers)
    text, disagree = conclusions.report(results, committed)
    print(text)
    return int(disagree)


if __name__ == "__main__":
    sys.exit(main())
