"""What reference errors save, by the arithmetic that `sipo precompute` prints."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from sipo.cache.savings import FULL_SIZE, ModelSize, describe_savings, savings_table
from tests.small_family import pairs_in, reference_errors


def test_savings_by_hand() -> None:
    size = ModelSize(parameters=1000, latents=(4, 8, 8), text=((77, 16), (5,)), pixels="64x64")
    found = describe_savings(size, pairs=10, draws=3, seen=100)
    assert found.reference_bytes == 2000
    assert found.latent_bytes == 10 * 2 * 256 * 2
    assert found.text_bytes == 10 * (77 * 16 + 5) * 2
    assert found.error_bytes == 30 * 24
    assert (found.reference_passes_spent, found.reference_passes_saved) == (60, 200)
    assert found.encoder_passes_saved == 180
    assert found.step_share == 0.25
    assert describe_savings(size, pairs=10, draws=3, seen=100, gradient_checkpointing=True).step_share == 0.2


def test_the_errors_on_disk_are_what_the_arithmetic_says(tmp_path: Path) -> None:
    cached = pairs_in(tmp_path)
    references = reference_errors(cached)
    counted = sum(t.nbytes for place in range(12) for t in references.at(place))
    size = ModelSize(0, (3, 2, 3), ((8, 4), (4,)), "16x24")
    assert describe_savings(size, pairs=12, draws=3, seen=0).error_bytes == counted
    latents = sum(cached[i][name].nbytes for i in range(12) for name in ("chosen", "rejected"))
    assert describe_savings(size, pairs=12, draws=3, seen=0, stored_bytes=4).latent_bytes == latents


def test_full_sizes_are_the_published_models() -> None:
    assert Counter(len(size.latents) for size in FULL_SIZE.values()) == {3: 2, 4: 3}
    sdxl = describe_savings(FULL_SIZE["SDXL"], pairs=100_000, draws=4, seen=1_000_000)
    assert sdxl.reference_bytes == pytest.approx(5.13e9, rel=0.01)
    assert sdxl.error_bytes == 9_600_000
    assert sdxl.latent_bytes == pytest.approx(26.2e9, rel=0.01)
    table = savings_table(pairs=100_000, draws=4, seen=1_000_000).splitlines()
    assert len(table) == 2 + len(FULL_SIZE)
    assert table[3] == "| SDXL | 1024x1024 | 5.13 GB | 9.6 MB | 26.2 GB | 31.8 GB | 25% |"
