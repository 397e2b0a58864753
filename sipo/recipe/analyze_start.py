"""Reports on a configuration's model and data before any training: ``sipo analyze CONFIG.yaml``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sipo.analysis.findings import Finding
from sipo.analysis.report import PAGE
from sipo.analysis.settings import flat, in_force
from sipo.analysis.untrained import LEVELS, PAIRS, UntrainedFacts, judge_untrained, measure_untrained, untrained_page
from sipo.files import check_output, write_aside
from sipo.recipe.build import RunContext, build, datasets, loss_beta, make_loss, open_run
from sipo.recipe.config import Config
from sipo.recipe.preflight import check_run
from sipo.recipe.prepare_data import prepare_data
from sipo.training.forward import PairForward

BEFORE = "before.html"
"""The name of the page, which is written next to the run's ``report.html``."""


def analyze_start(
    config: Config, output: Path | None = None, *, pairs: int = PAIRS, levels: int = LEVELS
) -> tuple[Path, list[Finding]]:
    """Writes a report on a model and its data before training, and encodes the pairs that the cache lacks.

    Args:
        config: configuration of the planned run.
        output: page to write; ``before.html`` in ``training.output_dir`` by default.
        pairs: number of pairs to measure, taken from the start of the training set.
        levels: number of noise levels, spaced evenly over the schedule.

    Returns:
        The page and the verdict.

    Raises:
        ConfigError, CacheError, BadPairError, DataError: as for training.
        OSError: the page cannot be written.
        ValueError: a number out of range.
    """
    for name, value in (("pairs", pairs), ("levels", levels)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
    output = config.training.folder / BEFORE if output is None else output
    check_output(output, *PAGE)
    run = open_run(with_network(config))
    check_run(run, "analyze")
    found = measure_run(run, pairs=pairs, levels=levels)
    findings = judge_untrained(found)
    page = untrained_page(config.model.family, config.loss.method, found, findings, in_force(flat(config.as_dict())))
    write_aside(output, page.html())
    return output, findings


def with_network(config: Config) -> Config:
    """Returns the configuration with a network as the reference and without draws or reference errors in the cache."""
    kind = "auto" if config.model.reference == "errors" else config.model.reference
    model = dataclasses.replace(config.model, reference=kind)
    return dataclasses.replace(
        config, model=model, data=dataclasses.replace(config.data, draws=0, reference_errors=False)
    )


def measure_run(run: RunContext, *, pairs: int, levels: int) -> UntrainedFacts:
    """Prepares the data and networks of a run and measures the untrained policy on them."""
    training = run.config.training
    loss_fn = make_loss(run)
    cache = prepare_data(run, progress=training.progress).cache
    dataset, _ = datasets(run, cache, None)
    policy, reference = build(run)
    policy.to(run.accelerator.device)
    forward = PairForward(loss_fn, run.predict, reference, run.accelerator, offload=run.config.model.reference_offload)
    return measure_untrained(
        policy,
        forward,
        dataset,
        beta=loss_beta(run, loss_fn),
        pairs=pairs,
        levels=levels,
        batch_size=training.train_batch_size,
        seed=training.seed,
        distribution=training.timestep_distribution,
    )
