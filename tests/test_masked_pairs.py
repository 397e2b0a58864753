"""Pairs with an error_mask, from files to training, reference errors and rewards: as if the rest were cut off."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from sipo import NoiseSchedule, SIPOLoss
from sipo.analysis.score import score_pairs
from sipo.batch import PairBatch, collate, counted_mean
from sipo.cache.finished import open_cache
from sipo.cache.pairs import CachedPairs, DrawnPairs
from sipo.cache.precompute_errors import _errors, precompute_reference_errors
from sipo.cache.reference_errors import FixedDraws
from sipo.data.load import BadPairError
from sipo.data.media import read_media, resize_and_crop
from sipo.seeds import RandomStream, derive_seed
from sipo.training.first_step import FirstStep
from sipo.training.forward import PairForward
from tests.small_family import Pipeline, Records, SmallFamily, build
from tests.training_cases import Pairs, fit, untimed

FLOW = NoiseSchedule.flow(3.0)
EPSILON = NoiseSchedule.discrete()


class Pointwise(nn.Module):
    """Each element of the prediction follows from the same element of the input, so cutting changes no other."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return self.value * noisy + 1e-4 * timesteps[:, None, None, None]


def predict(module: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
    return module(noisy, timesteps)


def items(schedule: NoiseSchedule, cut: bool, mask: Any, rest: float = math.nan) -> list[dict[str, Any]]:
    """Three pairs at fixed draws of ``[1, 4, 6]``, of which the last two columns are ``rest``; or without these."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for level in schedule.sample_levels(3, generator):
        chosen, rejected, noise = torch.randn(3, 1, 4, 6, generator=generator)
        chosen[:, :, 4:], rejected[:, :, 4:] = rest, -rest
        item = {"chosen": chosen, "rejected": rejected, "noise": noise}
        if cut:
            item = {name: value[:, :, :4] for name, value in item.items()}
        found.append(item | {"level": level} | ({} if cut else {"error_mask": mask}))
    return found


MASK = torch.tensor([[[1.0, 1, 1, 1, 0, 0]]])  # broadcast over the rows
MASKS = [MASK.bool(), MASK.expand(1, 4, 6).bool(), MASK.double(), 0.25 * MASK.bfloat16()]


def batch(schedule: NoiseSchedule, cut: bool, mask: Any = MASK, rest: float = math.nan) -> PairBatch:
    return PairBatch.of_items(collate(items(schedule, cut, mask, rest)))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("schedule", [FLOW, EPSILON], ids=["flow", "epsilon"])
def test_the_loss_is_that_of_the_elements_that_count(schedule: NoiseSchedule, mask: Tensor) -> None:
    results = []
    for cut in (False, True):
        policy, reference = Pointwise(0.3), Pointwise(0.2)
        forward = PairForward(SIPOLoss(schedule, beta=20.0), predict, reference, Accelerator(cpu=True), offload=False)
        pairs = batch(schedule, cut, mask, rest=1e3)  # NaN would come into the gradient through the network
        output, _ = forward(policy, pairs, [0, 1, 2], torch.empty(0), seed=0)
        output.loss.backward()
        results.append([output.loss, output.error_gap, output.model_error, policy.value.grad])  # type: ignore[attr-defined]
    for masked, whole in zip(*results, strict=True):
        torch.testing.assert_close(masked, whole, rtol=1e-6, atol=1e-8)
    assert results[0][3].abs() > 0


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("schedule", [FLOW, EPSILON], ids=["flow", "epsilon"])
def test_reference_errors_are_those_of_the_elements_that_count(schedule: NoiseSchedule, mask: Tensor) -> None:
    """And training with them starts where the policy is the reference."""
    network = Pointwise(0.3)
    pairs = batch(schedule, False, mask)
    errors, levels = _errors(pairs, network, predict, schedule, torch.no_grad)
    whole, of_whole = _errors(batch(schedule, True), network, predict, schedule, torch.no_grad)
    torch.testing.assert_close(errors, whole, rtol=1e-12, atol=0)
    assert torch.equal(levels, of_whole) and errors.shape == (3, 2)
    given = [item | {"ref_error": error} for item, error in zip(items(schedule, False, mask), errors, strict=True)]
    accelerator = Accelerator(cpu=True)
    forward = PairForward(SIPOLoss(schedule, beta=20.0), predict, None, accelerator, offload=False)
    forward.first = FirstStep(accelerator)
    output, _ = forward(network, PairBatch.of_items(collate(given)), [0, 1, 2], torch.empty(0), seed=0)
    assert output.logits.abs().max() < 1e-5  # type: ignore[attr-defined]
    found = forward.first.read()
    assert 0 <= found["start_difference"] < 1e-6 and found["start_logit"] < 1e-5


def test_the_first_step_looks_at_the_elements_that_count() -> None:
    first = FirstStep(Accelerator(cpu=True))
    policy, reference = Pointwise(0.3), Pointwise(0.3)
    forward = PairForward(SIPOLoss(FLOW, beta=20.0), predict, reference, first.accelerator, offload=False)
    forward.first = first
    forward(policy, batch(FLOW, False), [0, 1, 2], torch.empty(0), seed=0)
    assert first.read() == {"start_difference": 0.0, "start_logit": 0.0}


def test_rewards_are_those_of_the_elements_that_count() -> None:
    """A network that predicts x0 = c, and a reference that predicts 0: the gap is c² − 2c·mean(x0)."""

    class Masked(Pairs):
        def __getitem__(self, index: int) -> dict[str, Any]:
            item = super().__getitem__(index)
            mask = torch.zeros(1, 1, 4)
            mask[0, 0, 1:3] = torch.tensor([1.0, 3.0])
            for name in ("chosen", "rejected"):
                item[name] = torch.where(mask == 0, math.nan, item[name])
            return item | {"error_mask": mask}

    class Constant(Pointwise):
        def forward(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
            return self.value.expand_as(noisy)

    pairs, c = Masked(5), 0.3
    schedule = NoiseSchedule.discrete(prediction_type="sample")
    scores = score_pairs(Constant(c), Constant(0.0), schedule, pairs, predict, beta=30.0, draws=2)
    means = (0.25 * pairs.images[..., 1] + 0.75 * pairs.images[..., 2]).double().mean((2, 3))
    for found, mean in zip((scores.chosen, scores.rejected), means.unbind(1), strict=True):
        torch.testing.assert_close(found, -15.0 * (c * c - 2 * c * mean), rtol=1e-5, atol=1e-5)


def test_the_mean_over_what_counts() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, math.nan]])
    assert counted_mean(values[:1], None) == 1.5
    assert counted_mean(values, torch.tensor([[True, False]])) == 2.0
    assert counted_mean(values, torch.tensor([[1.0, 3.0], [4.0, 0.0]])) == pytest.approx(19 / 8)
    assert counted_mean(values, torch.zeros(1, 1)) == 0


# ---- From files ----


def grey(pixels: Tensor) -> bytes:
    """``[H, W]`` uint8 as an image's file."""
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return file.getvalue()


def masked(rows: Sequence[int], pixels: Tensor, **options: Any) -> Records:
    reader = Records.make(**options)
    for row in rows:
        reader.records[row] = replace(reader.records[row], error_mask=grey(pixels))
    return reader


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mask_from_a_file_lies_on_the_latents(tmp_path: Path, dtype: str) -> None:
    """Scaled, cropped and mirrored as the samples are."""
    steps = torch.arange(40 * 48).view(40, 48).remainder(256).to(torch.uint8)  # twice the samples' size
    options = {"random_flip": True, "center_crop": False, "dtype": dtype}
    build(tmp_path, masked(range(12), steps), **options)
    cached = CachedPairs(open_cache(tmp_path))
    for row in range(12):
        generator = torch.Generator().manual_seed(derive_seed(5, RandomStream.CROP, row))
        flip = derive_seed(5, RandomStream.FLIP, row) % 2 == 1
        pixels = resize_and_crop(steps[None], 16, 24, center_crop=False, flip=flip, generator=generator).pixels
        found = cached[row]["error_mask"]
        assert torch.equal(found, (F.avg_pool2d(pixels.float(), 8) / 255).to(getattr(torch, dtype)))
        assert found.shape == (1, *cached[row]["chosen"].shape[1:])
    assert not hasattr(cached, "groups")


def test_a_clips_frames_share_the_mask(tmp_path: Path) -> None:
    class Clips(SmallFamily):
        video = True

        def encode_pixels(self, pipeline: Any, pixels: Tensor, generator: Any = None) -> Tensor:
            return super().encode_pixels(pipeline, pixels[0], generator)[None]

    build(tmp_path, masked(range(12), torch.full((20, 24), 255, dtype=torch.uint8)), family=Clips())
    item = CachedPairs(open_cache(tmp_path))[0]
    assert item["chosen"].shape == (1, 3, 2, 3) and torch.equal(item["error_mask"], torch.ones(1, 1, 2, 3))
    PairBatch.of_items(collate([item]))


def test_pairs_with_and_without_a_mask_are_in_different_groups(tmp_path: Path) -> None:
    white = torch.full((20, 24), 255, dtype=torch.uint8)
    build(tmp_path, masked([0, 2, 7], white, two_sizes=True))
    cached = CachedPairs(open_cache(tmp_path))
    assert sorted(cached.groups) == [[0, 2, 7], [1, 5, 9], [3, 4, 6, 8, 10, 11]]
    for group in cached.groups:
        assert ("error_mask" in collate([cached[index] for index in group])) == (group[0] == 0)


def test_what_lies_outside_of_the_mask_changes_no_error_and_no_step(tmp_path: Path) -> None:
    """Reference errors, training with them and without, and validation: the same bits."""
    left = torch.zeros(16, 24, dtype=torch.uint8)
    left[:, :8] = 255

    def image(content: Any, change: bool) -> bytes:
        pixels = resize_and_crop(read_media(content).pixels, 16, 24).pixels
        if change:
            pixels[:, :, 8:] = 255 - pixels[:, :, 8:]
        file = io.BytesIO()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG")
        return file.getvalue()

    def results(name: str, change: bool, mask: bool = True) -> tuple[Any, ...]:
        reader = masked(range(12) if mask else (), left)
        reader.records = [
            replace(record, chosen=image(record.chosen, change), rejected=image(record.rejected, change))
            for record in reader.records
        ]
        build(tmp_path / name, reader, latents="mode")
        cached, fixed = CachedPairs(open_cache(tmp_path / name)), FixedDraws(2, 3)
        torch.manual_seed(0)
        reference = nn.Conv2d(3, 3, 1)
        call = {"predict": lambda module, noisy, *_: module(noisy), "train_batch_size": 4, "max_train_steps": 3}
        errors = precompute_reference_errors(
            cached.cache, reference, call["predict"], EPSILON, fixed, {}, batch_size=5, progress=False
        )
        drawn = DrawnPairs(cached, EPSILON, fixed, errors)
        found = [torch.stack([drawn[index]["ref_error"] for index in range(24)])]
        for number, data in enumerate((cached, drawn)):
            torch.manual_seed(0)
            policy, result = fit(
                tmp_path / f"{name} {number}", policy=nn.Conv2d(3, 3, 1), reference=None if number else reference,
                data=data, loss_fn=SIPOLoss(EPSILON, beta=20.0), validation=data, validation_steps=3, **call,
            )  # fmt: skip
            found += [*policy.parameters(), untimed(result.history), untimed(result.validation)]
        return tuple(found)

    whole, changed, plain = results("whole", False), results("changed", True), results("plain", False, mask=False)
    for one, other, without in zip(whole, changed, plain, strict=True):
        alike = torch.equal if isinstance(one, Tensor) else list.__eq__
        assert alike(one, other) and not alike(one, without)


@pytest.mark.parametrize(
    ("mask", "kind", "problem"),
    [
        (torch.zeros(20, 24), "mask", "is all black, expected white where errors count"),
        (
            F.pad(torch.full((20, 1), 255), (23, 0)),
            "crop",
            "is all black in the crop that is trained on, expected white where errors count",
        ),
        (
            torch.arange(1440).view(20, 24, 3) * 10 % 256,
            "mask",
            "has colours, expected white where errors count, else black or grey",
        ),
        (torch.full((20, 24, 4), 127), "mask", "has transparent pixels, expected white where errors count, else"),
        (torch.full((24, 24), 255), "shape", "chosen is 20x24 and error_mask 24x24, expected one aspect ratio"),
    ],
)
def test_a_mask_that_cannot_be_one_makes_the_pair_bad(tmp_path: Path, mask: Tensor, kind: str, problem: str) -> None:
    reader, pipeline = masked([5], mask.to(torch.uint8)), Pipeline()
    sizes = [(16, 16)] if mask[0].any() else [(16, 24)]
    with pytest.raises(BadPairError, match=f"^row 6: .*{problem}") as caught:
        build(tmp_path, reader, pipeline, sizes=sizes)
    assert ("`sipo data check` lists them" in str(caught.value)) == (kind != "crop")  # it crops nothing
    summary = build(tmp_path, reader, pipeline, sizes=sizes, skip_bad=True)
    assert (summary.pairs, summary.skipped) == (11, {kind: 1})
