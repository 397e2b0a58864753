"""PairBatch: what it refuses, how it moves, and what noisy_pairs makes of it."""

from __future__ import annotations

import math
import re
from typing import Any

import diffusers
import pytest
import torch
from conftest import assert_refused
from torch import Tensor
from torch.utils.data import default_collate

from sipo import NoiseSchedule
from sipo.batch import BatchMode, PairBatch, collate, level_argument, network_timesteps, noisy_pairs

FLOW = NoiseSchedule.flow(3.0)
V = NoiseSchedule.discrete(prediction_type="v_prediction")
INVERTED = NoiseSchedule(
    "flow", prediction_type="flow", num_inference_steps=50, num_train_timesteps=1000, invert_sigmas=True
)


def tensors() -> dict[str, Any]:
    """Every field of a batch of three pairs with reference errors."""
    pairs, generator = 3, torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    return {
        "chosen": random(pairs, 2, 5),
        "rejected": random(pairs, 2, 5),
        "condition": {"text": random(pairs, 7, 4), "name": ["a"] * pairs},
        "own_condition": {"ids": random(pairs, 2, 6)},
        "mode": BatchMode.REFERENCE_ERRORS,
        "noise": random(pairs, 2, 5),
        "levels": torch.arange(pairs) * 300 + 7,
        "ref_error": random(pairs, 2, dtype=torch.float64),
        "error_mask": random(pairs, 1, 5) > 0,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mode": BatchMode.FRESH_DRAWS},
            "items with fresh draws have noise, level, ref_error: expected none of noise,",
        ),
        ({"mode": BatchMode.FIXED_DRAWS}, "items with fixed draws have noise, level, ref_error: expected noise, level"),
        ({"levels": None}, "items with reference errors have noise, ref_error: expected noise, level, ref_error"),
        (
            {"mode": BatchMode.FIXED_DRAWS, "noise": None, "levels": None, "ref_error": None},
            "items with fixed draws have none of noise, level, ref_error: expected noise, level",
        ),
        ({"rejected": torch.zeros(3, 2, 4)}, "rejected has shape [3, 2, 4]: expected [3, 2, 5]"),
        ({"noise": torch.zeros(1, 2, 5)}, "noise has shape [1, 2, 5]: expected [3, 2, 5]"),
        ({"levels": torch.zeros(6)}, "levels has shape [6]: expected [3]"),
        ({"levels": torch.zeros(3, 1)}, "levels has shape [3, 1]: expected [3]"),
        ({"ref_error": torch.zeros(2, 3)}, "ref_error has shape [2, 3]: expected [3, 2]"),
        ({"error_mask": torch.ones(6, 2, 5)}, "error_mask has shape [6, 2, 5]: expected [3, 2, 5], with 1 in place"),
        ({"error_mask": torch.ones(1, 2, 5)}, "error_mask has shape [1, 2, 5]: expected [3, 2, 5]"),
        ({"error_mask": torch.ones(3, 3, 5)}, "error_mask has shape [3, 3, 5]: expected [3, 2, 5]"),
        ({"error_mask": torch.ones(3, 5)}, "error_mask has shape [3, 5]: expected [3, 2, 5]"),
        ({"condition": torch.zeros(6, 7), "own_condition": None}, "condition has shape [6, 7]: expected [3, ...]"),
        ({"condition": {"text": torch.zeros(())}}, "condition['text'] has shape []: expected [3, ...]"),
        ({"condition": {"ids": torch.zeros(3, 6)}}, "'ids' is in both 'condition' and 'own_condition': expected it in"),
        ({"own_condition": {"ids": torch.zeros(3, 6)}}, "own_condition['ids'] has shape [3, 6]: expected [3, 2, ...]"),
        (
            {"condition": torch.zeros(3, 7)},
            "'own_condition' beside a condition that is a Tensor: expected a dictionary",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str) -> None:
    PairBatch(**tensors())
    assert_refused(lambda: PairBatch(**tensors() | changes), ValueError, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen": None}, "chosen is a NoneType: expected a torch.Tensor"),
        ({"rejected": ["a"] * 3}, "rejected is a list: expected a torch.Tensor"),
        ({"chosen": torch.zeros(3, 2, 5, dtype=torch.uint8)}, "chosen has dtype torch.uint8: expected a float"),
        ({"levels": [1, 2, 3]}, "levels is a list: expected a torch.Tensor"),
        ({"error_mask": [True] * 3}, "error_mask is a list: expected a torch.Tensor"),
        ({"error_mask": torch.ones(3, 2, 5).byte()}, "error_mask has dtype torch.uint8: expected bool or a floating"),
        ({"own_condition": torch.zeros(3, 2)}, "own_condition is a Tensor: expected a dictionary of tensors"),
    ],
)
def test_what_has_the_wrong_type_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        PairBatch(**tensors() | changes)
    with pytest.raises(TypeError, match="items are collated to a list: expected dictionaries with 'chosen'"):
        PairBatch.of_items(list(tensors().values()))  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", BatchMode)
def test_items_say_the_mode(mode: BatchMode) -> None:
    given = tensors()
    keys = {name: name for name in ("chosen", "rejected", "condition", "own_condition", "error_mask")}
    if mode is not BatchMode.FRESH_DRAWS:
        keys |= {"noise": "noise", "level": "levels"}
    if mode is BatchMode.REFERENCE_ERRORS:
        keys["ref_error"] = "ref_error"
    batch = PairBatch.of_items({key: given[name] for key, name in keys.items()})
    assert batch.mode is mode and len(batch) == 3
    for name, value in given.items():
        if name != "mode":
            assert getattr(batch, name) is (value if name in keys.values() else None), name


def test_items_lack_a_sample() -> None:
    with pytest.raises(ValueError, match="an item has the keys chosen: expected 'rejected' among them"):
        PairBatch.of_items({"chosen": torch.zeros(2, 3)})


def test_ragged_tensors_are_padded_to_the_longest_and_all_else_is_stacked() -> None:
    def item(length: int) -> dict[str, Any]:
        text = {"text": torch.full((length, 2), 1.5), "text_mask": torch.ones(length, dtype=torch.bool)}
        return {"chosen": torch.full((3,), float(length)), "condition": text | {"pooled": torch.arange(4)}}

    items = [item(length) for length in (2, 5, 1)]
    batch = collate(items)
    assert torch.equal(batch["condition"]["text_mask"].sum(1), torch.tensor([2, 5, 1]))
    assert torch.equal(batch["condition"]["text"], 1.5 * batch["condition"]["text_mask"][..., None].expand(3, 5, 2))
    assert batch["condition"]["text_mask"].dtype == torch.bool
    assert torch.equal(batch["condition"]["pooled"], torch.arange(4).expand(3, 4))
    assert torch.equal(batch["chosen"], torch.tensor([2.0, 5.0, 1.0])[:, None].expand(3, 3))
    assert items[2]["condition"]["text"].shape == (1, 2)  # a data set may give an item twice
    plain = [{"chosen": torch.zeros(3), "condition": torch.full((2,), i)} for i in range(2)]
    assert torch.equal(collate(plain)["condition"], default_collate(plain)["condition"])
    for each in items:  # without a mask, the network would take padding for text
        del each["condition"]["text_mask"]
    with pytest.raises(RuntimeError, match="equal size"):
        collate(items)


def test_a_batch_moves_as_a_whole_and_latents_of_half_precision_are_widened() -> None:
    given = tensors()
    given |= {name: given[name].bfloat16() for name in ("chosen", "rejected")}
    moved = PairBatch(**given).to(torch.device("meta"))
    assert moved.mode is BatchMode.REFERENCE_ERRORS and moved.condition["name"] == ["a"] * 3
    found = [moved.chosen, moved.rejected, moved.condition["text"], moved.own_condition["ids"]]  # type: ignore[index]
    found += [t for t in (moved.noise, moved.levels, moved.ref_error, moved.error_mask) if t is not None]
    assert [t.device.type for t in found] == ["meta"] * 8
    assert [t.dtype for t in found] == [torch.float32] * 5 + [torch.int64, torch.float64, torch.bool]
    assert torch.equal(PairBatch(**given).to(torch.device("cpu")).chosen, given["chosen"].float())


@pytest.mark.parametrize(
    "schedule", [NoiseSchedule.discrete(), V, FLOW, INVERTED], ids=["epsilon", "v", "flow", "inverted"]
)
def test_both_samples_of_a_pair_are_noised_alike(schedule: NoiseSchedule) -> None:
    given = tensors()
    if schedule.kind == "flow":
        given["levels"] = given["levels"] / 1000
    pairs = noisy_pairs(PairBatch(**given), schedule)
    argument = level_argument(schedule, given["levels"])
    for place, name in enumerate(("chosen", "rejected")):
        rows = slice(3 * place, 3 * place + 3)
        assert torch.equal(pairs.samples[rows], schedule.add_noise(given[name], given["noise"], **argument))
        shared = schedule.prediction_type == "epsilon"
        target = pairs.target if shared else pairs.target[rows]
        assert torch.equal(target, schedule.target(given[name], given["noise"], **argument))
        assert torch.equal(pairs.levels[rows], given["levels"])
        assert torch.equal(pairs.timesteps[rows], network_timesteps(schedule, given["levels"]))
        assert torch.equal(pairs.condition["text"][rows], given["condition"]["text"])
        assert torch.equal(pairs.condition["ids"][rows], given["own_condition"]["ids"][:, place])
    again = noisy_pairs(
        PairBatch(given["chosen"], given["rejected"]).with_draws(given["noise"], given["levels"]), schedule
    )
    assert torch.equal(again.samples, pairs.samples) and again.condition is None


def test_a_batch_without_draws_is_not_noised() -> None:
    with pytest.raises(ValueError, match=r"fresh draws has no noise: expected PairBatch\.with_draws first"):
        noisy_pairs(PairBatch(torch.zeros(2, 3), torch.zeros(2, 3)), FLOW)


def test_a_level_that_the_schedule_does_not_have_is_named_by_the_items_key() -> None:
    batch = PairBatch(torch.zeros(2, 3), torch.zeros(2, 3)).with_draws(torch.zeros(2, 3), torch.tensor([0.5, 900.0]))
    message = """the items' "level" does not fit the schedule: sigmas[1]=900.0: expected sigma in (0, 1]"""
    with pytest.raises(ValueError, match=re.escape(message)):
        noisy_pairs(batch, FLOW)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("invert", [False, True])
def test_a_network_is_told_what_diffusers_pipelines_tell_it(shift: float, invert: bool) -> None:
    """Bit for bit the scheduler's own timesteps; a network that was told σ would learn wrong times without an error."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, invert_sigmas=invert)
    scheduler.set_timesteps(20)
    sigmas = scheduler.sigmas[:20]  # with invert_sigmas, the share of data
    schedule = NoiseSchedule.from_scheduler(scheduler)
    levels = 1 - sigmas if invert else sigmas
    found = network_timesteps(schedule, levels)
    if invert:
        torch.testing.assert_close(found, scheduler.timesteps, rtol=0, atol=1e-4)
    else:
        assert torch.equal(found, scheduler.timesteps)
    assert found.max() > 900 and math.isclose(found[10], scheduler.timesteps[10], rel_tol=1e-6)
    indices = torch.tensor([3, 998])
    assert network_timesteps(V, indices) is indices
