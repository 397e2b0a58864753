"""Which cells there are: one training run each, in the order in which a grid goes through them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from benchmarks.alignment.variants import PARTS, RELATIVES, SFT, VARIANTS
from sipo_kernels.options import METHODS

BETAS = (20.0, 200.0, 1000.0, 5000.0, 20000.0)
SEEDS = (0, 1, 2)
MORE_SEEDS = (3, 4)
LONG = 3
"""A long run has so many times the steps."""


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        task: of ``tasks.get``.
        reward: which images win.
        source: where the pairs' images come from: "data", or "base" for samples of the base model (on-policy).
        noise: share of wrong labels.
        fraction: of the pairs.
        length: times the task's number of steps.
        method: of the pair loss, or "sft".
        variant: of ``variants.VARIANTS``.
        beta: β; 0 for "sft", which has none.
        seed: of pairs, noise, timesteps and samples.
    """

    task: str = "digits"
    reward: str = "ink"
    source: str = "data"
    noise: float = 0.0
    fraction: float = 1.0
    length: int = 1
    method: str = "sipo"
    variant: str = ""
    beta: float = 1000.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("source", self.source, ("data", "base")),
            ("method", self.method, (*METHODS, SFT)),
            ("variant", self.variant, tuple(VARIANTS)),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, known))}")

    @property
    def key(self) -> str:
        """Names the cell in results files."""
        return "/".join(f"{name}={value}" for name, value in asdict(self).items())

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Cell:
        """Returns the cell that a record of a results file is of."""
        return cls(**{field.name: record[field.name] for field in fields(cls)})

    def like(self, **changes: Any) -> Cell:
        """Returns this cell with some fields changed."""
        return replace(self, **changes)


def _seeded(cells: Iterable[Cell], seeds: tuple[int, ...] = SEEDS) -> Iterator[Cell]:
    return (cell.like(seed=seed) for cell in cells for seed in seeds)


def _methods(base: Cell, betas: tuple[float, ...]) -> list[Cell]:
    return [base.like(method=method, beta=beta) for beta in betas for method in METHODS]


def _sft(base: Cell) -> Cell:
    return base.like(method=SFT, beta=0.0)


def smoke() -> list[Cell]:
    """Returns a few cells that ``make test`` runs with fewer steps."""
    return [Cell(), Cell(method="diffusion_dpo"), _sft(Cell())]


def quick() -> list[Cell]:
    """Returns the cells on digits and ink: four methods, five β, three seeds, and the floor."""
    return list(_seeded([_sft(Cell()), *_methods(Cell(), BETAS)]))


def standard() -> list[Cell]:
    """Returns all cells, the most wanted first."""
    digits = Cell()
    on_policy, slanted = digits.like(source="base"), digits.like(reward="slant")
    dpo = digits.like(method="diffusion_dpo")
    moving = [
        Cell(task=f"moving-{kind}", reward=reward) for reward in ("ink", "smoothness") for kind in ("cogvideox", "wan")
    ]
    parts = [part for part in PARTS if part != "ratio to the reference"]
    blocks = [
        quick(),
        # Which parts of SIPO do the work.
        _seeded([digits.like(variant=part) for part in parts]),
        # On-policy pairs, and the correction that is made for them.
        _seeded([_sft(on_policy), *_methods(on_policy, (1000.0,))]),
        _seeded([on_policy.like(variant="ratio to the reference")]),
        # The relatives, on Diffusion-DPO as published.
        _seeded([dpo.like(variant=name) for name in RELATIVES]),
        _seeded([cell for task in moving[:2] for cell in [_sft(task), *_methods(task, (1000.0,))]]),
        _seeded(_methods(digits.like(noise=0.3), (1000.0,))),
        _seeded(_methods(digits.like(fraction=0.1), (1000.0,))),
        _seeded([_sft(slanted), *_methods(slanted, (1000.0,))]),
        # Longer: does it go on, or fall apart?
        _seeded([dpo.like(length=LONG), digits.like(length=LONG)]),
        _seeded(_methods(digits.like(noise=0.1), (1000.0,)) + _methods(digits.like(fraction=0.5), (1000.0,))),
        _seeded([digits.like(variant=part, beta=200.0) for part in parts]),
        _seeded([dpo.like(variant=name, beta=200.0) for name in RELATIVES]),
        _seeded([cell for task in moving[:2] for cell in _methods(task, BETAS)]),
        _seeded([*_methods(on_policy, (200.0,)), on_policy.like(variant="ratio to the reference", beta=200.0)]),
        _seeded([cell for task in moving[2:] for cell in [_sft(task), *_methods(task, (1000.0,))]]),
        _seeded(_methods(slanted, BETAS)),
        _seeded(_methods(on_policy, BETAS)),
        _seeded([_sft(digits), *_methods(digits, BETAS)], MORE_SEEDS),
        _seeded([cell for task in moving[2:] for cell in _methods(task, BETAS)]),
        _seeded(_methods(digits.like(length=LONG), (1000.0, 200.0))),
    ]
    return list(dict.fromkeys(itertools.chain.from_iterable(blocks)))


GRIDS = {"smoke": smoke, "quick": quick, "standard": standard}
