"""Implicit rewards: against what they are on paper, standard errors against the spread they claim, the command."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sipo import NoiseSchedule, cli
from sipo.analysis.score import PairScores, score_pairs
from sipo.data.readers import JsonlReader
from sipo.families import get_family
from sipo.families.tuning import load_saved, save_full, save_lora
from sipo.recipe import config
from sipo.recipe.build import build, datasets, open_run
from sipo.recipe.prepare_data import prepare_data
from sipo.recipe.train import TRAINED_ON
from sipo.training import AdapterOff
from sipo.training.sums import SUMS
from tests.data_sets import flip_bit
from tests.test_run import example, options
from tests.test_run import train as train_toy
from tests.training_cases import Adapted, Network, Pairs, networks, predict, without_adapter

BETA = 30.0


class Constant(nn.Module):
    """Predicts one number, or the noise level times it."""

    def __init__(self, value: float, by_level: bool = False) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))
        self.by_level = by_level

    def forward(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        level = timesteps / 1000 if self.by_level else torch.ones(len(noisy))
        return (self.value * level)[:, None, None, None].expand_as(noisy)


def call(module: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
    return module(noisy, timesteps)


def score(policy: nn.Module, reference: Any, data: Any, predict: Any = call, **options: Any) -> PairScores:
    schedule = NoiseSchedule.discrete(prediction_type=options.pop("prediction_type", "epsilon"))
    return score_pairs(policy, reference, schedule, data, predict, beta=BETA, **options)


def moved(network: Network, amount: float = 0.1) -> Network:
    """A policy that is not the reference."""
    policy = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += amount * torch.randn(parameter.shape, generator=generator)
    return policy


# ---- What a reward is ----


def test_rewards_are_those_on_paper() -> None:
    """A network that predicts x0 = c, and a reference that predicts 0: the gap is c² − 2c·mean(x0), without noise."""
    pairs, c = Pairs(11), 0.3
    pairs.images[:3] = pairs.images[:3].flip(1)  # labelled the other way round
    scores = score(Constant(c), Constant(0.0), pairs, prediction_type="sample", draws=4)
    chosen, rejected = pairs.images.double().mean(dim=(2, 3, 4)).unbind(1)
    for found, se, means in (
        (scores.chosen, scores.chosen_se, chosen),
        (scores.rejected, scores.rejected_se, rejected),
    ):
        torch.testing.assert_close(found, -0.5 * BETA * (c * c - 2 * c * means), rtol=1e-5, atol=1e-5)
        assert se.max() < 1e-5  # nothing hangs on the draw
    torch.testing.assert_close(scores.margin, BETA * c * (chosen - rejected), rtol=1e-5, atol=1e-5)
    assert (scores.beta, scores.draws, len(scores)) == (BETA, 4, 11)
    summary = scores.summary()
    right = (chosen > rejected).double()
    assert 0.5 < right.mean() < 1
    assert summary["accuracy"] == pytest.approx(right.mean().item())
    smooth = (right.sum().item() + 1) / 13  # one pair more of each kind
    assert summary["accuracy_se"] == pytest.approx((smooth * (1 - smooth) / 11) ** 0.5)
    assert summary["margin"] == pytest.approx((BETA * c * (chosen - rejected)).mean().item(), rel=1e-5)
    assert summary["decided"] == 1.0 and summary["decided_accuracy"] == summary["accuracy"]


def test_both_halves_see_the_same_noise() -> None:
    """ε predicted as a constant: the gap c² − 2c·mean(ε) is luck, the same luck for both, and the margin is 0."""
    c, elements, draws = 0.5, 16, 8
    scores = score(Constant(c), Constant(0.0), Pairs(200), draws=draws)
    assert torch.equal(scores.margin, torch.zeros(200).double()) and torch.equal(scores.margin_se, scores.margin)
    assert scores.summary()["accuracy"] == 0.5 and scores.summary()["decided"] == 0.0
    spread = BETA * c / (elements * draws) ** 0.5  # ½β · 2c · sd(mean(ε)) over √draws
    assert scores.chosen_se.square().mean().sqrt().item() == pytest.approx(spread, rel=0.1)
    assert scores.chosen.std().item() == pytest.approx(spread, rel=0.15)
    assert scores.chosen.mean().item() == pytest.approx(-0.5 * BETA * c * c, abs=4 * spread / 200**0.5)


def test_levels_are_stratified() -> None:
    """x0 predicted as c·t/T: the gap is c²u² − 2cu·mean(x0), whose mean over u in [0, 1] is c²/3 − c·mean(x0)."""
    pairs, c, draws = Pairs(50), 2.0, 32
    scores = score(Constant(c, by_level=True), Constant(0.0), pairs, prediction_type="sample", draws=draws)
    chosen = pairs.images.double().mean(dim=(2, 3, 4))[:, 0]
    error = scores.chosen + 0.5 * BETA * (c * c / 3 - c * chosen)
    # 16 strata: within one, u spreads by 1/16/√12, and the gap by at most its slope times that.
    bound = 0.5 * BETA * (2 * c * c + 2 * c * chosen.abs()) / (16 * 12**0.5) / draws**0.5
    assert (error.abs() < 4 * bound + 0.02).all()  # the pool stands for the levels to 1/√65536
    random = 0.5 * BETA * c * c * 0.3 / draws**0.5  # sd(u²) = 0.298: what random levels would leave
    assert error.std() < 0.3 * random


def test_standard_errors_are_the_spread_over_seeds() -> None:
    _, reference = networks()
    policy, pairs = moved(reference), Pairs(24)
    runs = [score(policy, reference, pairs, predict, seed=seed, draws=8) for seed in range(40)]
    for name in ("chosen", "rejected", "margin"):
        spread = torch.stack([getattr(run, name) for run in runs]).var(dim=0).mean().sqrt()
        claimed = torch.stack([getattr(run, f"{name}_se") for run in runs]).square().mean().sqrt()
        assert claimed.item() == pytest.approx(spread.item(), rel=0.1), name
    # Paired: without it the margin's error would be that of two rewards.
    first = runs[0]
    assert first.margin_se.mean() < 0.9 * (first.chosen_se.square() + first.rejected_se.square()).sqrt().mean()


def of_margins(*margins: float) -> PairScores:
    """Scores with these margins, each certain."""
    values, zero = torch.tensor(margins, dtype=torch.float64), torch.zeros(len(margins), dtype=torch.float64)
    return PairScores(values, zero, zero, zero, values, zero, beta=BETA, draws=4)


def test_few_pairs_are_not_said_to_be_certain() -> None:
    """Four of four ranked right is not 100 ± 0 %, and not more than coin flips do: one time in sixteen."""
    summary = of_margins(1.0, 2.0, 3.0, 4.0).summary()
    assert summary["accuracy"] == 1.0 and summary["accuracy_se"] == pytest.approx((5 / 36 / 4) ** 0.5)
    text = of_margins(1.0, 2.0, 3.0, 4.0).describe()
    assert "the chosen sample is preferred in 100.0 ± 18.6 % of 4, no more often than chance explains" in text
    assert "100.0 ± 18.6 % are decided at 2 standard errors, 100.0 ± 18.6 % of these 4 for the chosen sample" in text
    # 12 of 16 happen to coin flips in one case of 26, 13 of 16 in one of 94.
    for right, words in ((12, "no more often than chance explains"), (13, "more often than by chance")):
        scores = of_margins(*[1.0] * right, *[-1.0] * (16 - right))
        assert f" of 16, {words}\n" in scores.describe()
        assert scores.summary()["beyond_chance"] == (right == 13)
    one = of_margins(1.0)
    assert "in 100.0 ± 47.1 % of 1, no more often" in one.describe() and one.summary()["margin_se"] is None
    broken = of_margins(float("nan"), float("inf"))
    assert broken.summary()["accuracy"] is None and broken.describe().endswith("2 pairs left out: a NaN or an infinity")
    none = dataclasses.replace(of_margins(1.0, -1.0), margin_se=torch.full((2,), 9.0).double())
    assert none.describe().endswith("0.0 ± 30.6 % are decided at 2 standard errors")


# ---- What it hangs on ----


def test_the_same_seed_gives_the_same_numbers_however_pairs_are_batched() -> None:
    _, reference = networks()
    policy = moved(reference)
    one, again, other = (score(policy, reference, Pairs(13), predict, seed=3) for _ in range(3))
    assert torch.equal(one.margin, again.margin) and torch.equal(one.chosen_se, other.chosen_se)
    small = score(policy, reference, Pairs(13), predict, seed=3, batch_size=3)
    torch.testing.assert_close(small.margin, one.margin, rtol=1e-4, atol=1e-5)
    assert (score(policy, reference, Pairs(13), predict, seed=4).margin - one.margin).abs().min() > 0
    # A pair's draws are its own: fewer pairs change nothing about the first.
    few = Pairs(13)
    few.images = few.images[:5]
    torch.testing.assert_close(
        score(policy, reference, few, predict, seed=3).margin, one.margin[:5], rtol=1e-4, atol=1e-5
    )


def test_adapters_off_are_a_reference_as_a_copy_is() -> None:
    base, copied = networks()
    adapted = Adapted(base).train()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        adapted.adapter.weight.copy_(0.2 * torch.randn(adapted.adapter.weight.shape, generator=generator))
    one = score(adapted, AdapterOff(without_adapter), Pairs(9), predict)
    other = score(adapted, copied, Pairs(9), predict)
    assert torch.equal(one.margin, other.margin) and one.margin.abs().min() > 0
    assert adapted.training and adapted.on  # as it came


class Fixed(Pairs):
    """Items with draws of their own, in two groups."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.groups = [list(range(0, count, 2)), list(range(1, count, 2))]

    def __getitem__(self, index: int) -> dict[str, Any]:
        fixed = {"noise": torch.zeros(1, 4, 4), "level": torch.tensor(7), "ref_error": torch.ones(2).double()}
        return super().__getitem__(index) | fixed


def test_fixed_draws_are_replaced_and_groups_kept_apart() -> None:
    _, reference = networks()
    policy, data = moved(reference), Fixed(10)
    found = score(policy, reference, data, predict, batch_size=4)
    torch.testing.assert_close(found.margin, score(policy, reference, Pairs(10), predict).margin, rtol=1e-4, atol=1e-5)
    assert data.seen == [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]


def test_a_broken_pair_is_counted_and_left_out() -> None:
    pairs = Pairs(6)
    pairs.images[2, 1] = float("nan")
    _, reference = networks()
    scores = score(moved(reference), reference, pairs, predict)
    summary, lines = scores.summary(), list(scores.lines())
    assert summary["pairs"] == 6 and summary["nonfinite_pairs"] == 1
    assert lines[2]["margin"] is None and lines[2]["reward_rejected"] is None and lines[2]["reward_chosen"] is not None
    others = scores.margin[[0, 1, 3, 4, 5]]
    assert summary["accuracy"] == pytest.approx((others > 0).double().mean().item())
    assert lines[3] == {
        "index": 3,
        "reward_chosen": scores.chosen[3].item(),
        "reward_chosen_se": scores.chosen_se[3].item(),
        "reward_rejected": scores.rejected[3].item(),
        "reward_rejected_se": scores.rejected_se[3].item(),
        "margin": scores.margin[3].item(),
        "margin_se": scores.margin_se[3].item(),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 3}, "draws=3: expected an even number, at least 2"),
        ({"draws": 0}, "draws=0: expected an even number"),
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"reference": None}, "reference=None: expected a network, or AdapterOff"),
        ({"data": Pairs(0)}, "holds 0 pairs, expected at least 1"),
        ({"distribution": "even"}, "distribution='even'"),
    ],
)
def test_what_cannot_be_scored_is_said(options: dict[str, Any], message: str) -> None:
    policy, reference = networks()
    arguments = {"reference": reference, "data": Pairs(2), "predict": predict} | options
    with pytest.raises(ValueError, match=message):
        score(policy, **arguments)


# ---- The command ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of a toy example, tuned with LoRA."""
    folder = tmp_path_factory.mktemp("scored")
    train_toy("sd15", *options(folder, 3, "samples.validation_prompts=[]", "training.learning_rate=1e-3"))
    return folder


def test_a_run_is_scored_by_the_weights_that_it_saved(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, output = trained / "run", tmp_path / "new" / "scores.jsonl"
    assert cli.main(["score", str(run), "--output", str(output), "--draws", "4"]) == 0
    told = capsys.readouterr().out
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2, 3] and "4 pairs, 4 draws each, beta 1000" in told  # held out
    prompts = {record.row: record.prompt for record in JsonlReader(trained / "cache-toy" / "pairs" / "pairs.jsonl")}
    assert all(line["prompt"] == prompts[line["row"] - 1] for line in lines)
    right = sum(line["margin"] > 0 for line in lines) / 4
    assert f"the chosen sample is preferred in {100 * right:.1f} ±" in told and str(run / "weights") in told
    assert " of 4, no more often than chance explains\n" in told and "pairs: held out of training\n" in told
    # The same numbers by hand: the network, its adapter from diffusers' own loader, and its own base.
    import diffusers

    settings = config.load_config(run / "config.yaml")
    opened = open_run(settings)
    held_out = datasets(opened, prepare_data(opened, progress=False).cache, None)[1]
    assert held_out is not None
    family = get_family("sd15")
    pipeline = getattr(diffusers, family.pipeline_class).from_pretrained(opened.model_path)
    base = copy.deepcopy(pipeline.unet)
    pipeline.load_lora_weights(run / "weights", weight_name="pytorch_lora_weights.safetensors")
    expected = score_pairs(pipeline.unet, base, opened.schedule, held_out, family.predict, beta=1000.0, draws=4)
    assert expected.margin.abs().min() > 5e-4  # well above what they are compared to below
    columns = {"margin": expected.margin, "margin_se": expected.margin_se, "reward_chosen": expected.chosen}
    for name, values in columns.items():
        torch.testing.assert_close(torch.tensor([x[name] for x in lines]).double(), values, rtol=1e-3, atol=1e-4)
    # From the configuration, of all pairs, and the same again.
    again = ["score", str(example("sd15")), *options(trained, 3), "--draws", "4", "--output", str(tmp_path / "b.jsonl")]
    assert cli.main([*again, "--of", "all"]) == 0 and len((tmp_path / "b.jsonl").read_text().splitlines()) == 32
    assert "most of which it was trained on: they do not tell learnt from learnt by heart" in capsys.readouterr().out
    assert cli.main(again) == 0 and (tmp_path / "b.jsonl").read_bytes() == output.read_bytes()
    assert not list(tmp_path.rglob(".*"))


def test_scores_are_the_runs_and_replace_nothing_else(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained / "run"
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # its own earlier ones are replaced
        assert cli.main(["score", str(run), "--draws", "2", "data.held_out=0"]) == 0
        told = capsys.readouterr().out
        assert f"scores: {run / 'scores.jsonl'}" in told
        assert "pairs: all of them; which were held out of training is unknown: data.held_out=0, 4 in tra" in told
    assert len((run / "scores.jsonl").read_text(encoding="utf-8").splitlines()) == 32 and not list(tmp_path.iterdir())
    # What others have written is not, and that is said before a model is opened.
    others = (run / "metrics.jsonl", trained / "cache-toy" / "pairs" / "pairs.jsonl", tmp_path / "page.html")
    others[-1].write_text("<!doctype html>\n<title>mine</title>\n")
    kept = {path: path.read_bytes() for path in others}
    monkeypatch.setattr("sipo.recipe.score_run.open_run", None)
    for path, text in kept.items():
        for command, what in (("score", "scores of `sipo score`"), ("analyze", "a page of `sipo analyze`")):
            assert cli.main([command, str(run), "--output", str(path)]) == 2
            error = capsys.readouterr().err
            assert error == f"sipo: error: {path}: exists already, expected a new file or {what}\n"
        assert path.read_bytes() == text
    page = ["analyze", str(example("sd15")), *options(trained, 3), "--output", str(run / "config.yaml")]
    assert cli.main(page) == 2 and "exists already, expected a new file or a page of" in capsys.readouterr().err


def test_held_out_is_said_of_the_data_that_was_trained_on_alone(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompts decide what is held out: with others, pairs that were trained on would count as held out."""
    folder = tmp_path / "here"
    shutil.copytree(trained, folder)
    score = ["score", str(folder / "run"), "--draws", "2", "--output", str(tmp_path / "scores.jsonl")]
    score += [f"data.cache={folder / 'cache'}", f"training.output_dir={folder / 'run'}"]
    assert cli.main([*score, "--of", "training"]) == 0
    assert "pairs: that it was trained on, which" in capsys.readouterr().out
    unknown = "which were held out of training is unknown: "

    def assert_unknown(why: str, *overrides: str) -> None:
        assert cli.main([*score, *overrides]) == 0
        assert f"pairs: all of them; {unknown}{why}\n" in capsys.readouterr().out
        assert len((tmp_path / "scores.jsonl").read_text().splitlines()) == 32
        for of in ("held-out", "training"):
            assert cli.main([*score, *overrides, "--of", of]) == 2
            assert f"error: --of {of}: {unknown}{why}" in capsys.readouterr().err

    assert_unknown("data.held_out=3, 4 in training", "data.held_out=3")
    pairs = folder / "cache-toy" / "pairs" / "pairs.jsonl"
    text = pairs.read_text()
    pairs.write_text(text.replace('"prompt": "', '"prompt": "once more '))
    assert_unknown("the data, or how it is encoded, has changed since")
    pairs.write_text(text)
    assert cli.main(score) == 0 and "pairs: held out of training\n" in capsys.readouterr().out
    (folder / "run" / "weights" / SUMS).unlink()  # weights of another origin
    for content in ("[1]", "{"):
        (folder / "run" / "weights" / TRAINED_ON).write_text(content)
        assert_unknown(f"{folder / 'run' / 'weights' / TRAINED_ON} cannot be read")
    (folder / "run" / "weights" / TRAINED_ON).unlink()
    assert_unknown(f"{folder / 'run' / 'weights' / TRAINED_ON} cannot be read")


def test_another_network_under_the_same_path_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter, and rewards against a reference, mean nothing on other weights than those it was trained from."""
    model, output = tmp_path / "model", tmp_path / "scores.jsonl"
    shutil.copytree(trained / "cache-toy" / "model", model)
    score = [
        "score",
        str(trained / "run"),
        "--draws",
        "2",
        "--output",
        str(output),
        f"model.pretrained_model_name_or_path={model}",
    ]
    assert cli.main(score) == 0  # elsewhere, and the same
    output.unlink()
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor + 0.5 for name, tensor in tensors.items()}, weights, {"format": "pt"})
    assert cli.main(score) == 2 and not output.exists()
    error = capsys.readouterr().err
    assert error.startswith(f"sipo: error: {trained / 'run' / 'weights'}: trained from other weights: unet/")
    assert "diffusion_pytorch_model.safetensors has changed (hash " in error and error.count("\n") == 1


def test_weights_that_were_saved_load_as_they_were(trained: Path, tmp_path: Path) -> None:
    settings = config.load_config(trained / "run" / "config.yaml")
    family = get_family("sd15")
    for tuning in ("lora", "full"):
        model = dataclasses.replace(settings.model, tuning=tuning)
        opened = open_run(dataclasses.replace(settings, model=model))
        network, other = build(opened)[0], build(opened)[0]
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        (save_lora if tuning == "lora" else save_full)(family, network, tmp_path / tuning)
        load_saved(family, other, tmp_path / tuning)
        pairs = zip(network.state_dict().items(), other.state_dict().items(), strict=True)
        assert all(name == found and torch.equal(a, b) for (name, a), (found, b) in pairs)
        with pytest.raises(FileNotFoundError, match=r"expected the weights of a run with (LoRA|full) tuning"):
            load_saved(family, other, tmp_path / "nowhere")
    wide = dataclasses.replace(settings.model, lora=dataclasses.replace(settings.model.lora, rank=7))
    network, _ = build(open_run(dataclasses.replace(settings, model=wide)))
    with pytest.raises(ValueError, match="expected weights of this model") as caught:
        load_saved(family, network, tmp_path / "lora")
    assert str(caught.value).count("size mismatch") == 1  # of dozens


def test_full_tuning_and_reference_errors_are_scored_against_a_copy(trained: Path, tmp_path: Path) -> None:
    """The configuration has no network for a reference: one is made."""
    full = ["model.tuning=full", "data.draws=2", "data.reference_errors=true", "samples.validation_prompts=[]"]
    train_toy("sd15", *options(tmp_path, 2, *full, "training.learning_rate=1e-3", cache=trained / "cache"))
    output = tmp_path / "scores.jsonl"
    assert cli.main(["score", str(tmp_path / "run"), "--draws", "2", "--output", str(output)]) == 0
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 4 and all(abs(line["reward_chosen"]) > 1e-3 for line in lines)  # it is not its own reference


def test_nothing_is_read_or_made_in_vain(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read: list[int] = []
    records = JsonlReader.__iter__

    def counted(self: JsonlReader) -> Iterator[Any]:
        for record in records(self):
            read.append(record.row)
            yield record

    monkeypatch.setattr(JsonlReader, "__iter__", counted)
    output = tmp_path / "scores.jsonl"
    assert cli.main(["score", str(trained / "run"), "--draws", "2", "--output", str(output)]) == 0
    rows = [json.loads(line)["row"] - 1 for line in output.read_text(encoding="utf-8").splitlines()]
    assert max(rows) < 31 and read == list(range(max(rows) + 2))  # the first that is too far ends it
    # What a command may run into is one line.
    for error, message in (
        (torch.OutOfMemoryError("Tried to\nallocate 2 GiB."), "out of memory; lower training.train_batch_size or"),
        (FloatingPointError("pairs 3 of 4 are not finite"), "pairs 3 of 4 are not finite"),
    ):
        monkeypatch.setattr("sipo.recipe.score_run.score_pairs", Mock(side_effect=error))
        assert cli.main(["score", str(trained / "run"), "--output", str(output)]) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(f"sipo: error: {message}") and last.endswith(str(error).split("\n")[-1])
    # Nor is anything made that could not be written.
    monkeypatch.setattr("sipo.recipe.score_run.open_run", None)
    assert cli.main(["score", str(trained / "run"), "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith(f"sipo: error: {tmp_path}: is a folder, expected a file to write\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{empty}"], "no config.yaml, expected the folder of a run of `sipo train`"),
        (["{run}", "--weights", "{empty}/no"], "no such folder, expected the weights of a run"),
        (["{run}", "--weights", "{empty}"], "no pytorch_lora_weights.safetensors, expected the weights of a run"),
        (["{run}", "--draws", "5"], "draws=5: expected an even number, at least 2"),
        (["{run}", "data.held_out=0", "--of", "held-out"], "data.held_out=0: expected some for --of held-out"),
        (["{run}", "model.lora.rank=3"], "expected weights of this model"),
        (["{empty}/no"], "no such file or folder, expected the folder of a run or a YAML file"),
    ],
)
def test_what_the_command_cannot_score_is_one_line(
    arguments: list[str], message: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"run": trained / "run", "empty": tmp_path}
    output = tmp_path / "scores.jsonl"
    assert cli.main(["score", *(word.format(**places) for word in arguments), "--output", str(output)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sipo: error: ") and message in error and not output.exists()


def scored(run: Path, *more: str) -> int:
    return cli.main(["score", str(run), "--draws", "2", *more])


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "trained_on.json", "SHA256SUMS"])
def test_one_flipped_bit_of_the_weights_is_noticed(
    name: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any network is built."""
    monkeypatch.setattr("sipo.recipe.score_run.open_run", Mock(side_effect=AssertionError("too late")))
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    path = run / "weights" / name
    flip_bit(path, path.stat().st_size // 2)
    assert scored(run, "--output", str(tmp_path / "scores.jsonl")) == 2
    error = capsys.readouterr().err
    assert error.startswith("sipo: error: ") and str(run / "weights") in error and error.count("\n") == 1
    assert "damaged" in error or f"not in {SUMS}" in error or "missing" in error
    assert not (tmp_path / "scores.jsonl").exists()


def test_damaged_weights_without_hashes_are_one_line_too(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "weights"
    shutil.copytree(trained / "run" / "weights", weights)
    (weights / SUMS).unlink()
    here = ["--weights", str(weights), "--output", str(tmp_path / "scores.jsonl")]
    file = weights / "pytorch_lora_weights.safetensors"
    sound = file.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for damage in (sound[:-1], sound[:9], b"", b"\x80\x04", sound[:20] + b"\xff" + sound[21:], pointer):
        file.write_bytes(damage)
        assert scored(trained / "run", *here) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"sipo: error: {file}: ") and error.count("\n") == 1
    file.write_bytes(sound)
    assert scored(trained / "run", *here) == 0
    assert f"weights: {weights} (no {SUMS}, so that damage would go unnoticed)" in capsys.readouterr().out
