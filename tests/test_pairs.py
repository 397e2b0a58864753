"""Data sets from a cache: pairs, ragged text, condition images, fixed draws, and the split."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator as Trainer
from torch.utils.data import DataLoader

from sipo import SIPOLoss
from sipo.batch import PairBatch, collate
from sipo.cache.finished import open_cache
from sipo.cache.pairs import CachedPairs, DrawnPairs, split_pairs
from sipo.cache.reference_errors import FixedDraws
from sipo.data.media import read_media, resize_and_crop
from sipo.seeds import RandomStream, derive_seed
from sipo.training.config import TrainingConfig
from sipo.training.forward import PairForward
from sipo.training.stream import drop_captions, pair_loader
from tests.small_family import (
    DISCRETE,
    FLOW,
    EditFamily,
    Network,
    OptionalEditFamily,
    Pipeline,
    RaggedFamily,
    Records,
    SeeingFamily,
    SmallFamily,
    build,
    pairs_in,
    ragged_pairs_in,
    reference_errors,
)
from tests.training_cases import fit, untimed


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one.dtype == other.dtype and torch.equal(one, other))


# ---- Cached pairs ----


def test_an_item_has_the_agreed_keys(tmp_path: Path) -> None:
    cached = pairs_in(tmp_path, dtype="bfloat16")
    item = cached[4]
    assert item.keys() == {"chosen", "rejected", "condition", "own_condition"}
    assert item["chosen"].shape == item["rejected"].shape == (3, 2, 3)
    assert item["condition"].keys() == {"prompt_embeds", "pooled"}
    assert item["own_condition"]["time_ids"].shape == (2, 6)
    # As they are stored: what a data loader worker passes on is what the cache holds.
    tensors = [item["chosen"], item["rejected"], *item["condition"].values(), *cached.unconditional.values()]
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert item["own_condition"]["time_ids"].dtype == torch.float32
    assert same(pairs_in(tmp_path / "wide")[4]["chosen"].bfloat16(), item["chosen"])
    assert cached.unconditional["prompt_embeds"].shape == item["condition"]["prompt_embeds"].shape
    assert not torch.equal(cached.unconditional["pooled"], item["condition"]["pooled"])


def test_indices_end_where_the_pairs_do(tmp_path: Path) -> None:
    cached = pairs_in(tmp_path)
    assert same(cached[-1], cached[11])
    for index in (12, -13):
        with pytest.raises(IndexError, match=f"pair {index}: expected an index of 12 pairs"):
            cached[index]
    assert len(list(DrawnPairs(cached, DISCRETE, FixedDraws(2, 0)))) == 24  # type: ignore[call-overload]


def test_groups_have_one_shape_each_and_cover_everything(tmp_path: Path) -> None:
    cached = pairs_in(tmp_path / "two", two_sizes=True)
    assert len(cached.groups) == 2
    assert sorted(i for group in cached.groups for i in group) == list(range(12))
    shapes = [{tuple(cached[i]["chosen"].shape) for i in group} for group in cached.groups]
    assert shapes == [{(3, 2, 3)}, {(3, 3, 2)}] and len(cached.groups[1]) == 3
    drawn = DrawnPairs(cached, DISCRETE, FixedDraws(3, 0))
    assert sorted(i for group in drawn.groups for i in group) == list(range(36))
    for group, wanted in zip(drawn.groups, shapes, strict=True):
        assert {tuple(drawn[i]["noise"].shape) for i in group} == wanted
    some = CachedPairs(cached.cache, [1, 4, 5])
    assert [some.rows[group].tolist() for group in some.groups] == [[4], [1, 5]]
    assert not hasattr(CachedPairs(cached.cache, [0, 2]), "groups")
    assert not hasattr(pairs_in(tmp_path / "one"), "groups")


def test_rows_are_those_of_the_source(tmp_path: Path) -> None:
    cached = pairs_in(tmp_path)
    some = CachedPairs(cached.cache, [7, 2])
    assert len(some) == 2 and same(some[0], cached[7]) and same(some[1], cached[2])
    with pytest.raises(ValueError, match=r"row 12 is not in .* expected rows of its 12 pairs"):
        CachedPairs(cached.cache, [3, 12])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_give_the_same_items(tmp_path: Path, method: str) -> None:
    drawn = DrawnPairs(pairs_in(tmp_path, dtype="bfloat16"), FLOW, FixedDraws(2, 3, "shifted", 0.3))

    def batches(**options: Any) -> list[Any]:
        return list(DataLoader(drawn, batch_size=5, **options))  # type: ignore[arg-type]

    alone = batches()
    for one, other in zip(alone, batches(num_workers=2, multiprocessing_context=method), strict=True):
        assert same(one, other)
    assert alone[0]["chosen"].dtype == torch.bfloat16 and alone[0]["noise"].dtype == torch.float32
    assert alone[0]["level"].shape == (5,)


# ---- Ragged text ----


def test_ragged_text_is_stored_without_padding_and_padded_in_the_batch(tmp_path: Path) -> None:
    cached = ragged_pairs_in(tmp_path)
    family, records = RaggedFamily(), Records.make().records
    for index, record in enumerate(records):
        (wanted,) = family.encode_text(Pipeline(), [record.prompt])
        assert wanted["prompt_embeds"][-1].eq(0).all()  # a row of zeros that is text
        assert same(cached[index]["condition"], wanted)
    assert same(cached.unconditional, family.encode_unconditional(None))
    lengths = [len(cached[index]["condition"]["prompt_embeds"]) for index in range(12)]
    assert set(lengths) == {2, 3, 4, 5}
    config = TrainingConfig(max_train_steps=1, output_dir="unused", dataloader_num_workers=2)
    (items,) = pair_loader(cached, [[0, 11, 4]], config, torch.device("cpu"))
    batch = PairBatch.of_items(items)
    assert batch.condition["prompt_embeds"].shape == (3, 5, 4)
    assert batch.condition["prompt_embeds_mask"].sum(1).tolist() == [lengths[index] for index in (0, 11, 4)]


def test_reference_errors_do_not_depend_on_the_padding(tmp_path: Path) -> None:
    cached = ragged_pairs_in(tmp_path)
    alone = reference_errors(cached, batch_size=1)  # nothing is padded
    wanted = torch.cat([alone.at(place)[0] for place in range(12)])
    for path in alone.folder.iterdir():
        path.unlink()
    found = reference_errors(cached, batch_size=7)
    torch.testing.assert_close(torch.cat([found.at(place)[0] for place in range(12)]), wanted, rtol=1e-6, atol=0)
    drawn = DrawnPairs(cached, DISCRETE, FixedDraws(3, 2, "uniform", 0.3), found)
    lengths = {len(drawn[index]["condition"]["prompt_embeds"]) for index in range(36)}
    assert lengths == {1, 2, 3, 4, 5}  # captions are dropped, and the empty one has one token
    batch = PairBatch.of_items(collate([drawn[index] for index in range(36)]))
    gap = PairForward(SIPOLoss(DISCRETE), SmallFamily().predict, None, Trainer(cpu=True), offload=False)(
        Network(), batch, [], torch.empty(0), seed=0
    )[0].error_gap  # type: ignore[attr-defined]
    assert gap.abs().max() < 1e-6 * wanted.min()


def test_training_on_ragged_text_resumes_where_it_stopped(tmp_path: Path) -> None:
    cached = ragged_pairs_in(tmp_path / "cache")

    def run(folder: str, **options: Any) -> tuple[Network, list[dict[str, Any]]]:
        options = {"train_batch_size": 5, "proportion_empty_prompts": 0.4, "checkpointing_steps": 2} | options
        policy, result = fit(
            tmp_path / folder,
            policy=Network(),
            reference=Network(),
            data=cached,
            predict=SmallFamily().predict,
            identity={"data": cached.cache.content_hash()},
            max_train_steps=6,
            **options,
        )
        return policy, untimed(result.history)

    whole, history = run("whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "step-00000006")
    rest, later = run("half", resume_from="latest")
    assert later == history[4:] and len(later) == 2
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), rest.parameters(), strict=True))


# ---- Condition images ----


def test_an_item_has_the_condition_image_of_the_samples_size(tmp_path: Path) -> None:
    reader, options = Records.make(two_sizes=True, edits=range(12)), {"random_flip": True, "center_crop": False}
    build(tmp_path, reader, family=EditFamily(), dtype="bfloat16", **options)
    cached, wanted = CachedPairs(open_cache(tmp_path)), []
    for record in reader.records:  # as if it were the chosen sample, but for its shape
        size = (24, 16) if record.row % 4 == 1 else (16, 24)
        generator = torch.Generator().manual_seed(derive_seed(5, RandomStream.CROP, record.row))
        flip = derive_seed(5, RandomStream.FLIP, record.row) % 2 == 1
        assert isinstance(record.condition_image, bytes)
        pixels = read_media(record.condition_image).pixels
        fitted = resize_and_crop(pixels, *size, center_crop=False, flip=flip, generator=generator).pixels
        wanted.append(SmallFamily().encode_pixels(Pipeline(), fitted[None])[0].bfloat16())
    assert len({derive_seed(5, RandomStream.FLIP, row) % 2 for row in range(12)}) == 2
    for index, latents in enumerate(wanted):
        item = cached[index]
        assert item["condition"].keys() == {"prompt_embeds", "pooled", "condition_latents"}
        assert same(item["condition"]["condition_latents"], latents) and latents.shape == item["chosen"].shape


def test_pairs_with_and_without_a_condition_image_are_in_different_groups(tmp_path: Path) -> None:
    build(tmp_path, Records.make(two_sizes=True, edits=[0, 1, 2, 7, 9]), family=OptionalEditFamily())
    cached = CachedPairs(open_cache(tmp_path))
    assert sorted(cached.groups) == [[0, 2, 7], [1, 9], [3, 4, 6, 8, 10, 11], [5]]
    for group in cached.groups:
        batch = collate([cached[index] for index in group])
        assert ("condition_latents" in batch["condition"]) == (group[0] in (0, 1))
    references = reference_errors(cached)
    plain = tmp_path / "plain"
    build(plain, Records.make(two_sizes=True))
    without = reference_errors(CachedPairs(open_cache(plain)))
    for row in range(12):  # the network sees the image; batches of other pairs are rounded otherwise
        alike = torch.allclose(references.at(row)[0], without.at(row)[0], rtol=1e-6, atol=0)
        assert alike == (row not in (0, 1, 2, 7, 9))


def test_a_dropped_caption_leaves_the_condition_image(tmp_path: Path) -> None:
    build(tmp_path, Records.make(edits=range(12)), family=EditFamily())
    cached = CachedPairs(open_cache(tmp_path))
    drawn = DrawnPairs(cached, DISCRETE, FixedDraws(2, 0, proportion_empty_prompts=1.0))
    for index in range(24):
        image = {"condition_latents": cached[index // 2]["condition"]["condition_latents"]}
        assert same(drawn[index]["condition"], cached.unconditional | image)
    batch = collate([cached[index] for index in range(12)])["condition"]
    before = batch["condition_latents"].clone()
    drop_captions(batch, cached.unconditional, range(12), 0, 0.999)
    assert torch.equal(batch["condition_latents"], before)
    assert torch.equal(batch["pooled"], cached.unconditional["pooled"].expand(12, 4))


def test_text_that_sees_the_image_is_each_pairs_own(tmp_path: Path) -> None:
    reader, family = Records.make(edits=range(12)), SeeingFamily()
    build(tmp_path, reader, family=family)
    cached = CachedPairs(open_cache(tmp_path))
    for index, record in enumerate(reader.records):
        assert isinstance(record.condition_image, bytes)
        image = resize_and_crop(read_media(record.condition_image).pixels, 16, 24).pixels
        (wanted,) = family.encode_text(Pipeline(), [record.prompt], [image])
        (latents,) = family.encode_condition_image(None, image[None])
        assert same(cached[index]["condition"], wanted | latents)
    assert cached.cache.prompt_of.unique().numel() == 12
    held_out = split_pairs(cached, 4, seed=1)[1].rows.tolist()  # all pairs of a prompt, as always
    assert held_out == [3 * (held_out[0] // 3) + n for n in range(3)]
    batch = PairBatch.of_items(collate([cached[index] for index in (0, 11)]))
    assert batch.condition["prompt_embeds_mask"].sum(1).tolist() == [3, 6]
    assert getattr(cached, "unconditional", None) is None  # training refuses to drop captions
    drawn = DrawnPairs(cached, DISCRETE, FixedDraws(1, 0, proportion_empty_prompts=1.0))
    with pytest.raises(AttributeError, match="unconditional: text embeddings here depend on the condition image"):
        drawn[0]
    reference_errors(cached, proportion_empty_prompts=0.0)


# ---- Draws ----


def test_draws_depend_on_seed_row_and_number_alone(tmp_path: Path) -> None:
    cached = pairs_in(tmp_path)
    drawn = DrawnPairs(cached, DISCRETE, FixedDraws(4, 3, proportion_empty_prompts=0.5))
    fewer = DrawnPairs(CachedPairs(cached.cache, [9, 4]), DISCRETE, FixedDraws(2, 3, proportion_empty_prompts=0.5))
    for draw in range(2):
        assert same(fewer[draw], drawn[9 * 4 + draw])
        assert same(fewer[2 + draw], drawn[4 * 4 + draw])
    everything = [drawn[index] for index in range(len(drawn))]
    assert len({item["noise"].sum().item() for item in everything}) == 48
    noise = torch.stack([item["noise"] for item in everything])
    assert abs(noise.mean().item()) < 0.1 and abs(noise.std().item() - 1) < 0.1
    other = DrawnPairs(cached, DISCRETE, FixedDraws(4, 4))
    assert not torch.equal(other[0]["noise"], drawn[0]["noise"])
    state = torch.get_rng_state()
    drawn[0]
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's numbers are used up


def test_timesteps_are_the_schedules(tmp_path: Path) -> None:
    cached = pairs_in(tmp_path)
    drawn = DrawnPairs(cached, DISCRETE, FixedDraws(40, 0))
    levels = torch.stack([drawn[i]["level"] for i in range(len(drawn))])
    assert levels.dtype == torch.int64 and levels.min() >= 0 and levels.max() < 1000
    assert abs(levels.double().mean().item() - 499.5) < 40
    sigmas = [DrawnPairs(cached, FLOW, FixedDraws(1, 0, d))[0]["level"] for d in ("uniform", "shifted")]
    assert sigmas[1].item() == pytest.approx(3 * sigmas[0].item() / (1 + 2 * sigmas[0].item()))
    with pytest.raises(ValueError, match="distribution"):
        DrawnPairs(cached, DISCRETE, FixedDraws(1, 0, "shifted"))[0]


def test_captions_are_dropped_at_the_rate_asked_for(tmp_path: Path) -> None:
    cached = pairs_in(tmp_path)

    def dropped(share: float) -> int:
        drawn = DrawnPairs(cached, DISCRETE, FixedDraws(50, 0, proportion_empty_prompts=share))
        return sum(same(drawn[i]["condition"], cached.unconditional) for i in range(len(drawn)))

    assert dropped(0.0) == 0 and dropped(1.0) == 600
    assert 90 < dropped(0.2) < 150
    assert same(DrawnPairs(cached, DISCRETE, FixedDraws(1, 0))[5]["condition"], cached[5]["condition"])


@pytest.mark.parametrize("wrong", [{"draws": 0}, {"proportion_empty_prompts": 1.5}, {"proportion_empty_prompts": -0.1}])
def test_numbers_out_of_range(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name}={wrong[name]}: expected"):
        FixedDraws(**{"draws": 1, "seed": 0} | wrong)


# ---- Splitting ----


def test_a_split_keeps_every_prompt_on_one_side(tmp_path: Path) -> None:
    cached = pairs_in(tmp_path)
    training, validation = split_pairs(cached, 4, seed=1)  # prompts have three pairs each
    rows = [side.rows.tolist() for side in (training, validation)]
    assert len(rows[1]) == 3 and sorted(rows[0] + rows[1]) == list(range(12))
    assert rows == [sorted(side) for side in rows]
    assert not {row // 3 for row in rows[0]} & {row // 3 for row in rows[1]}
    again = split_pairs(cached, 4, seed=1)[1]
    assert again.rows.tolist() == rows[1]
    chosen = {split_pairs(cached, 3, seed)[1].rows[0].item() for seed in range(20)}
    assert chosen == {0, 3, 6, 9}
    assert len(split_pairs(cached, 0, 0)[0]) == 12 and len(split_pairs(cached, 0, 0)[1]) == 0
    assert [len(side) for side in split_pairs(cached, 11, 0)] == [3, 9]


def test_a_split_does_not_depend_on_the_order(tmp_path: Path) -> None:
    cached = pairs_in(tmp_path)
    backwards = CachedPairs(cached.cache, list(range(11, -1, -1)))
    held_out = [split_pairs(each, 6, 7)[1] for each in (cached, backwards)]
    rows = [side.rows.tolist() for side in held_out]
    assert rows[0] == rows[1][::-1] and len(rows[0]) == 6


def test_a_split_that_cannot_be_made(tmp_path: Path) -> None:
    cached = pairs_in(tmp_path)
    for wrong in (-1, 12):
        with pytest.raises(ValueError, match=f"held_out={wrong}: expected at least 0 and fewer than the 12 pairs"):
            split_pairs(cached, wrong, 0)
    with pytest.raises(ValueError, match="held_out=2: every prompt has 3 pairs or more"):
        split_pairs(cached, 2, 0)
