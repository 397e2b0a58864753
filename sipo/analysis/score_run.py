"""``sipo score``: implicit rewards of the pairs of a configuration by what its run has trained."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from sipo import config as configuration
from sipo.analysis.probe import with_network
from sipo.analysis.score import PairScores, score_pairs
from sipo.config import Config, ConfigError
from sipo.data.pairs import CachedPairs
from sipo.data.readers import open_pairs
from sipo.data.records import DataError
from sipo.families.tuning import load_saved
from sipo.run import Run, build, datasets, loss_beta, make_loss, open_run, prepare_data
from sipo.train import WEIGHTS
from sipo.training.logs import check_output, write_aside

_KINDS = {
    "held-out": "held out of training",
    "training": "that it was trained on, which do not tell learnt from learnt by heart",
    "all": "all of them, most of which it was trained on: they do not tell learnt from learnt by heart",
}


class Scored(NamedTuple):
    """What :func:`score_run` has done.

    Attributes:
        scores: of the pairs.
        kind: "held-out", "training" or "all".
        weights: folder of those scored.
        output: the JSONL file.
    """

    scores: PairScores
    kind: str
    weights: Path
    output: Path

    def describe(self) -> str:
        """What was found, for a terminal."""
        lines = [self.scores.describe(), f"pairs: {_KINDS[self.kind]}"]
        return "\n".join([*lines, f"weights: {self.weights}", f"scores: {self.output}"])


def score_run(
    target: Path,
    overrides: Iterable[str],
    output: Path | None = None,
    *,
    weights: Path | None = None,
    of: str = "auto",
    draws: int,
    seed: int = 0,
) -> Scored:
    """Scores pairs and writes a JSON line for each: its place, its row and prompt in the source, its rewards.

    Args:
        target: folder of a run, or a configuration.
        overrides: ``section.key=value`` laid over it.
        output: JSONL file; ``scores.jsonl`` in the run's folder if left out.
        weights: folder that the run saved; ``weights`` in its output folder if left out.
        of: "held-out", "training" or "all" pairs; "auto" takes those held out where there are any.
        draws: for each pair, even.
        seed: of the draws.

    Raises:
        ConfigError, CacheError, BadPair, DataError, FileNotFoundError, ValueError: as for training.
        FileExistsError: an output that is there and holds something else than scores.
    """
    file = target / "config.yaml" if target.is_dir() else target
    if target.is_dir() and not file.is_file():
        raise ConfigError(f"{target}: no config.yaml, expected the folder of a run of `sipo train`")
    config = configuration.load(file, overrides)
    place = target if target.is_dir() else config.training.folder
    folder = weights or place / WEIGHTS
    output = place / "scores.jsonl" if output is None else output
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder, expected the weights of a run; --weights names another")
    check_output(output, '{"index": ', "scores of `sipo score`")
    run = open_run(with_network(config))
    loss_fn = make_loss(run)
    pairs, kind = _pairs(run, of)
    rows = pairs.rows.tolist()
    prompts = _prompts(run.data_path, config, set(rows))
    policy, reference = build(run)
    load_saved(run.family, policy, folder)
    scores = score_pairs(
        policy.to(run.accelerator.device),
        reference,
        run.schedule,
        pairs,
        run.family.predict,
        beta=loss_beta(run, loss_fn),
        draws=draws,
        seed=seed,
        batch_size=config.training.batch_size,
        distribution=config.training.timestep_distribution,
        accelerator=run.accelerator,
        progress=config.training.progress,
    )
    _write(scores, output, rows, prompts)
    return Scored(scores, kind, folder, output)


def _pairs(run: Run, of: str) -> tuple[CachedPairs, str]:
    """Pairs of the cache, without draws of their own, and which they are."""
    cache = prepare_data(run, progress=run.config.training.progress).cache
    training, held_out = datasets(run, cache, None)
    if of == "held-out" and held_out is None:
        raise ConfigError("data.held_out=0: expected some for --of held-out")
    kind = of if of != "auto" else "training" if held_out is None else "held-out"
    chosen = held_out if kind == "held-out" else training
    chosen = CachedPairs(cache, dtype=training.dtype) if kind == "all" else chosen  # type: ignore[attr-defined]
    assert isinstance(chosen, CachedPairs)
    return chosen, kind


def _prompts(path: str, config: Config, rows: set[int]) -> dict[int, str]:
    """Prompts by row; none where the source is no longer there, as scoring needs the cache alone."""
    data, last = config.data, max(rows, default=-1)
    with contextlib.suppress(DataError, OSError):
        reader = open_pairs(path, data.format, data.split, data.streaming)
        # No further than needed: a row of Pick-a-Pic comes with its images, which may be on a hub.
        wanted = itertools.takewhile(lambda record: record.row <= last, reader)
        return {record.row: record.prompt for record in wanted if record.row in rows}
    return {}


def _write(scores: PairScores, output: Path, rows: list[int], prompts: dict[int, str]) -> None:
    lines = []
    for row, line in zip(rows, scores.lines(), strict=True):
        known = {"prompt": prompts[row]} if row in prompts else {}
        lines.append(json.dumps({"index": line.pop("index"), "row": row, **known, **line}, ensure_ascii=False) + "\n")
    write_aside(output, "".join(lines))
