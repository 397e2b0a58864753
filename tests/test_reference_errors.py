"""Reference errors in place of a reference: the same losses, and what is stale, damaged or cut short."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator as Trainer
from torch import Tensor, nn

import sipo.recipe.prepare_data
from sipo import NoiseSchedule, SIPOLoss
from sipo.batch import PairBatch, collate, level_argument, network_timesteps
from sipo.cache.finished import open_cache
from sipo.cache.format import CacheError, DamagedError
from sipo.cache.pairs import CachedPairs, DrawnPairs
from sipo.cache.reference_errors import FixedDraws, open_reference_errors
from sipo.data.config import DataConfig
from sipo.families.config import ModelConfig
from sipo.processes import OtherProcessError
from sipo.recipe.config import Config
from sipo.training.config import TrainingConfig
from sipo.training.forward import PairForward
from tests.data_sets import contents
from tests.small_family import (
    DISCRETE,
    FLOW,
    REFERENCE,
    Accelerator,
    Network,
    Records,
    SmallFamily,
    arguments,
    build,
    in_processes,
    outcomes_in_processes,
    pairs_in,
    reference_errors,
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
    ("dtype", "trainer"), [("float32", "no"), ("bfloat16", "no"), ("float32", "bf16")], indirect=["trainer"]
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
