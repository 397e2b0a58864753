"""What a pass is made of: the stream of pairs, groups of shapes, fixed draws, captions, and the reference's numbers."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sipo.seeds import derive_seed
from sipo.training import AdapterOff
from sipo.training.stream import StreamSampler, drop_captions, pair_noise
from tests.training_cases import Adapted, Network, Pairs, fit, loss, networks, predict, same, untimed, without_adapter

# ---------------------------------------------------------------- the stream of pairs


def test_every_epoch_sees_each_pair_once_in_a_new_order() -> None:
    batches = list(StreamSampler(10, 4, seed=7, first_pass=0, passes=5))
    stream = [i for batch in batches for i in batch]
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))
    assert stream[:10] != stream[10:]
    assert list(StreamSampler(10, 4, seed=7, first_pass=3, passes=5)) == batches[3:]
    assert list(StreamSampler(10, 4, seed=8, first_pass=0, passes=5)) != batches


def test_processes_share_out_one_stream() -> None:
    alone = [i for batch in StreamSampler(11, 6, 0, 0, 4) for i in batch]
    shared = [list(StreamSampler(11, 3, 0, 0, 4, rank, 2)) for rank in range(2)]
    assert [i for a, b in zip(*shared, strict=True) for i in a + b] == alone


def test_noise_belongs_to_the_pair_and_not_to_the_batch() -> None:
    like = torch.empty(64, 1, 8, 8)
    generator = torch.Generator()
    noise = pair_noise(like, range(64), 5, generator)
    assert torch.equal(pair_noise(like[:10], range(20, 30), 5, generator), noise[20:30])
    assert not torch.equal(pair_noise(like, range(64), 6, generator), noise)
    # 4,096 standard normals: four standard errors either way.
    assert noise.mean().abs().item() < 4 / 64
    assert noise.std().item() == pytest.approx(1.0, abs=4 / math.sqrt(2 * 4096))
    flat = noise.flatten(1)
    correlation = torch.corrcoef(flat) - torch.eye(64)
    assert correlation.abs().max().item() < 5.5 / 8


def test_derived_seeds_do_not_collide_in_the_bits_that_torch_uses() -> None:
    seeds = {derive_seed(0, stream, i) & 0xFFFFFFFF for stream in range(3) for i in range(2000)}
    assert len(seeds) == 6000
    assert all(0 <= derive_seed(seed, 1, 2) < 1 << 63 for seed in (0, 1, 1 << 40))


# ---------------------------------------------------------------- groups

GROUPS = [[0, 3, 6, 9, 12, 15, 18], [1, 2, 4, 5], list(range(20, 33)), [40, 7]]
SIZED = sorted(i for group in GROUPS for i in group)
RANKED = [[SIZED.index(i) for i in group] for group in GROUPS]


def test_a_pass_of_all_processes_stays_in_one_group() -> None:
    where = {i: number for number, group in enumerate(RANKED) for i in group}
    shared = [list(StreamSampler(26, 2, 5, 0, 60, rank, 2, RANKED)) for rank in range(2)]
    for batches in zip(*shared, strict=True):
        assert len({where[i] for batch in batches for i in batch}) == 1
    alone = list(StreamSampler(26, 4, 5, 0, 60, groups=RANKED))
    assert [a + b for a, b in zip(*shared, strict=True)] == alone


def test_groups_come_in_a_shuffled_order_and_every_pair_as_often() -> None:
    sampler = StreamSampler(26, 4, 5, 0, 26 * 10, groups=RANKED)
    counts = Counter(i for batch in sampler for i in batch)
    # 260 passes of 4 are 40 epochs exactly, in which each group's last batch may hold another epoch's first pairs.
    assert set(counts) == set(range(26))
    assert all(39 <= n <= 41 for n in counts.values())
    where = {i: number for number, group in enumerate(RANKED) for i in group}
    sequence = [where[batch[0]] for batch in sampler]
    assert Counter(sequence) == Counter({0: 70, 1: 40, 2: 130, 3: 20})
    changes = sum(a != b for a, b in itertools.pairwise(sequence))
    assert changes > 100  # shuffled: not one group after another
    assert sequence[:26] != sequence[26:52]


def test_resuming_into_groups_is_arithmetic() -> None:
    whole = list(StreamSampler(26, 3, 1, 0, 50, groups=RANKED))
    for first in (1, 7, 8, 9, 31, 49):
        assert list(StreamSampler(26, 3, 1, first, 50, groups=RANKED)) == whole[first:]


@pytest.mark.parametrize("batch", [1, 4, 7, 40])
def test_one_group_is_no_group(batch: int) -> None:
    plain = list(StreamSampler(13, batch, 3, 2, 40))
    assert list(StreamSampler(13, batch, 3, 2, 40, groups=[range(13)])) == plain


def test_groups_smaller_than_a_batch_come_up_all_the_same() -> None:
    sampler = StreamSampler(5, 8, 0, 0, 25, groups=[[0, 1, 2, 3], [4]])
    counts = Counter(i for batch in sampler for i in batch)
    assert counts == Counter(dict.fromkeys(range(5), 40))


@pytest.mark.parametrize("groups", [[[0, 1]], [[0, 1, 2], [2]], [[0, 1, 3]]])
def test_groups_that_do_not_cover_the_data_set_are_refused(groups: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="groups: expected every index of the data set's 3 pairs once"):
        StreamSampler(3, 1, 0, 0, 1, groups=groups)
    with pytest.raises(ValueError, match=r"groups\[1\] is empty"):
        StreamSampler(3, 1, 0, 0, 1, groups=[[0, 1, 2], []])


class Shapes(Pairs):
    """Two sizes of image: 4x4 and, for every third, 6x6."""

    groups = ([i for i in range(24) if i % 3], list(range(0, 24, 3)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        if index % 3 == 0:
            item |= {name: torch.nn.functional.pad(item[name], (1, 1, 1, 1)) for name in ("chosen", "rejected")}
        return item


def test_a_run_trains_on_groups(tmp_path: Path) -> None:
    data = Shapes()
    _, result = fit(
        tmp_path, data=data, max_train_steps=12, train_batch_size=4, validation=Shapes(), validation_steps=12
    )
    assert len(set(data.seen)) == 24
    assert math.isfinite(result.validation[0]["validation/loss"])


# ---------------------------------------------------------------- draws, conditions and captions


class Drawn(Pairs):
    """Items with draws of their own, and with errors of a reference where there is one."""

    def __init__(self, reference: Network | None = None, extra: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.reference = reference
        self.without = extra

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        generator = torch.Generator().manual_seed(index)
        item["noise"] = torch.randn(item["chosen"].shape, generator=generator)
        item["level"] = torch.randint(1000, (), generator=generator)
        if self.reference is not None:
            both = torch.stack([item["chosen"], item["rejected"]])
            level = item["level"].repeat(2)
            noise = item["noise"].expand_as(both)
            noisy = loss().schedule.add_noise(both, noise, level)
            with torch.no_grad():
                made = self.reference(noisy, level, item["condition"]["class"].repeat(2))
            item["ref_error"] = (made.double() - noise.double()).square().mean(dim=(1, 2, 3))
        return {name: value for name, value in item.items() if name not in self.without}


def test_training_from_reference_errors_is_training_with_the_reference(tmp_path: Path) -> None:
    _, reference = networks()
    # A policy that has moved, so that the errors differ from the reference's.
    policies = []
    for name in ("network", "errors"):
        policy, _ = networks()
        with torch.no_grad():
            policy.outward.weight += 0.05
        errors = name == "errors"
        options: dict[str, Any] = {
            "reference": None if errors else reference,
            "max_train_steps": 6,
            "max_grad_norm": None,
        }
        data = Drawn(reference if errors else None)
        policies.append((*fit(tmp_path / name, policy=policy, data=data, learning_rate=1e-3, **options), policy))
    (a, with_network, _), (b, with_errors, _) = policies
    for one, other in zip(with_network.history, with_errors.history, strict=True):
        for metric in ("loss", "rewards/margins", "ref_mse", "chosen_gap", "active_fraction"):
            assert one[metric] == pytest.approx(other[metric], rel=1e-4, abs=1e-6), metric
    for one, other in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5)


def test_fixed_draws_are_used_and_no_others(tmp_path: Path) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(module: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
        seen.append((noisy, timesteps))
        return predict(module, noisy, timesteps, condition)

    data = Drawn()
    fit(tmp_path, data=data, max_train_steps=1, predict=spy)
    items = [data[i] for i in data.seen[:4]]
    noisy, timesteps = seen[0]
    assert timesteps.tolist() == 2 * [item["level"].item() for item in items]
    chosen = loss().schedule.add_noise(
        torch.stack([i["chosen"] for i in items]), torch.stack([i["noise"] for i in items]), timesteps[:4]
    )
    assert torch.equal(noisy[:4], chosen)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (Drawn(extra=("noise",)), {}, "items with fixed draws have level: expected noise, level"),
        (
            Drawn(Network(), extra=("noise", "level")),
            {},
            "items with reference errors have ref_error: expected noise, level, ref_error",
        ),
        (Drawn(Network()), {}, "items have 'ref_error' and a reference was given"),
        (Drawn(), {"reference": None}, "reference=None: expected 'ref_error' in the items"),
        (Drawn(extra=("rejected",)), {}, "an item has the keys chosen, .*: expected 'rejected' among them"),
        (
            Pairs(),
            {"proportion_empty_prompts": 0.1},
            "proportion_empty_prompts=0.1: expected a data set with 'unconditional'",
        ),
    ],
)
def test_items_that_do_not_fit_are_refused_in_one_line(
    tmp_path: Path, data: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        fit(tmp_path, data=data, **options)
    assert "\n" not in str(caught.value)


class Own(Pairs):
    """Chosen and rejected sample are told apart."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return super().__getitem__(index) | {"own_condition": {"size": torch.tensor([[index, 1], [index, 2]])}}


def test_each_half_gets_its_own_condition(tmp_path: Path) -> None:
    given: list[dict[str, Tensor]] = []

    def spy(module: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
        given.append(condition)
        return predict(module, noisy, timesteps, condition)

    data = Own()
    fit(tmp_path, data=data, max_train_steps=1, predict=spy)
    rows = data.seen[:4]
    assert given[0]["size"].tolist() == [[i, 1] for i in rows] + [[i, 2] for i in rows]
    assert given[0]["class"].tolist() == 2 * [i % 3 for i in rows]


class Captioned(Pairs):
    def __init__(self) -> None:
        super().__init__()
        self.unconditional = {"class": torch.tensor(2)}

    def __getitem__(self, index: int) -> dict[str, Any]:
        return super().__getitem__(index) | {"condition": {"class": torch.tensor(index % 2)}}


def test_captions_are_dropped_at_the_rate_and_for_both_halves(tmp_path: Path) -> None:
    given: list[Tensor] = []

    def spy(module: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
        given.append(condition["class"])
        return predict(module, noisy, timesteps, condition)

    data = Captioned()
    fit(
        tmp_path / "a",
        data=data,
        max_train_steps=40,
        train_batch_size=10,
        proportion_empty_prompts=0.3,
        predict=spy,
        logging_steps=50,
    )
    classes = torch.stack(given[::2])  # the reference's and the policy's calls have the same
    assert torch.equal(classes, torch.stack(given[1::2]))
    assert torch.equal(classes[:, :10], classes[:, 10:])
    dropped = classes[:, :10].flatten() == 2
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.09)  # four standard errors of 400 draws
    kept = torch.tensor(data.seen)[~dropped] % 2
    assert torch.equal(classes[:, :10].flatten()[~dropped], kept)

    # Which ones hangs on the place in the stream alone, so that accumulation changes nothing.
    given.clear()
    fit(
        tmp_path / "b",
        data=Captioned(),
        max_train_steps=40,
        train_batch_size=5,
        gradient_accumulation_steps=2,
        proportion_empty_prompts=0.3,
        predict=spy,
    )
    samples = torch.stack(given[::2]).view(40, 2, 2, 5)
    assert torch.equal(samples[:, :, 0].reshape(40, 10), classes[:, :10])


def test_an_unconditional_that_does_not_fit_is_refused() -> None:
    condition = {"a": torch.zeros(8, 3), "b": torch.zeros(8)}
    drop_captions(condition, {"a": torch.ones(3), "b": torch.ones(())}, range(8), 0, 0.99)
    assert condition["a"].sum() == 3 * condition["b"].sum() >= 18
    with pytest.raises(
        ValueError, match=r"unconditional\['a'\] is \[4\], expected one row of condition\['a'\], \[8, 3\]"
    ):
        drop_captions(condition, {"a": torch.ones(4), "b": torch.ones(())}, range(8), 0, 0.99)
    with pytest.raises(ValueError, match="'b' is in one of condition and unconditional"):
        drop_captions(condition, {"a": torch.ones(3)}, range(8), 0, 0.99)


@pytest.mark.parametrize("empty", [1, 3, 5])
def test_ragged_text_is_replaced_whatever_the_lengths(empty: int) -> None:
    lengths = torch.tensor([3, 2] * 8)
    mask = torch.arange(3) < lengths[:, None]
    condition = {"text": mask[..., None].float().expand(16, 3, 2).contiguous(), "text_mask": mask}
    before = {name: tensor.clone() for name, tensor in condition.items()}
    unconditional = {"text": torch.full((empty, 2), 7.0), "text_mask": torch.ones(empty, dtype=torch.bool)}
    drop_captions(condition, unconditional, range(16), 0, 0.5)
    dropped = condition["text"][:, 0, 0] == 7
    assert 3 < dropped.sum() < 13 and condition["text"].shape == (16, max(3, empty), 2)
    assert torch.equal(condition["text_mask"].sum(1), torch.where(dropped, empty, lengths))
    assert torch.equal(condition["text"][..., 0] != 0, condition["text_mask"])
    for name, kept in condition.items():
        assert torch.equal(kept[~dropped][:, :3], before[name][~dropped])
    with pytest.raises(ValueError, match=r"unconditional\['text'\] is \[\d, 3\], expected one row of condition"):
        drop_captions(condition, unconditional | {"text": torch.ones(1, 3)}, range(16), 0, 0.5)


# ---------------------------------------------------------------- the reference


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_policy_without_its_adapter_is_as_good_as_a_copy(tmp_path: Path, precision: str) -> None:
    results = []
    for name in ("copy", "off"):
        policy = Adapted(networks()[0])
        reference = AdapterOff(without_adapter) if name == "off" else copy.deepcopy(policy)
        results.append(
            fit(tmp_path / name, policy=policy, reference=reference, max_train_steps=6, mixed_precision=precision)
        )
    (copied, one), (switched, other) = results
    assert same(copied.adapter, switched.adapter)
    assert untimed(one.history) == untimed(other.history)
    assert one.history[-1]["chosen_gap"] != 0 < copied.adapter.weight.abs().sum()


def test_full_training_against_itself_keeps_its_gradients_under_autocast(tmp_path: Path) -> None:
    # Were the weights that autocast has cast without gradients, for the reference, used again, none would flow.
    policy, _ = networks()
    before = copy.deepcopy(policy)
    itself = AdapterOff(lambda network: contextlib.nullcontext())
    _, result = fit(tmp_path, policy=policy, reference=itself, max_train_steps=2, mixed_precision="bf16")
    assert result.history[0]["grad_norm"] > 1e-3
    assert all(not torch.equal(a, b) for a, b in zip(policy.parameters(), before.parameters(), strict=True))


def test_a_reference_in_host_memory_changes_nothing(tmp_path: Path) -> None:
    here, one = fit(tmp_path / "here", max_train_steps=4)
    _, reference = networks()
    tensors = [p.data_ptr() for p in reference.parameters()]
    there, other = fit(tmp_path / "there", max_train_steps=4, reference=reference, offload_reference=True)
    assert same(here, there) and untimed(one.history) == untimed(other.history)
    assert [p.data_ptr() for p in reference.parameters()] == tensors and same(reference, networks()[1])
