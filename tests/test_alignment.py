"""The alignment study: its tasks, losses, measurements and claims; and a small grid, which guards learning itself."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.alignment import conclusions, estimates, gradient_variance, tasks
from benchmarks.alignment.__main__ import COMMITTED, main
from benchmarks.alignment.cells import GRIDS, Cell
from benchmarks.alignment.grid import load, run_grid
from benchmarks.alignment.variants import PARTS, RELATIVES, make_loss
from sipo import NoiseSchedule, SIPOLoss
from sipo.demo.model import build_scheduler

STEPS, SAMPLES = 40, 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of every test here: base samples are kept below it."""
    path = tmp_path_factory.mktemp("alignment")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        yield path


@pytest.fixture(scope="module")
def smoke(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The smoke grid, run once, with its results file; gradients are measured at fewer levels and on fewer batches."""
    path = folder / "cells.json"
    with pytest.MonkeyPatch.context() as patch:
        every = gradient_variance.levels_of
        patch.setattr(gradient_variance, "levels_of", lambda schedule: every(schedule)[::4])
        patch.setattr(gradient_variance, "BATCHES", 3)
        return path, run_grid(GRIDS["smoke"](), path, workers=0, steps=STEPS, samples=SAMPLES)


def batch(pairs: int = 6, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    ref, noise, step = (torch.randn(2 * pairs, 1, 8, 8, generator=generator) for _ in range(3))
    target = noise + 0.5 * ref
    model = (target + 0.5 * ref + 0.05 * step).requires_grad_(True)
    timesteps = torch.linspace(20, 900, pairs).long().repeat(2)  # the mask drops the first, and not the last
    return model, target + 0.5 * ref, target, timesteps


def gradient(loss_fn: Any, *inputs: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss_fn(*inputs).loss, inputs[0])[0]


# ---------------------------------------------------------------- learning


def test_preference_training_raises_the_reward_and_fine_tuning_does_not(smoke: tuple[Path, dict[str, Any]]) -> None:
    """What every change to the loss, the loop or the kernels must leave alone: a few steps move samples."""
    results = smoke[1]
    records = {record["method"]: record for record in results["cells"]}
    base = results["bases"]["digits"]["rewards"]["ink"]
    spread = results["bases"]["digits"]["real_spread"]["ink"]
    for method in ("sipo", "diffusion_dpo"):
        record = records[method]
        assert record["rewards"]["ink"] - base > 0.5 * spread, method
        assert record["agreement"] > 0.8, method
        assert record["accuracy"]["data"]["ink"] > 0.75, method
        assert record["accuracy"]["base"]["ink"] > 0.75, method
    # chosen samples alone teach what good images look like, not to go beyond them
    assert abs(records["sft"]["rewards"]["ink"] - base) < 0.5 * spread
    assert records["sipo"]["end"]["active_fraction"] < 1 <= records["diffusion_dpo"]["end"]["active_fraction"]


def test_records_hold_what_the_study_measures(smoke: tuple[Path, dict[str, Any]]) -> None:
    for record in smoke[1]["cells"]:
        assert set(record["rewards"]) == {"ink", "slant"}
        assert 0 <= record["agreement"] <= 1 and 0 < record["diversity"] < 2 and record["distance"] > 0
        assert len(record["curve"]["grad_norm"]) == STEPS // 10 and record["grad_norm"]["std"] > 0
        assert sum(record["timesteps"]["late"]["count"]) > 0
    probed = next(record for record in smoke[1]["cells"] if record["method"] == "diffusion_dpo")
    for where in ("probe", "probe_base"):
        found = probed[where]
        assert len(found["levels"]) == len(found["variance"]["sipo"]) == 3
        assert min(found["variance"]["diffusion_dpo"]) > 0
        assert found["active"]["diffusion_dpo"] == [1.0] * 3
        assert found["active"]["sipo"][0] == 0 and found["variance"]["sipo"][0] == 0  # t = 10: the terminal step


def test_a_grid_that_was_stopped_goes_on(smoke: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: Any) -> None:
    results = smoke[1]
    shorter = tmp_path / "cells.json"
    shorter.write_text(json.dumps({**results, "cells": results["cells"][1:]}), encoding="utf-8")
    missing = Cell.of(results["cells"][0])
    again = run_grid(GRIDS["smoke"](), shorter, workers=0, steps=STEPS, samples=SAMPLES)
    assert "2 done already, 1 to run" in capsys.readouterr().out
    assert Cell.of(again["cells"][-1]) == missing
    volatile = {"seconds", "training_seconds", "commit"}
    first, second = (
        {k: v for k, v in r.items() if k not in volatile} for r in (results["cells"][0], again["cells"][-1])
    )
    assert first == second  # the same cell gives the same numbers
    assert load(shorter)["cells"] == again["cells"]


def test_cells_run_in_processes_of_their_own(tmp_path: Path, smoke: tuple[Path, dict[str, Any]]) -> None:
    cell = GRIDS["smoke"]()[2]
    found = run_grid([cell], tmp_path / "cells.json", workers=1, steps=STEPS, samples=SAMPLES)["cells"][0]
    same = next(record for record in smoke[1]["cells"] if record["method"] == "sft")
    assert found["rewards"] == same["rewards"] and found["curve"] == same["curve"]


# ---------------------------------------------------------------- cells and command


def test_grids_name_each_cell_once() -> None:
    quick, standard = GRIDS["quick"](), GRIDS["standard"]()
    assert len(quick) == len(set(quick)) == 3 * (4 * 5 + 1)
    assert len(standard) == len(set(standard)) and set(quick) <= set(standard)
    assert {cell.variant for cell in standard} == {"", *PARTS, *RELATIVES}
    assert {cell.noise for cell in standard} == {0.0, 0.1, 0.3} and {cell.fraction for cell in standard} == {
        0.1,
        0.5,
        1.0,
    }
    assert len({cell.key for cell in standard}) == len(standard)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "ppo"}, "method='ppo': expected one of"),
        ({"variant": "magic"}, "variant='magic': expected one of"),
        ({"source": "web"}, "source='web': expected one of 'data', 'base'"),
    ],
)
def test_a_cell_that_is_not_known(change: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cell(**change)  # type: ignore[arg-type]


def test_command_lists_and_refuses(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "cells.json"
    assert main(["--list", "--only", "method=sft", "--output", str(path)]) == 0
    assert capsys.readouterr().out.count("missing") == 3
    for arguments, message in (
        (["--only", "nonsense"], "--only='nonsense': no cell"),
        (["--workers", "-1"], "--workers=-1: expected at least 0"),
    ):
        with pytest.raises(SystemExit):
            main([*arguments, "--output", str(path)])
        assert message in capsys.readouterr().err
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["--summary", "--output", str(path)])
    assert "expected results of benchmarks.alignment" in capsys.readouterr().err


# ---------------------------------------------------------------- tasks


def test_pairs_are_right_but_for_the_noise_asked_for() -> None:
    task = tasks.DIGITS
    images = task.data()[0]
    values = task.rewards["slant"](images.images)
    clean = tasks.RewardPairs(images, task.rewards["slant"], count=2000, seed=3)
    chosen, rejected = clean.pairs.T
    assert bool((values[chosen] > values[rejected]).all()) and torch.equal(
        images.labels[chosen], images.labels[rejected]
    )
    noisy = tasks.RewardPairs(images, task.rewards["slant"], count=2000, noise=0.3, seed=3)
    swapped = (noisy.pairs == clean.pairs.flip(1)).all(1)
    assert bool(((noisy.pairs == clean.pairs).all(1) | swapped).all())
    assert 0.26 < swapped.double().mean().item() < 0.34
    tenth = tasks.RewardPairs(images, task.rewards["slant"], count=2000, fraction=0.1, seed=3)
    assert torch.equal(tenth.pairs, clean.pairs[:200])
    item = clean[5]
    assert torch.equal(item["chosen"], images.images[chosen[5]]) and item["condition"] == images.labels[chosen[5]]


def test_slant_is_the_shear_of_a_stroke() -> None:
    paper = torch.full((3, 1, 8, 8), -1.0)
    for row in range(8):
        paper[0, 0, row, 4] = 1.0  # upright
        paper[1, 0, row, 7 - row] = 1.0  # one column to the right per row upwards
        paper[2, 0, row, row] = 1.0
    assert torch.allclose(tasks.slant(paper), torch.tensor([0.0, 1.0, -1.0]), atol=1e-6)
    assert tasks.slant(torch.full((1, 1, 8, 8), -1.0)).item() == 0.0


def test_distance_of_gaussians() -> None:
    generator = np.random.default_rng(0)
    a = generator.normal(size=(4000, 3)) * [1.0, 2.0, 0.5]
    b = generator.normal(size=(4000, 3)) * [1.5, 1.0, 0.5] + [1.0, 0.0, -2.0]
    exact = (1 + 4) + (0.5**2 + 1.0**2 + 0.0)  # means, then deviations: axes are principal
    assert tasks.frechet_distance(a, b) == pytest.approx(exact, rel=0.05)
    assert tasks.frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)
    assert tasks.frechet_distance(a, b) == pytest.approx(tasks.frechet_distance(b, a), rel=1e-9)


def test_diversity_falls_where_samples_agree() -> None:
    features, classes = np.random.default_rng(0).normal(size=(100, 4)), torch.arange(100) % 10
    assert tasks.spread_within(0.5 * features, classes) == pytest.approx(0.5 * tasks.spread_within(features, classes))


def test_tasks_by_name() -> None:
    for name in ("digits", "moving-cogvideox", "moving-wan"):
        assert tasks.get(name).name == name
    with pytest.raises(ValueError, match="task='mnist': expected one of digits, moving-cogvideox, moving-wan"):
        tasks.get("mnist")


# ---------------------------------------------------------------- losses


def test_mask_alone_is_diffusion_dpo_on_the_pairs_that_are_left() -> None:
    model, ref, target, timesteps = batch()
    schedule = NoiseSchedule.discrete()
    masked, plain = (
        make_loss(schedule, "sipo", 200.0, "mask alone"),
        SIPOLoss(schedule, method="diffusion_dpo", beta=200.0),
    )
    mask = masked(model, ref, target, timesteps).mask
    assert 0 < mask.sum() < len(mask)
    expected = gradient(plain, model, ref, target, timesteps) * mask.repeat(2)[:, None, None, None]
    torch.testing.assert_close(gradient(masked, model, ref, target, timesteps), expected)


def test_weight_alone_is_the_unclipped_ratio() -> None:
    model, ref, target, timesteps = batch()
    out = make_loss(NoiseSchedule.discrete(), "sipo", 200.0, "weight alone")(model, ref, target, timesteps)
    assert bool(out.mask.all())
    torch.testing.assert_close(out.weight, out.log_ratio.exp())


def test_mask_by_the_reference_does_not_close_as_the_policy_drifts() -> None:
    model, ref, target, timesteps = batch(32)
    schedule = NoiseSchedule.discrete()
    fixed = make_loss(schedule, "sipo", 200.0, "mask by the reference")
    start = fixed(ref.clone(), ref, target, timesteps).mask
    assert 0 < start.sum() < len(start)
    assert torch.equal(start, SIPOLoss(schedule, beta=200.0)(ref, ref, target, timesteps).mask)
    drifted = (ref + 2.0 * (ref - target)).requires_grad_(True)
    assert not SIPOLoss(schedule, beta=200.0)(drifted, ref, target, timesteps).mask.any()
    assert torch.equal(fixed(drifted, ref, target, timesteps).mask, start)
    grad = gradient(fixed, model, ref, target, timesteps).flatten(1).norm(dim=1)
    assert torch.equal(grad > 0, start.repeat(2))


def test_fine_tuning_ignores_rejected() -> None:
    model, ref, target, timesteps = batch()
    loss_fn = make_loss(NoiseSchedule.discrete(), "sft", 1000.0)
    grad = gradient(loss_fn, model, ref, target, timesteps)
    half = len(model) // 2
    d = (model - target)[:half].detach()
    torch.testing.assert_close(grad[:half], 2 * d / d.numel())
    assert not grad[half:].any()


def test_every_variant_makes_a_loss() -> None:
    model, ref, target, timesteps = batch()
    pairs = len(model) // 2
    # rejected samples that err as their chosen samples do, and more: what the safeguard is about
    model = torch.cat([model[:pairs], target[pairs:] + 3 * (model - target)[:pairs]]).detach().requires_grad_(True)
    plain = gradient(make_loss(build_scheduler(), "diffusion_dpo", 20.0), model, ref, target, timesteps)
    for name in PARTS:
        make_loss(build_scheduler(), "sipo", 20.0, name)(model, ref, target, timesteps).loss.backward()
    for name in RELATIVES:
        changed = gradient(make_loss(build_scheduler(), "diffusion_dpo", 20.0, name), model, ref, target, timesteps)
        assert not torch.equal(changed, plain), name


# ---------------------------------------------------------------- gradients' spread


def test_gradient_spread_against_a_network_whose_gradient_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight w, prediction w·noisy, plain Diffusion-DPO: the gradient of a batch by hand."""

    class Line(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(0.9))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight * x

    task = dataclasses.replace(tasks.DIGITS, predict=lambda m, x, t, c: m(x))
    policy, reference = Line(), Line()
    schedule = NoiseSchedule.discrete()
    loss_fn = SIPOLoss(schedule, method="diffusion_dpo", beta=50.0)
    pairs = tasks.RewardPairs(task.data()[0], task.rewards["ink"], count=100)
    monkeypatch.setattr(gradient_variance, "levels_of", lambda schedule: torch.tensor([300]))
    found = gradient_variance.gradient_spread(task, policy, reference, {"dpo": loss_fn}, pairs, seed=2)
    generator = torch.Generator().manual_seed(2000)
    gradients = []
    for _ in range(gradient_variance.BATCHES):
        items = [pairs[int(i)] for i in torch.randint(len(pairs), (gradient_variance.PAIRS,), generator=generator)]
        noise = torch.randn(gradient_variance.PAIRS, 1, 8, 8, generator=generator)
        total = 0.0
        for item, eps in zip(items, noise, strict=True):
            alpha, sigma = schedule.alpha_sigma(torch.tensor([300]))
            for name, sign in (("chosen", 1.0), ("rejected", -1.0)):
                noisy = alpha * item[name] + sigma * eps
                # at the reference every logit is 0: sigmoid is one half
                total += sign * 0.5 * 0.5 * 2 * ((0.9 * noisy - eps) * noisy).mean().item() / gradient_variance.PAIRS
        gradients.append(total)
    assert found["variance"]["dpo"][0] == pytest.approx(np.var(gradients, ddof=1), rel=1e-4)
    signal = np.mean(gradients) ** 2 - np.var(gradients, ddof=1) / gradient_variance.BATCHES
    assert found["signal"]["dpo"][0] == pytest.approx(signal, rel=1e-4)
    assert found["active"]["dpo"] == [1.0]


# ---------------------------------------------------------------- claims


def test_intervals_are_student_s() -> None:
    found = estimates.estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0 and found.half == pytest.approx(4.303 / np.sqrt(3), rel=1e-3) and found.seeds == 3
    assert np.isnan(estimates.estimate([1.0]).half)


def test_committed_results_are_whole_and_the_docs_say_what_they_say() -> None:
    results = load(COMMITTED)
    assert set(GRIDS["quick"]()) <= {Cell.of(record) for record in results["cells"]}
    page = (Path(__file__).parent.parent / "docs" / "alignment.md").read_text(encoding="utf-8")
    found = estimates.Results(results)
    assert len(conclusions.all_claims(found)) == len(conclusions.CLAIMS)
    assert conclusions.quoted(page, found) == page
    for change, message in ((("<!-- ", "<!-- a "), "marked alone"), (("<!--", "<!"), "claimed alone")):
        with pytest.raises(ValueError, match=message):
            conclusions.quoted(page.replace(*change, 1), found)
    for picture in re.findall(r"\]\((alignment/.*?\.png)\)", page):
        assert (Path(__file__).parent.parent / "docs" / picture).is_file(), picture


def test_quick_cells_alone_give_the_conclusions_they_can(capsys: Any) -> None:
    results = load(COMMITTED)
    quick = set(GRIDS["quick"]())
    part = {**results, "cells": [record for record in results["cells"] if Cell.of(record) in quick]}
    text, disagree = conclusions.report(part, results)
    assert not disagree and "agrees" in text


def test_a_grid_that_says_otherwise_is_noticed() -> None:
    results = load(COMMITTED)
    turned = copy.deepcopy(results)
    for record in turned["cells"]:  # a loss whose sign was lost
        record["rewards"] = {name: -value for name, value in record["rewards"].items()}
    _, disagree = conclusions.report(turned, results)
    assert disagree
