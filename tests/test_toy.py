"""The toy set: the same files from the same arguments, and a preference that can be seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sipo.data.check import check_pairs
from sipo.data.media import Media, read_media
from sipo.data.readers import JsonlReader
from sipo.data.toy import FPS, make_toy_pairs
from tests.data_sets import contents


@pytest.mark.parametrize("video", [False, True])
def test_the_same_arguments_give_the_same_files(tmp_path: Path, video: bool) -> None:
    """Several processes write them at once, each for all; x264 needs an option for it (see ``write_video``)."""
    sets = []
    for number in range(4):
        make_toy_pairs(tmp_path / f"{number}", video=video, pairs=16)
        sets.append(contents(tmp_path / f"{number}"))
    assert len(sets[0]) == 33 and all(each == sets[0] for each in sets)
    make_toy_pairs(tmp_path / "0", video=video, pairs=16)  # over the old ones, and nothing beside them
    assert contents(tmp_path / "0") == sets[0]
    make_toy_pairs(tmp_path / "other", video=video, pairs=16, seed=1)
    other = contents(tmp_path / "other")
    assert other.keys() == sets[0].keys() and sum(other[name] == sets[0][name] for name in other) == 0


def test_condition_images_have_the_shape_without_its_colour(tmp_path: Path) -> None:
    plain, edits = (
        make_toy_pairs(tmp_path / need, video=False, pairs=6, condition_image=need)  # type: ignore[arg-type]
        for need in ("none", "optional")
    )
    for record, same in zip(JsonlReader(edits), JsonlReader(plain), strict=True):
        assert (record.condition_image is not None) == (record.row % 2 == 1)
        for side, source in same.sources.items():
            assert torch.equal(read_media(record.sources[side]).pixels, read_media(source).pixels)
    path = make_toy_pairs(tmp_path / "all", video=False, pairs=6, condition_image="required")
    for record in JsonlReader(path):
        assert record.condition_image is not None and record.prompt.startswith("make the ")
        grey, chosen = read_media(record.condition_image).pixels.float(), read_media(record.chosen).pixels.float()
        assert torch.equal(grey[0], grey[1]) and torch.equal(grey[1], grey[2])
        torch.testing.assert_close(grey[0], chosen.mean(0), atol=1.0, rtol=0)
    assert check_pairs(JsonlReader(path), sizes=[(32, 32)]).findings == []


@pytest.mark.parametrize("video", [False, True])
def test_the_chosen_one_is_more_colourful(tmp_path: Path, video: bool) -> None:
    path = make_toy_pairs(tmp_path, video=video, pairs=12, height=24, width=40, frames=5)
    records = list(JsonlReader(path))
    assert len(records) == 12 and len({record.prompt for record in records}) > 4

    def colour(media: Media) -> float:
        pixels = media.pixels.float()
        return float((pixels.amax(-3) - pixels.amin(-3)).mean())

    for record in records:
        chosen, rejected = (read_media(each, 5 if video else 1) for each in (record.chosen, record.rejected))
        assert chosen.pixels.shape == rejected.pixels.shape == ((5, 3, 24, 40) if video else (3, 24, 40))
        assert chosen.fps == rejected.fps == (FPS if video else None)
        assert colour(chosen) > 1.2 * colour(rejected)
        # Equally bright: it is colour alone that is preferred.
        assert abs(float(chosen.pixels.float().mean() - rejected.pixels.float().mean())) < 2.0
        if video:
            assert not torch.equal(chosen.pixels[0], chosen.pixels[-1])
