"""``sipo score``: implicit rewards of the pairs of a configuration by what its run has trained."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from sipo.analysis.score import PairScores, score_pairs
from sipo.cache.finished import Cache
from sipo.cache.pairs import CachedPairs
from sipo.cache.weights import is_weights, weights_change
from sipo.data.readers import open_pairs
from sipo.data.records import DataError
from sipo.families.tuning import load_saved
from sipo.files import FileError, check_output, read_object, write_aside
from sipo.recipe.analyze_start import with_network
from sipo.recipe.build import RunContext, build, datasets, loss_beta, make_loss, open_run
from sipo.recipe.config import Config, ConfigError, load_config
from sipo.recipe.prepare_data import prepare_data
from sipo.recipe.train import TRAINED_ON, trained_on
from sipo.training.run_folder import WEIGHTS
from sipo.training.sums import SUMS, check_config_sum, check_sums

_KINDS = {
    "held-out": "held out of training",
    "training": "that it was trained on, which do not tell learnt from learnt by heart",
    "all": "all of them, most of which it was trained on: they do not tell learnt from learnt by heart",
}
_UNKNOWN = "which were held out of training is unknown: "


class ScoredRun(NamedTuple):
    """The result of :func:`score_run`.

    Attributes:
        scores: of the pairs.
        pairs: which they are, in words.
        weights: folder of those scored.
        output: the JSONL file.
        hashed: whether the weights are known to be as they were saved; weights of another origin have no hashes.
    """

    scores: PairScores
    pairs: str
    weights: Path
    output: Path
    hashed: bool

    def describe(self) -> str:
        """Formats the scores for a terminal."""
        lines = [self.scores.describe(), f"pairs: {self.pairs}"]
        unknown = "" if self.hashed else f" (no {SUMS}, so that damage would go unnoticed)"
        return "\n".join([*lines, f"weights: {self.weights}{unknown}", f"scores: {self.output}"])


def score_run(
    target: Path,
    overrides: Iterable[str],
    output: Path | None = None,
    *,
    weights: Path | None = None,
    of: str = "auto",
    draws: int,
    seed: int = 0,
) -> ScoredRun:
    """Scores pairs and writes a JSON line for each: its place, its row (from 1) and prompt in the source, its rewards.

    Args:
        target: folder of a run, or a configuration.
        overrides: ``section.key=value`` laid over it.
        output: JSONL file; ``scores.jsonl`` in the run's folder if left out.
        weights: folder that the run saved; ``weights`` in its output folder if left out.
        of: "held-out", "training" or "all" pairs; "auto" takes those held out where there are any.
        draws: for each pair, even.
        seed: of the draws.

    Raises:
        ConfigError: also held-out or training pairs asked for, where the data or the split are not those of training,
            or another network than the one trained from.
        CacheError, BadPairError, DataError, FileNotFoundError, ValueError: as for training.
        FileError: weights that are damaged; names the file.
        FileExistsError: an output file that exists and holds something else than scores.
    """
    file = target / "config.yaml" if target.is_dir() else target
    if target.is_dir() and not file.exists():
        raise ConfigError(f"{target}: no config.yaml, expected the folder of a run of `sipo train`")
    config = load_config(file, overrides)
    if target.is_dir():
        check_config_sum(target)
    place = target if target.is_dir() else config.training.folder
    folder = weights or place / WEIGHTS
    output = place / "scores.jsonl" if output is None else output
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder, expected the weights of a run; --weights names another")
    check_output(output, r'\{"index": ', "scores of `sipo score`")
    hashed = check_sums(folder)
    run = open_run(with_network(config))
    loss_fn = make_loss(run)
    origin = _origin(folder)
    _check_network(run, folder, origin)
    pairs, which = _pairs(run, of, folder, origin)
    rows = pairs.rows.tolist()
    prompts = _prompts(run.data_path, config, set(rows))
    policy, reference = build(run)
    load_saved(run.family, policy, folder)
    scores = score_pairs(
        policy.to(run.accelerator.device),
        reference,
        run.schedule,
        pairs,
        run.predict,
        beta=loss_beta(run, loss_fn),
        draws=draws,
        seed=seed,
        batch_size=config.training.train_batch_size,
        distribution=config.training.timestep_distribution,
        accelerator=run.accelerator,
        progress=config.training.progress,
    )
    _write(scores, output, rows, prompts)
    return ScoredRun(scores, which, folder, output, hashed)


def _origin(folder: Path) -> dict[str, Any]:
    """Reads what the run has recorded about its data and network; empty if it cannot be read."""
    try:
        origin = read_object(folder / TRAINED_ON)
    except (OSError, FileError):
        return {}
    return origin if isinstance(origin.get("network"), dict) else {}


def _check_network(run: RunContext, folder: Path, origin: dict[str, Any]) -> None:
    """Refuses another network than the one that the weights were trained from."""
    if not origin:
        return
    was, now = origin["network"], run.weight_hashes(network=True)
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            change = f"{name} is {now.get(name)}, was {was.get(name)}"  # of a hub
            change = weights_change(name, was.get(name), now.get(name)) if is_weights(name) else change
            raise ConfigError(f"{folder}: trained from other weights: {change}")


def _pairs(run: RunContext, of: str, folder: Path, origin: dict[str, Any]) -> tuple[CachedPairs, str]:
    """Returns pairs of the cache, without draws of their own, and which ones they are."""
    cache = prepare_data(run, progress=run.config.training.progress).cache
    training, held_out = datasets(run, cache, None)
    if of == "held-out" and held_out is None:
        raise ConfigError("data.held_out=0: expected some for --of held-out")
    why = _unknown_split(run, cache, folder, origin)
    if why and of in ("held-out", "training"):
        raise ConfigError(f"--of {of}: {_UNKNOWN}{why}; --of all scores the pairs that there are")
    every = CachedPairs(cache)
    if why:
        return every, f"all of them; {_UNKNOWN}{why}"
    kind = of if of != "auto" else "training" if held_out is None else "held-out"
    chosen = {"held-out": held_out, "training": training, "all": every}[kind]
    assert isinstance(chosen, CachedPairs)
    return chosen, _KINDS[kind]


def _unknown_split(run: RunContext, cache: Cache, folder: Path, origin: dict[str, Any]) -> str:
    """Returns why it is unknown which pairs were held out; empty if it is known."""
    if not origin:
        return f"{folder / TRAINED_ON} cannot be read"
    now = trained_on(run, cache)
    for name in ("data.held_out", "data.seed"):
        if origin.get(name) != now[name]:
            return f"{name}={now[name]}, {origin.get(name)} in training"
    return "" if origin.get("data") == now["data"] else "the data, or how it is encoded, has changed since"


def _prompts(path: str, config: Config, rows: set[int]) -> dict[int, str]:
    """Returns prompts by row; none if the source no longer exists, as scoring needs only the cache."""
    data, last = config.data, max(rows, default=-1)
    with contextlib.suppress(DataError, OSError):
        reader = open_pairs(path, data.format, data.dataset_split_name, data.streaming)
        # No further than needed: a row of Pick-a-Pic comes with its images, which may be on a hub.
        wanted = itertools.takewhile(lambda record: record.row <= last, reader)
        return {record.row: record.prompt for record in wanted if record.row in rows}
    return {}


def _write(scores: PairScores, output: Path, rows: list[int], prompts: dict[int, str]) -> None:
    lines = []
    for row, line in zip(rows, scores.lines(), strict=True):
        known = {"prompt": prompts[row]} if row in prompts else {}
        value = {"index": line.pop("index"), "row": row + 1, **known, **line}
        lines.append(json.dumps(value, ensure_ascii=False) + "\n")
    write_aside(output, "".join(lines))
