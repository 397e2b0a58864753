"""Data sets from a cache, fixed draws, and reference errors in place of a reference."""

from __future__ import annotations

import copy
import shutil
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator as Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import sipo.recipe.prepare_data
from sipo import NoiseSchedule, SIPOLoss
from sipo.batch import PairBatch, collate, level_argument, network_timesteps
from sipo.cache.finished import open_cache
from sipo.cache.format import CacheError, DamagedError
from sipo.cache.pairs import CachedPairs, DrawnPairs, split_pairs
from sipo.cache.precompute_errors import precompute_reference_errors
from sipo.cache.reference_errors import FixedDraws, ReferenceErrors, open_reference_errors
from sipo.cache.savings import FULL_SIZE, Cost, ModelSize, describe_savings, savings_table
from sipo.data.config import DataConfig
from sipo.data.media import read_media, resize_and_crop
from sipo.families.config import ModelConfig
from sipo.processes import OtherProcessError
from sipo.recipe.config import Config
from sipo.seeds import RandomStream, derive_seed
from sipo.training.config import TrainingConfig
from sipo.training.forward import PairForward
from sipo.training.stream import drop_captions, pair_loader
from tests.data_sets import contents
from tests.small_family import (
    Accelerator,
    EditFamily,
    Network,
    OptionalEditFamily,
    Pipeline,
    RaggedFamily,
    Records,
    SeeingFamily,
    SmallFamily,
    build,
    in_processes,
    outcomes_in_processes,
)
from tests.training_cases import fit, untimed

DISCRETE = NoiseSchedule.discrete(num_inference_steps=50)
FLOW = NoiseSchedule.flow(shift=3.0)
REFERENCE = {"path": "nowhere", "revision": None, "dtype": "float32"}


def pairs_in(folder: Path, two_sizes: bool = False, **changes: Any) -> CachedPairs:
    build(folder, Records.make(two_sizes=two_sizes), **changes)
    return CachedPairs(open_cache(folder))


def ragged_pairs_in(folder: Path) -> CachedPairs:
    costs: list[Cost] = []
    build(folder, family=RaggedFamily(), on_cost=costs.append)
    assert costs[0].prompt_bytes == 4 * (512 * 4 + 512 + 4)
    return CachedPairs(open_cache(folder))


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


# ---- Reference errors ----


def arguments(reference: dict[str, Any] = REFERENCE, **changes: Any) -> dict[str, Any]:
    return {"fixed": FixedDraws(**{"draws": 3, "seed": 2, "proportion_empty_prompts": 0.3} | changes)} | {
        "reference": reference
    }


def reference_errors(cached: CachedPairs, schedule: NoiseSchedule = DISCRETE, **changes: Any) -> ReferenceErrors:
    options: dict[str, Any] = {"batch_size": 5, "progress": False}
    names = ("network", "predict", *options, "accelerator", "num_workers")
    given = {name: changes.pop(name) for name in names if name in changes}
    network, predict = given.pop("network", Network()), given.pop("predict", SmallFamily().predict)
    return precompute_reference_errors(
        cached.cache, network, predict, schedule, **arguments(**changes), **options | given
    )


def forward(batch: dict[str, Any], schedule: NoiseSchedule, network: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Prediction, target and noise levels of stacked pairs, as a training loop makes them."""
    samples = torch.cat([batch["chosen"], batch["rejected"]])
    noise, levels = (torch.cat([batch[name], batch[name]]) for name in ("noise", "level"))
    own = batch["own_condition"]["time_ids"]
    condition = {name: torch.cat([t, t]) for name, t in batch["condition"].items()}
    condition["time_ids"] = torch.cat([own[:, 0], own[:, 1]])
    noisy = schedule.add_noise(samples, noise, **level_argument(schedule, levels))
    prediction = SmallFamily().predict(network, noisy, network_timesteps(schedule, levels), condition)
    return prediction, schedule.target(samples, noise, **level_argument(schedule, levels)), levels


@pytest.fixture
def trainer(request: pytest.FixtureRequest) -> Trainer:
    return Trainer(cpu=True, mixed_precision=request.param)


@pytest.mark.parametrize("method", ["diffusion_dpo", "dpo_cm", "sipo", "sdpo"])
@pytest.mark.parametrize(
    ("dtype", "trainer"),
    [("float32", "no"), ("bfloat16", "no"), ("float32", "bf16")],
    indirect=["trainer"],
    ids=["float32", "bfloat16", "autocast"],
)
@pytest.mark.parametrize("schedule", [DISCRETE, FLOW], ids=["epsilon", "flow"])
def test_losses_are_those_with_the_reference_present(
    tmp_path: Path, method: str, dtype: str, trainer: Trainer, schedule: NoiseSchedule
) -> None:
    # In one batch, as below: a convolution rounds differently in another.
    cached = pairs_in(tmp_path, dtype=dtype, shard_pairs=12)
    weights = getattr(torch, dtype)
    reference = Network().to(weights)
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).to(weights)
    references = reference_errors(cached, schedule, network=reference, batch_size=36, accelerator=trainer)
    drawn = DrawnPairs(cached, schedule, FixedDraws(3, 2, "uniform", 0.3), references)
    batch = collate([drawn[index] for index in range(len(drawn))])
    assert batch["ref_error"].dtype == torch.float64 and batch["ref_error"].shape == (36, 2)
    loss_fn = SIPOLoss(schedule, method=method, mask_threshold=0.5, reduction="none")

    def losses(reference: nn.Module | None) -> tuple[Tensor, Tensor, Tensor]:
        policy.zero_grad()
        once = PairForward(loss_fn, SmallFamily().predict, reference, trainer, offload=False)
        items = batch if reference is None else {key: value for key, value in batch.items() if key != "ref_error"}
        out: Any = once(policy, PairBatch.of_items(items), [], torch.empty(0), seed=0)[0]
        out.loss.sum().backward()
        return out.loss.detach(), out.mask, policy.inward.weight.grad.clone()

    exact = dtype == "float32" and trainer.mixed_precision == "no"
    with_reference, mask, gradient = losses(reference)
    without, same_mask, same_gradient = losses(None)
    assert torch.equal(mask, same_mask) and mask.sum() > 10
    assert with_reference.unique().numel() > 10
    torch.testing.assert_close(without, with_reference, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(same_gradient, gradient, rtol=1e-5 if exact else 1e-2, atol=1e-6)


@pytest.mark.parametrize("trainer", ["no"], indirect=True)
def test_a_bfloat16_cache_trains_as_its_values_in_float32(tmp_path: Path, trainer: Trainer) -> None:
    """Workers pass items on in the cache's type; on the device they are what a copy in float32 would have been."""
    cached = pairs_in(tmp_path, dtype="bfloat16")
    drawn = DrawnPairs(cached, DISCRETE, FixedDraws(2, 2))
    batch = collate([drawn[index] for index in range(8)])
    wide = batch | {name: batch[name].float() for name in ("chosen", "rejected")}
    wide["condition"] = {name: tensor.float() for name, tensor in batch["condition"].items()}
    sent = [sum(t.numel() * t.element_size() for t in (b["chosen"], b["rejected"])) for b in (batch, wide)]
    assert sent[1] == 2 * sent[0]
    given: list[torch.dtype] = []

    def predict(module: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
        given.append(noisy.dtype)
        return SmallFamily().predict(module, noisy, timesteps, condition)

    once = PairForward(SIPOLoss(DISCRETE), predict, Network(), trainer, offload=False)
    losses = [once(Network(1), PairBatch.of_items(each), [], torch.empty(0), seed=0)[0].loss for each in (batch, wide)]
    assert torch.equal(*losses) and given == [torch.float32] * 4
    network = Network()
    errors = reference_errors(cached, network=network, draws=2, proportion_empty_prompts=0.0, batch_size=4).at(0)[0]
    prediction, target, _ = forward(wide, DISCRETE, network)
    exact = (prediction.double() - target.double()).square().flatten(1).mean(1).view(2, 8).T
    torch.testing.assert_close(errors, exact[:2].detach(), rtol=1e-5, atol=0)  # in batches of another size


def test_with_the_policy_equal_to_the_reference_the_gap_vanishes(tmp_path: Path) -> None:
    cached = pairs_in(tmp_path)
    network = Network()
    drawn = DrawnPairs(cached, DISCRETE, FixedDraws(3, 2, "uniform", 0.3), reference_errors(cached, network=network))
    batch = collate([drawn[index] for index in range(len(drawn))])
    prediction, target, timesteps = forward(batch, DISCRETE, network)
    stacked = torch.cat([batch["ref_error"][:, 0], batch["ref_error"][:, 1]])
    out = SIPOLoss(DISCRETE, method="diffusion_dpo")(prediction, None, target, timesteps, ref_error=stacked)
    assert out.error_gap.abs().max() < 1e-6 * out.ref_error.min()


@pytest.mark.parametrize("changes", [{"batch_size": 1}, {"batch_size": 64}, {"num_workers": 2}])
def test_errors_do_not_depend_on_how_they_were_batched(tmp_path: Path, changes: dict[str, Any]) -> None:
    cached = pairs_in(tmp_path, two_sizes=True)
    usual = reference_errors(cached)
    wanted = [usual.at(place) for place in range(12)]
    for path in usual.folder.iterdir():
        path.unlink()
    found = reference_errors(cached, **changes)
    for place, (errors, timesteps) in enumerate(wanted):
        torch.testing.assert_close(found.at(place)[0], errors, rtol=1e-6, atol=0)
        assert torch.equal(found.at(place)[1], timesteps)


class Fails:
    """A predict that is interrupted at its n-th call."""

    def __init__(self, at: int = -1) -> None:
        self.calls, self.stops = 0, at

    def __call__(self, *arguments: Any) -> Tensor:
        self.calls += 1
        if self.calls == self.stops:
            raise KeyboardInterrupt
        return SmallFamily().predict(*arguments)


@pytest.mark.parametrize("at", [1, 3, 4, 9])  # three batches to a shard
def test_interrupted_errors_go_on_and_end_with_the_same_bytes(tmp_path: Path, at: int) -> None:
    whole, cut = pairs_in(tmp_path / "whole"), pairs_in(tmp_path / "cut")
    reference_errors(whole)
    network = Network().train()
    with pytest.raises(KeyboardInterrupt):
        reference_errors(cut, predict=Fails(at), network=network)
    assert network.training
    with pytest.raises(CacheError, match="reference errors that are not finished; `sipo precompute`"):
        open_reference_errors(cut.cache, DISCRETE, **arguments())
    predict = Fails()
    reference_errors(cut, predict=predict)
    assert predict.calls == 9 - 3 * ((at - 1) // 3)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    again = Fails()
    reference_errors(cut, predict=again)
    assert again.calls == 0


def test_several_processes_write_the_same_errors(tmp_path: Path) -> None:
    one = pairs_in(tmp_path / "one")
    pairs_in(tmp_path / "many")
    reference_errors(one)
    networks = [Network(), Network()]  # made here: threads share a generator
    calls = [Fails(), Fails()]

    def run(accelerator: Accelerator) -> Any:
        rank = accelerator.process_index
        cached = CachedPairs(open_cache(tmp_path / "many"))
        return reference_errors(cached, accelerator=accelerator, network=networks[rank], predict=calls[rank])

    first, second = in_processes(2, run)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert torch.equal(first.at(11)[0], second.at(11)[0])
    assert [predict.calls for predict in calls] == [6, 3]  # two shards and one


def test_an_error_of_one_process_ends_the_others(tmp_path: Path) -> None:
    """The second process's network overflows."""
    pairs_in(tmp_path)
    networks = [Network(), Network()]

    class Overflows(SmallFamily):
        def predict(self, module: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
            out = super().predict(module, noisy, timesteps, condition)
            return out * (float("inf") if module is networks[1] else 1.0)

    def run(accelerator: Accelerator) -> Any:
        network = networks[accelerator.process_index]
        cached = CachedPairs(open_cache(tmp_path))
        return reference_errors(cached, accelerator=accelerator, network=network, predict=Overflows().predict)

    first, second = outcomes_in_processes(2, run)
    assert isinstance(second, ValueError) and "the reference's errors at noise level" in str(second)
    assert isinstance(first, OtherProcessError) and str(first) == f"process 1: {second}"


def test_processes_of_which_one_does_not_see_the_errors_go_on_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network folder: each asks the others, also one that misses them itself."""
    me = threading.local()

    def opened(*args: Any, **options: Any) -> str:
        if me.rank == 1:
            raise CacheError("not there yet")
        return "found"

    monkeypatch.setattr(sipo.recipe.prepare_data, "open_reference_errors", opened)
    monkeypatch.setattr(sipo.recipe.prepare_data, "frozen_reference", lambda *_: nn.Linear(1, 1))
    monkeypatch.setattr(sipo.recipe.prepare_data, "round_whole", lambda network, accelerator: network)
    monkeypatch.setattr(sipo.recipe.prepare_data, "precompute_reference_errors", lambda *_, **options: "computed")
    training = SimpleNamespace(train_batch_size=1, dataloader_num_workers=0)

    def run(accelerator: Any) -> Any:
        me.rank, accelerator.device = accelerator.process_index, "cpu"
        made = SimpleNamespace(
            config=SimpleNamespace(training=training),
            accelerator=accelerator,
            fixed_draws=None,
            predict=None,
            reference_marks={},
            schedule=None,
            cache=tmp_path,
        )
        return sipo.recipe.prepare_data._references(made, None, False, False, None)  # type: ignore[arg-type]

    assert in_processes(2, run) == ["computed"] * 2


def test_damaged_errors_are_named_and_rebuilt(tmp_path: Path) -> None:
    cached = pairs_in(tmp_path)
    references = reference_errors(cached)
    whole = contents(tmp_path)
    path = references.folder / "errors-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedError, match=r"errors-00001\.safetensors: has .*`sipo precompute` rebuilds it"):
        open_reference_errors(cached.cache, DISCRETE, **arguments())
    predict = Fails()
    reference_errors(cached, predict=predict)
    assert predict.calls == 3 and contents(tmp_path) == whole
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    damaged = open_reference_errors(cached.cache, DISCRETE, **arguments())
    damaged.at(0)
    with pytest.raises(DamagedError, match=r"errors-00001\.safetensors: changed since"):
        damaged.at(4)


def test_errors_of_latents_that_have_changed_are_not_used(tmp_path: Path) -> None:
    cached = pairs_in(tmp_path)
    reference_errors(cached)
    reader = Records.make()
    reader.records[5] = replace(reader.records[5], chosen=reader.records[3].chosen)
    build(tmp_path, reader)
    assert_stale_and_computed_again(tmp_path, r"errors-00001\.safetensors: computed from other pairs than those")


def assert_stale_and_computed_again(folder: Path, message: str) -> None:
    """Errors of one shard are refused, and it alone is computed again."""
    changed = CachedPairs(open_cache(folder))
    with pytest.raises(DamagedError, match=message):
        open_reference_errors(changed.cache, DISCRETE, **arguments())
    predict = Fails()
    reference_errors(changed, predict=predict)
    assert predict.calls == 3


def test_errors_follow_the_prompt_where_no_file_of_tensors_has_changed(tmp_path: Path) -> None:
    cached = pairs_in(tmp_path)
    reference_errors(cached)
    tensors = {name: data for name, data in contents(tmp_path).items() if name.endswith("safetensors")}
    reader = Records.make()
    reader.records[2] = replace(reader.records[2], prompt=reader.records[3].prompt)  # of the same shard of text
    build(tmp_path, reader)
    assert {name: data for name, data in contents(tmp_path).items() if name.endswith("safetensors")} == tensors
    assert_stale_and_computed_again(tmp_path, r"errors-00000\.safetensors: computed from other pairs")


@pytest.mark.parametrize("rows", [8, 16])
def test_errors_of_fewer_or_more_pairs_are_not_used(tmp_path: Path, rows: int) -> None:
    cached = pairs_in(tmp_path)
    reference_errors(cached)
    build(tmp_path, Records.make(rows))
    changed = CachedPairs(open_cache(tmp_path))
    with pytest.raises(DamagedError, match=f"errors of 3 shards of pairs, expected {rows // 4}"):
        open_reference_errors(changed.cache, DISCRETE, **arguments())
    predict = Fails()
    found = reference_errors(changed, predict=predict)
    assert predict.calls == max(0, 3 * (rows - 12) // 4)
    assert found.at(rows - 1)[0].isfinite().all()
    assert len(list(found.folder.glob("*.safetensors"))) == rows // 4


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"draws": 4}, "made with draws=3, expected this run's 4"),
        ({"seed": 3}, "made with seed=2, expected this run's 3"),
        ({"proportion_empty_prompts": 0.0}, r"made with proportion_empty_prompts=0\.3, expected this run's 0\.0"),
        ({"reference": REFERENCE | {"revision": "b"}}, 'made with reference.revision=null, expected this run\'s "b"'),
    ],
)
def test_errors_of_other_draws_are_not_used(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    cached = pairs_in(tmp_path)
    with pytest.raises(CacheError, match="no reference errors, expected some; `sipo precompute` makes them"):
        open_reference_errors(cached.cache, DISCRETE, **arguments())
    reference_errors(cached)
    with pytest.raises(CacheError, match=text):
        open_reference_errors(cached.cache, DISCRETE, **arguments(**changes))


def test_of_several_sets_of_errors_the_nearest_says_what_differs(tmp_path: Path) -> None:
    cached = pairs_in(tmp_path)
    for draws, seed in ((1, 9), (3, 2), (2, 7)):
        reference_errors(cached, draws=draws, seed=seed)
    with pytest.raises(CacheError, match="made with seed=7, expected this run's 8"):
        open_reference_errors(cached.cache, DISCRETE, **arguments(draws=2, seed=8))
    assert open_reference_errors(cached.cache, DISCRETE, **arguments()).at(0)[0].shape == (3, 2)


def test_a_reference_is_marked_by_how_it_is_loaded_and_run() -> None:
    model = ModelConfig(family="sdxl", pretrained_model_name_or_path="a", revision="b", dtype="bfloat16")
    training = TrainingConfig(max_train_steps=1, output_dir="out", mixed_precision="bf16")
    config = Config(model=model, data=DataConfig(dataset_name="a", cache="b"), training=training)
    assert config.reference_marks() == {
        "family": "sdxl",
        "pretrained_model_name_or_path": "a",
        "revision": "b",
        "variant": None,
        "dtype": "bfloat16",
        "mixed_precision": "bf16",
    }
    # Full tuning is in float32, and autocast rounds weights held in bfloat16 no more: the errors are the same.
    for dtype in (None, "float32", "bfloat16"):
        other = replace(config, model=replace(model, tuning="full", reference_dtype=dtype))
        assert other.reference_marks()["dtype"] == "float32"
    plain = replace(config, training=replace(training, mixed_precision="no"))
    other = replace(plain, model=replace(model, tuning="full", dtype="float32", reference_dtype="float16"))
    assert other.reference_marks()["dtype"] == "float16"
    assert config.reference_marks(torch.bfloat16)["dtype"] == "bfloat16, norms too"


def test_errors_of_another_schedule_are_not_used(tmp_path: Path) -> None:
    cached = pairs_in(tmp_path)
    references = reference_errors(cached)
    with pytest.raises(CacheError, match="made with schedule="):
        open_reference_errors(cached.cache, NoiseSchedule.discrete(beta_end=0.013), **arguments())
    # The sampler's steps are the loss's business: errors do not depend on them.
    fewer = NoiseSchedule.discrete(num_inference_steps=20)
    assert open_reference_errors(cached.cache, fewer, **arguments()).folder == references.folder
    with pytest.raises(CacheError, match="row 1: the reference's error was computed at noise level"):
        DrawnPairs(cached, DISCRETE, FixedDraws(3, 9), references)[0]


def test_an_error_that_is_not_finite_stops_with_its_row(tmp_path: Path) -> None:
    cached = pairs_in(tmp_path)

    def predict(module: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
        return torch.full_like(noisy, torch.nan)

    with pytest.raises(ValueError, match=r"row 1: the reference's errors at noise level \d+ are \[nan, nan\]"):
        reference_errors(cached, predict=predict)


def test_a_shard_without_pairs_has_no_errors(tmp_path: Path) -> None:
    reader = Records.make()
    for row in range(4, 8):
        reader.records[row] = replace(reader.records[row], chosen=b"no image")
    build(tmp_path, reader, skip_bad=True)
    cached = CachedPairs(open_cache(tmp_path))
    references = reference_errors(cached)
    drawn = DrawnPairs(cached, DISCRETE, FixedDraws(3, 2, "uniform", 0.3), references)
    assert len(drawn) == 24 and drawn[23]["ref_error"].isfinite().all()


# ---- Savings ----


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
