"""``sipo analyze``: each verdict on a short run made to show it, the page, and a model before training."""

from __future__ import annotations

import base64
import copy
import json
import math
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from sipo import SIPOLoss, cli
from sipo.analysis.facts import LN2, accuracy_se, beyond_chance, describe_held_out, gather, held_out, pairs_to_tell
from sipo.analysis.findings import Finding
from sipo.analysis.report import ends, read_run, regroup, report_run
from sipo.analysis.untrained import UntrainedFacts, judge_untrained, untrained_page
from sipo.analysis.verdicts import judge
from sipo.demo.digits import Digits, InkPairs, load_digits
from sipo.demo.model import load_base, predict
from sipo.recipe import config as configuration
from sipo.recipe.analyze_start import measure_run
from sipo.recipe.build import build, datasets, open_run
from sipo.recipe.prepare_data import prepare_data
from sipo.training import TrainingConfig, train
from sipo.training.statistics import MEANS, read_statistics
from sipo.training.stream import pair_noise
from tests.test_run import SHORT, example

BATCH = 16

# What each run is made to show: method, beta, learning rate, steps, and what is done to its pairs.
RUNS: dict[str, tuple[str, float | None, float, int, str]] = {
    "learning": ("sipo", None, 2e-5, 80, ""),  # the demo's settings
    "stalled": ("sipo", 20.0, 3e-4, 40, ""),
    "beta_low": ("diffusion_dpo", 20.0, 1e-4, 60, ""),
    "pushing_rejected": ("diffusion_dpo", 200.0, 2e-4, 60, ""),
    "beta_high": ("sipo", 1e6, 2e-5, 40, ""),
    "satisfied": ("diffusion_dpo", 1e5, 1e-5, 25, "inverted"),
    "not_learning": ("sipo", None, 1e-7, 40, ""),
    "chance": ("sipo", None, 2e-6, 40, "random"),
    "memorising": ("sipo", None, 1e-4, 80, "few random"),
    "nonfinite": ("sipo", None, 2e-5, 20, "broken"),
    "broken": ("sipo", None, 2e-5, 4, "all broken"),
}
HEADLINE = {name: name for name in RUNS} | {"satisfied": "beta_high", "chance": "not_learning", "broken": "nonfinite"}

# What else may be said of them.
ALSO = {
    "learning": {"both_rise"},
    "stalled": {"beta_low", "pushing_rejected"},
    "beta_low": {"pushing_rejected"},
    "nonfinite": {"cannot_tell", "both_rise"},
}

HELD_OUT = {"learning": 64, "memorising": 32}  # pairs of the validation at a run's end


class Changed(InkPairs):
    """Ink pairs with something done to them."""

    def __init__(self, digits: Digits, change: str, seed: int = 0, count: int | None = None) -> None:
        super().__init__(digits, count=count or {"broken": 400, "few random": 32}.get(change, 10_000), seed=seed)
        self.change = change

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = dict(super().__getitem__(index))
        if self.change == "inverted":  # white on black: told apart at a glance
            item["rejected"] = -item["chosen"]
        elif self.change.endswith("random") and index % 2:
            item["chosen"], item["rejected"] = item["rejected"], item["chosen"]
        elif self.change == "all broken" or (self.change == "broken" and index % 50 == 7):
            item["rejected"] = torch.full_like(item["rejected"], math.nan)
        return item


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run, trained when it is first asked for."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str) -> Path:
        if not (folder / name).exists():
            method, beta, rate, steps, change = RUNS[name]
            base, scheduler = load_base()
            nonfinite = "propagate" if change == "all broken" else "skip"
            train(
                copy.deepcopy(base),
                base,
                SIPOLoss(scheduler, method=method, beta=beta, nonfinite=nonfinite),
                Changed(load_digits()[0], change),
                predict,
                TrainingConfig(
                    max_train_steps=steps,
                    output_dir=folder / name,
                    train_batch_size=BATCH,
                    learning_rate=rate,
                    lr_scheduler="constant_with_warmup",
                    lr_warmup_steps=min(20, steps // 3),
                    logging_steps=5 if steps > 4 else 1,
                    progress=False,
                    checkpointing_steps=0,
                    report_to="none",
                    alarms="off",
                    validation_steps=steps if name in HELD_OUT else 0,
                ),
                accelerator=Accelerator(cpu=True),
                validation=Changed(load_digits()[1], change, seed=1, count=HELD_OUT.get(name)),
            )
            beta = beta or 1000.0
            summary = {"method": method, "beta": beta, "batch_size": BATCH, "weights": {"timesteps": [1, 2]}}
            (folder / name / "summary.json").write_text(json.dumps(summary))
        return folder / name

    return run


def said(finding: Finding) -> str:
    return " ".join([finding.sentence, *finding.evidence, *finding.advice])


# ---- Verdicts ----


@pytest.mark.parametrize("name", RUNS)
def test_a_run_made_to_show_it_gets_that_verdict(name: str, run_of: Callable[[str], Path]) -> None:
    run = read_run(run_of(name))
    findings = run.findings()
    assert findings[0].name == HEADLINE[name], [said(finding) for finding in findings]
    others = {finding.name for finding in findings[1:]}
    assert others <= ALSO.get(name, set()), [said(finding) for finding in findings]
    assert (findings[0].severity == "good") == (name == "learning")
    for finding in findings:
        assert finding.evidence and (finding.advice or finding.severity in ("good", "note"))
        assert "nan" not in re.findall(r"\w+", said(finding))
    # Evidence is of this run: its numbers are in the log.
    facts = gather(run.lines, pairs_per_step=run.pairs_per_step, beta=run.beta)
    assert run.pairs_per_step == BATCH and facts.all_steps == RUNS[name][3]
    wanted = {
        "learning": "of 64 ranked right at step 80",
        "stalled": f"`model_mse` {facts.model:.3g}",
        "beta_low": f"beta = {facts.beta:.4g}",
        "pushing_rejected": f"`chosen_gap` {facts.chosen_gap:+.3g}",
        "beta_high": f"loss of {facts.pair_loss:.3g}",
        "satisfied": f"loss of {facts.pair_loss:.2g}",
        "not_learning": f"mean logit of {facts.margin:.2g}",
        "chance": f"about {facts.pairs} pairs",
        "memorising": "of 32 ranked right at step 80",
        "nonfinite": f"{facts.broken_pairs} pairs",
        "broken": "4 of 4 steps",
    }
    assert wanted[name] in said(findings[0])


def test_facts_are_means_over_the_last_fifth(run_of: Callable[[str], Path]) -> None:
    run = read_run(run_of("learning"))
    facts = gather(run.lines, pairs_per_step=BATCH)
    tail = [line for line in run.lines if line["step"] > 64]  # 80 steps in lines of 5
    assert (facts.first, facts.last, facts.pairs) == (61, 80, 20 * BATCH)
    for name, value in (("loss", facts.loss), ("rewards/accuracies", facts.accuracy), ("chosen_gap", facts.chosen_gap)):
        assert value == pytest.approx(sum(line[name] for line in tail) / len(tail))
    values = [line["loss"] for line in tail]
    mean = sum(values) / 4
    assert facts.loss_se == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / 3 / 4))
    assert facts.accuracy_se == pytest.approx(math.sqrt(facts.accuracy * (1 - facts.accuracy) / 320), rel=0.05)
    # β from the log alone is near the one that was set: weights are between 0.9 and 1.
    assert 900 < facts.beta <= 1000
    assert run.beta == 1000 and run.threshold == 0.9


def lines(count: int = 20, **changes: Any) -> list[dict[str, Any]]:
    """The log of a healthy run, ten steps a line."""
    healthy = {
        "loss": 0.3,
        "rewards/accuracies": 0.85,
        "rewards/margins": 2.0,
        "active_fraction": 0.95,
        "model_mse": 0.11,
        "ref_mse": 0.1,
        "chosen_gap": -0.001,
        "rejected_gap": 0.02,
        "nonfinite_pairs": 0,
        "nonfinite_steps": 0,
    }
    return [{"step": 10 * (n + 1), **healthy, **changes} for n in range(count)]


def validation(accuracy: float | None = 0.8, pairs: int = 256, **changes: Any) -> list[dict[str, Any]]:
    """The validation of that run."""
    values = {
        "rewards/accuracies": accuracy,
        "pairs": pairs,
        "loss": 0.5,
        "active_fraction": 0.95,
        "nonfinite_pairs": 0,
    }
    values |= {"no_preference_loss": 0.95 * LN2} | changes
    return [{"step": 200, "kind": "validation", **{f"validation/{name}": value for name, value in values.items()}}]


def names(found: list[dict[str, Any]], seen: list[dict[str, Any]] | None = None, **options: Any) -> list[str]:
    seen = validation() if seen is None else seen
    return [finding.name for finding in judge(found, seen, **({"pairs_per_step": 16} | options))]


def test_verdicts_on_logs_as_others_have_them() -> None:
    assert names(lines()) == ["learning"]
    # Real preferences: 62 % ranked right, logits of a few tenths; calibrated, hence learning and not "hardly".
    real = {
        "rewards/accuracies": 0.62,
        "loss": 0.665,
        "active_fraction": 1.0,
        "rewards/margins": 0.15,
        "rejected_gap": 0.001,
    }
    assert names(lines(**real)) == ["learning"]
    assert names(lines(**real | {"loss": 0.69, "rewards/margins": 0.01})) == ["not_learning"]
    assert names(lines(**real | {"loss": 0.9, "rewards/margins": 3.0})) == ["beta_high"]
    # The same accuracy over too few pairs is chance.
    (few,) = judge(lines(**real), pairs_per_step=1)
    assert few.name == "not_learning" and few.severity == "warning" and few.sentence.startswith("Too few pairs")
    # The mask drops nearly all from the start: not the policy's doing.
    (masked,) = judge(lines(active_fraction=0.05, loss=0.03), pairs_per_step=16)
    assert masked.name == "stalled" and "from the start" in masked.sentence and "mask_threshold" in said(masked)
    # Rejected samples pushed far away while chosen samples improve: drift, but nobody's chosen samples pay.
    assert names(lines(model_mse=0.5, chosen_gap=-0.01, rejected_gap=0.8), beta=1000.0) == ["drifted", "learning"]
    # One pair in thousands is a remark beside the verdict, and nothing without numbers is judged.
    rare = lines(200)
    rare[3]["nonfinite_pairs"] = 1
    assert names(rare) == ["nonfinite", "learning"]
    assert judge(rare, validation(), pairs_per_step=16)[0].severity == "warning"
    assert names([{"step": 5, "loss": 0.5}]) == ["unknown"]
    assert names(lines(loss=None, nonfinite_pairs=160, nonfinite_steps=10)) == ["nonfinite"]
    # A loss with another link is not compared with ln 2.
    assert names(lines(loss=40.0), plain=False) == ["learning"] and names(lines(loss=40.0)) == ["beta_high"]
    # With dpo_cm's weights a pair costs at most ln 2: a loss above it is too high all the same, one below says nothing.
    assert names(lines(**real | {"loss": 0.69, "rewards/margins": 0.01}), weighted=True) == ["learning"]
    (found,) = judge(lines(**real | {"loss": 0.9, "rewards/margins": 3.0}), pairs_per_step=16, weighted=True)
    assert found.name == "beta_high" and "preferring nothing would cost at most 0.693" in said(found)


# ---- What held-out pairs can show ----


def verdict(seen: list[dict[str, Any]], **changes: Any) -> Finding:
    (found,) = judge(lines(**changes), seen, pairs_per_step=16)
    return found


def test_memorised_coin_flips_are_not_learning() -> None:
    """83 % of training pairs against 59 % of 16 held out, which just misses two standard errors of memorising."""
    found = verdict(validation(9.5 / 16, 16, loss=0.9), **{"rewards/accuracies": 0.83})
    assert (found.name, found.severity) == ("cannot_tell", "note")
    assert found.sentence == "Cannot tell whether it learns: 16 held-out pairs, ranked no better than chance explains."
    assert (
        found.evidence[0]
        == "held-out pairs: 59 % ± 12 % of 16 ranked right at step 200 (`validation/rewards/accuracies`)"
    )
    assert "their loss is 0.947 for a pair that takes part, 0.693 without any preference" in found.evidence
    assert "training pairs: 83 % ± 1.5 % of about 640 pairs ranked right in steps 161 to 200" in found.evidence[2]
    assert found.advice == ("about 130 held-out pairs tell 60 % from chance, 460 tell 55 %; 59 % would take about 150",)
    # Where they are evidence enough, it is found; and without any, training pairs alone tell nothing.
    assert verdict(validation(0.5, 400), **{"rewards/accuracies": 0.83}).name == "memorising"
    assert verdict(validation(0.5, 16), **{"rewards/accuracies": 0.99}).name == "memorising"
    for seen in ([], validation(None, 0, loss=None), [{"step": 200, "validation/loss": 0.5}]):
        found = verdict(seen)
        assert (found.name, found.severity) == ("cannot_tell", "note") and "no held-out pairs" in found.sentence
        assert "data.held_out and training.validation_steps" in found.advice[0]


def test_good_takes_a_ranking_and_a_loss_and_the_last_validation() -> None:
    assert verdict(validation(0.7, 256)).severity == "good"
    assert "held-out pairs: 70 % ± 2.9 % of 256 ranked right at step 200" in verdict(validation(0.7, 256)).evidence[0]
    # Ranked right, at a loss that is no better than that of a policy that prefers nothing.
    for loss in (0.95 * LN2, 0.8):
        found = verdict(validation(0.7, 256, loss=loss))
        assert (found.name, found.severity) == ("overconfident", "warning")
    # Of another link: what a policy without preference loses is in the log, and ln 2 is nowhere asked for.
    ipo = {"loss": 0.22, "no_preference_loss": 0.25}
    assert verdict(validation(0.7, 256, **ipo)).severity == "good"
    assert verdict(validation(0.7, 256, **ipo | {"loss": 0.26})).name == "overconfident"
    found = verdict(validation(0.7, 256, no_preference_loss=None))
    assert (found.name, found.severity) == ("cannot_tell", "note") and "is not in the log" in found.sentence
    # Looking often must not pay: the best validation of many is good by luck.
    assert verdict([*validation(0.95, 64), *validation(0.55, 64)]).name != "learning"
    # One validation has no active pairs left: nothing is below nothing.
    assert verdict(validation(0.7, 256, loss=0.0, no_preference_loss=0.0, active_fraction=0.0)).severity != "good"


def test_coin_flips_are_hardly_ever_called_good() -> None:
    """Every outcome of n flips with its probability, each at a loss that would do: one in forty at most is good."""

    def good(pairs: int, p: float) -> float:
        shares = [math.comb(pairs, k) * p**k * (1 - p) ** (pairs - k) for k in range(pairs + 1)]
        return sum(s for k, s in enumerate(shares) if verdict(validation(k / pairs, pairs)).severity == "good")

    for pairs in (1, 5, 8, 16, 64, 256):
        assert good(pairs, 0.5) <= 0.025, pairs
    # What is really learnt is found: 70 % with 256 pairs nearly always, with 64 in seven of eight validations.
    assert good(256, 0.7) > 0.9999 and good(64, 0.7) == pytest.approx(0.878, abs=0.001)


def test_a_run_on_random_labels_is_never_good() -> None:
    """Logits that have nothing to do with the label, of every size, over 1,000 validations of each number of pairs."""
    generator = torch.Generator().manual_seed(0)
    for pairs in (8, 16, 64, 256):
        found = []
        for scale in (0.01, 0.1, 0.5, 3.0):
            logits = scale * torch.randn(250, pairs, generator=generator, dtype=torch.float64)
            losses = torch.nn.functional.softplus(-logits).mean(1).tolist()
            accuracies = (logits > 0).double().mean(1).tolist()
            options = {"no_preference_loss": LN2, "active_fraction": 1.0}
            found += [
                verdict(validation(accuracy, pairs, loss=loss, **options)).severity
                for accuracy, loss in zip(accuracies, losses, strict=True)
            ]
        assert len(found) == 1000 and found.count("good") <= 25, pairs


def test_the_number_of_pairs_that_would_tell_is_one_that_does() -> None:
    for accuracy in (0.52, 0.55, 0.6, 0.7, 0.8, 0.95, 1.0):
        pairs = pairs_to_tell(accuracy)
        assert beyond_chance(accuracy, pairs) and not beyond_chance(accuracy, pairs // 2), accuracy
    assert not beyond_chance(5 / 5, 5) and beyond_chance(6 / 6, 6)  # 1/32 and 1/64
    assert not beyond_chance(11.5 / 16, 16) and beyond_chance(12 / 16, 16) is False and beyond_chance(13 / 16, 16)
    assert beyond_chance(0.501, 1_000_000) is True and not beyond_chance(0.5009, 1_000_000)
    assert not beyond_chance(0.3, 1000)


def test_held_out_numbers_are_those_of_the_line() -> None:
    seen = held_out(validation(0.8, 50, loss=0.475))
    assert seen is not None and (seen.step, seen.pairs, seen.accuracy) == (200, 50, 0.8)
    assert seen.loss == pytest.approx(0.5) and seen.no_preference == pytest.approx(LN2)
    assert seen.se == accuracy_se(0.8, 50) == pytest.approx(math.sqrt(41 / 52 * 11 / 52 / 50))
    # What `sipo train` ends with.
    assert describe_held_out(validation(0.75, 4, loss=0.3465)) == (
        "loss 0.3465, 75.0 ± 23.6 % of 4 pairs ranked right, no more than chance explains"
    )
    assert describe_held_out(validation(0.8, 50)).endswith("80.0 ± 5.8 % of 50 pairs ranked right, more than by chance")
    assert describe_held_out(validation(None, 0, loss=None)) == "no pair is finite"
    line = validation(0.8, 50, loss=0.475)
    del line[0]["validation/active_fraction"]  # a loss of one's own that drops no pairs
    seen = held_out(line)
    assert seen is not None and seen.loss == pytest.approx(0.475)


def test_a_chosen_that_gets_worse_by_more_than_the_rejected_is_no_pushing_down() -> None:
    for lose, words in (
        (0.11, "at rejected samples a little more"),
        (0.1, "no less than at rejected samples"),
        (-0.05, "no less than"),
    ):
        found = judge(lines(chosen_gap=0.1, rejected_gap=lose, model_mse=0.21), pairs_per_step=16)[0]
        assert found.name == "pushing_rejected" and words in found.sentence
        assert ("of that is shared" in said(found)) == (lose > 0.1)
    assert "91 % of that is shared" in said(judge(lines(chosen_gap=0.1, rejected_gap=0.11), pairs_per_step=16)[0])


def test_a_policy_that_went_astray_is_not_told_to_learn_faster() -> None:
    chance = {"rewards/accuracies": 0.5, "loss": 0.7}
    for error, word in ((0.11, "higher"), (0.3, "lower")):
        (found,) = (f for f in judge(lines(model_mse=error, **chance), pairs_per_step=16) if f.name == "not_learning")
        assert f"a {word} learning rate" in found.advice[0]


def test_a_loss_that_drops_no_pairs_need_not_say_so() -> None:
    log = lines()
    for line in log:
        del line["active_fraction"]
    (found,) = judge(log, pairs_per_step=16)
    assert found.name == "cannot_tell" and "loss of 0.300 for a pair that takes part" in said(found)
    assert "100 % ± 0.16 % of about 640 pairs take part" in said(found)


def test_a_smoothed_loss_is_not_compared_with_that_of_no_preference(tmp_path: Path) -> None:
    # Sure of every pair, as far as 30 % of swapped labels let it be: of ln 2 the loss has lost little.
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines(loss=0.62, rejected_gap=0.001)))
    for smoothing, found in ((0.0, "not_learning"), (0.3, "cannot_tell")):
        (tmp_path / "config.yaml").write_text(
            f"loss: {{method: sipo, beta: 1000, label_smoothing: {smoothing}}}\ntraining: {{batch_size: 16}}\n"
        )
        assert [finding.name for finding in read_run(tmp_path).findings()] == [found]


def test_the_line_in_the_figure_is_what_no_preference_costs_by_that_loss(tmp_path: Path) -> None:
    for loss, value, name in (
        ("{method: sipo}", LN2, "ln 2: no preference"),
        ("{method: dpo_cm, label_smoothing: 0.2}", LN2, "ln 2: no preference, weights of 1"),
        ("{method: sipo, loss_type: ipo}", 0.25, "0.25: no preference"),
        ("{method: sipo, loss_type: hinge}", 1.0, "1: no preference"),
    ):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines()))
        (tmp_path / "config.yaml").write_text(f"loss: {loss}\n")
        run = read_run(tmp_path)
        assert run.level() == (pytest.approx(value, rel=1e-6), name)
    page, _ = report_run(tmp_path)
    assert "1: no preference" in page.read_text(encoding="utf-8")


def test_what_a_ranking_is_worth() -> None:
    """Calibrated logits of one size: every pair at ±z with p = σ(z) has the loss H(p), just what p is worth."""
    z = 1.3
    p = 1 / (1 + math.exp(-z))
    loss = p * math.log1p(math.exp(-z)) + (1 - p) * math.log1p(math.exp(z))
    facts = gather(lines(**{"rewards/accuracies": p}, loss=loss * 0.95), pairs_per_step=16)
    assert facts.earned == pytest.approx(1.0)
    assert gather(lines(**{"rewards/accuracies": p}, loss=LN2 * 0.95), pairs_per_step=16).earned == pytest.approx(0.0)
    assert gather(lines(**{"rewards/accuracies": 1.0}, loss=0.0), pairs_per_step=16).earned == pytest.approx(1.0)
    # β = 100 and an error of 0.1: a difference d gives the logit 5d/0.1 in units of it.
    assert gather(lines(), beta=100.0).saturation * 100 / 2 * 0.1 == pytest.approx(math.log(9))


# ---- The page ----


class Outline(HTMLParser):
    """Tags in balance, headings, captions, and what is fetched from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.fetched: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)
        self.texts.setdefault(tag, []).append("")
        named = dict(attributes)
        self.fetched += [named[a] or "" for a in ("src", "href", "xlink:href") if a in named]
        self.fetched += re.findall(r"url\(([^)]*)\)", " ".join(value or "" for value in named.values()))

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in ("meta", "img", "link"):
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in self.open:
            self.texts[tag][-1] += data


def test_the_page_is_whole_and_needs_nothing_else(
    run_of: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    run = tmp_path / "run"
    shutil.copytree(run_of("learning"), run)
    (run / "samples").mkdir()
    for step in (0, 40, 80):
        Image.new("L", (8, 8), step).save(run / "samples" / f"step-{step:08d}.png")
    assert cli.main(["analyze", str(run)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("GOOD: Learning: held-out pairs are ranked right beyond chance")
    assert f"report: {run}/report.html" in told
    text = (run / "report.html").read_text(encoding="utf-8")
    page = Outline(text)
    inside = [ref for ref in page.fetched if not ref.startswith(("#", "data:image/png;base64,"))]
    assert not inside and "<script" not in text and "@import" not in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    for ref in (ref for ref in page.fetched if ref.startswith("#")):
        assert ref[1:] in ids, ref
    assert page.texts["h2"] == ["Over the run", "By noise level", "Samples", "Settings"]
    assert len(page.texts["svg"]) == 12 == sum("Healthy: " in caption for caption in page.texts["figcaption"])
    assert [h for h in page.texts["h3"] if h.startswith("Step")] == ["Step 0", "Step 80"]  # the first and the last
    first = base64.b64encode((run / "samples" / "step-00000000.png").read_bytes()).decode()
    assert f"data:image/png;base64,{first}" in page.fetched
    assert "optimiser step" in "".join(page.texts["svg"]) and "timestep t (0 clean, 1000 noise)" in text
    assert "mask: pairs below 0.9 are left out" in text and "80 steps, about 1,280 pairs" in text
    assert "var(--ink)" in text and "#010203" not in text  # figures follow the page's theme
    # The same log gives the same page, but for the time in it.
    again = tmp_path / "again.html"
    assert cli.main(["analyze", str(run), "--output", str(again)]) == 0
    assert again.read_text(encoding="utf-8") == text
    assert not list(run.glob(".*")) and not list(tmp_path.glob(".*"))


def test_a_run_without_statistics_or_settings_is_reported_as_far_as_it_goes(
    run_of: Callable[[str], Path], tmp_path: Path
) -> None:
    log = (run_of("beta_low") / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(log + '{"step": 61, "lo')  # killed in the midst of a line
    page, findings = report_run(tmp_path)
    assert findings[0].name == "beta_low"  # β from the log
    text = page.read_text(encoding="utf-8")
    assert "This run has no timesteps.jsonl" in text and "pairs per step are not known" in text
    assert len(Outline(text).texts["svg"]) == 6


def test_a_run_without_a_finite_number_is_reported(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    page, findings = report_run(run_of("broken"), tmp_path / "page.html")
    assert findings[0].name == "nonfinite" and len(Outline(page.read_text(encoding="utf-8")).texts["svg"]) == 12


def test_pairs_and_seconds_are_those_of_the_whole_run(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    source = run_of("broken")  # a line for each of four steps
    statistics = (source / "timesteps.jsonl").read_text().splitlines(keepends=True)
    seconds = (100.0, 250.0, 40.0, 90.0)  # resumed after step 2
    log = [{**line, "seconds": s} for line, s in zip(lines(4), seconds, strict=True)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    for kept in (statistics, statistics[2:]):  # the second was turned on when it was resumed
        (tmp_path / "timesteps.jsonl").write_text("".join(kept))
        assert read_run(tmp_path).pairs_per_step == BATCH
        assert f"40 steps, about {40 * BATCH} pairs; 340 s of training" in report_run(tmp_path)[0].read_text("utf-8")
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines(4)[3]) + "\n")
    assert " s of training" not in report_run(tmp_path)[0].read_text("utf-8")  # a log without a clock
    one = json.loads(statistics[0]) | {"pairs": 1}
    (tmp_path / "timesteps.jsonl").write_text(json.dumps(one) + "\n")
    assert "40 steps, about 40 pairs<" in report_run(tmp_path)[0].read_text("utf-8")  # one a step is known as well


def test_ends_of_a_run_are_its_first_and_last_fifth(run_of: Callable[[str], Path]) -> None:
    statistics = read_statistics(run_of("learning") / "timesteps.jsonl")
    head, tail = ends(statistics)
    assert head["pairs"] == 15 * BATCH and tail["pairs"] == 20 * BATCH  # lines end at 1, 5, 10, ..., 80
    assert head["bins"] == tail["bins"] == 10  # 50 would have fewer than 12 pairs each, and 25 too
    count, total = 0, 0.0
    for line in statistics[-4:]:
        for i in range(5, 10):
            count += line["count"][i]
            total += line["count"][i] * (line["chosen_gap"][i] or 0.0)
    assert tail["count"][1] == count and tail["chosen_gap"][1] == pytest.approx(total / count)
    assert regroup(statistics[0], 5)["count"][2] == sum(statistics[0]["count"][20:30])
    assert None in regroup(statistics[0], 25)["ratio"]  # 16 pairs leave bins without any


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (None, "no metrics.jsonl, expected the folder of a run"),
        ("", "0 log lines of training, expected at least one"),
        ('{"step": 1, "kind": "validation"}\n', "0 log lines of training"),
        ("[1]\n", "0 log lines of training, expected at least one"),
    ],
)
def test_a_folder_that_is_no_run_is_one_line(
    log: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if log is not None:
        (tmp_path / "metrics.jsonl").write_text(log)
    assert cli.main(["analyze", str(tmp_path)]) == 2
    *warned, error, _ = capsys.readouterr().err.split("\n")
    assert message in error and error.startswith("sipo: error: ")
    warning = f"sipo: warning: {tmp_path / 'metrics.jsonl'}: 1 damaged line left out: line 1 (no JSON object)"
    assert warned == ([warning] if log == "[1]\n" else [])
    assert not (tmp_path / "report.html").exists()


def test_what_cannot_be_asked_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in (["--pairs", "3"], ["--levels", "3"], ["loss.beta=3"]):
        assert cli.main(["analyze", str(tmp_path), *arguments]) == 2
        assert "is for a YAML file" in capsys.readouterr().err
    monkeypatch.setattr("sipo.cli.analyze.missing_packages", lambda packages: ", ".join(packages.values()))
    assert cli.main(["analyze", str(tmp_path)]) == 2
    assert "this needs accelerate, matplotlib, pyyaml: pip install 'sipo[train]'" in capsys.readouterr().err
    monkeypatch.undo()
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines(1)[0]) + "\n")
    assert cli.main(["analyze", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"sipo: error: {tmp_path}: is a folder, expected a file to write\n"
    assert cli.main(["analyze", str(tmp_path / "nothing.yaml")]) == 2
    assert (
        "nothing.yaml: no such file or folder, expected the folder of a run or a YAML file" in capsys.readouterr().err
    )


# ---- A model with its data, before training ----


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that put a toy's cache and run into one folder."""
    folder = tmp_path_factory.mktemp("toy")
    return [*SHORT, f"data.cache={folder / 'cache'}", f"training.output_dir={folder / 'run'}"]


def test_a_model_before_training(toy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "start.html"
    where = ["--output", str(page), "--pairs", "6", "--levels", "20"]
    # Fixed draws and reference errors are the run's: here a network is asked, at levels of our own.
    fixed = ["data.draws=2", "data.reference_errors=true"]
    assert cli.main(["analyze", str(example("sd15")), *where, *toy, *fixed]) == 0
    told = capsys.readouterr().out
    assert "to encode" not in told and told.startswith(("NOTE", "OK", "WARNING", "STOP"))
    assert re.search(r"^NOTE: The mask drops \d+ % of draws at the start, ", told, re.M)
    assert "over 120 draws" in told and "At beta = 1000 the loss of a pair saturates" in told
    outline = Outline(page.read_text(encoding="utf-8"))
    assert len(outline.texts["svg"]) == 6 and "6 pairs at 20 noise levels each" in page.read_text(encoding="utf-8")
    assert cli.main(["analyze", str(example("sd15")), *where[2:4], "--levels", "0", *toy]) == 2
    assert "levels=0: expected at least 1" in capsys.readouterr().err


def test_what_is_measured_before_training_is_the_loss_of_the_first_step(toy: list[str]) -> None:
    run = open_run(configuration.load_config(example("sd15"), [*toy, "loss.mask_threshold=0.92"]))
    found = measure_run(run, pairs=6, levels=10)
    line = found.line
    assert line["count"] == [6] * 10 and line["levels"] == 1000 and line["logits_sq"] == [0.0] * 10
    # By hand: the network, the schedule and the importance ratio of docs/math.md §3.
    pairs, _ = datasets(run, prepare_data(run, progress=False).cache, None)
    network, _ = build(run)
    network.eval()
    rows, dropped = range(6), []
    latents = {half: torch.stack([pairs[row][half] for row in rows]) for half in ("chosen", "rejected")}
    condition = {k: torch.stack([pairs[row]["condition"][k] for row in rows]) for k in pairs[0]["condition"]}
    for level in range(10):
        timesteps = torch.tensor([100 * level + int(100 * (row + 0.5) / 6) for row in rows])
        noise = pair_noise(latents["chosen"], [row * 10 + level for row in rows], 0, torch.Generator())
        errors = []
        for sample in latents.values():
            with torch.no_grad():
                noisy = run.schedule.add_noise(sample, noise, timesteps)
                predicted = run.family.predict(network, noisy, timesteps, condition)
            errors.append((predicted.double() - noise.double()).square().mean(dim=(1, 2, 3)))
        ratios = torch.exp(-run.schedule.ratio_scale(timesteps).double() * torch.stack(errors))
        active = ratios.min(dim=0).values >= 0.92
        assert line["ref_error_chosen"][level] == pytest.approx(errors[0].mean().item(), rel=1e-4)
        assert line["ratio"][level] == pytest.approx(ratios.mean().item(), rel=1e-4)
        assert line["active"][level] == pytest.approx(active.double().mean().item(), rel=1e-5)
        dropped += timesteps[~active].tolist()
    assert 5 < len(dropped) < 55 and found.highest == max(dropped)
    assert found.drawn == pytest.approx([0.1] * 10, abs=0.01) and found.beta == 1000 and found.threshold == 0.92
    assert found.mean("active") == pytest.approx(1 - len(dropped) / 60, abs=0.02)


def start(**changes: Any) -> UntrainedFacts:
    """A model before training: of ten levels the mask drops the cleanest."""
    values: dict[str, Any] = dict.fromkeys(MEANS, [0.2] * 10) | {
        "active": [0.0] + [1.0] * 9,
        "logits_sq": [0.0] * 10,
        "grad_sq": [0.0] + [1.0] * 4 + [0.0] * 5,
    }
    line = {"step": 0, "kind": "discrete", "levels": 1000, "bins": 10, "pairs": 100}
    line |= {"count": [10] * 10, "nonfinite": [0] * 10, **values}
    line |= {name: changes.pop(name) for name in list(changes) if name in line}
    return UntrainedFacts(
        **({"line": line, "drawn": [0.1] * 10, "highest": 49, "beta": 1000.0, "threshold": 0.9} | changes)
    )


def test_verdicts_before_training() -> None:
    def found(**changes: Any) -> dict[str, Finding]:
        return {finding.name: finding for finding in judge_untrained(start(**changes))}

    calm = found()
    assert list(calm) == ["mask", "beta", "clip", "spread"] and {f.severity for f in calm.values()} == {"note"}
    assert calm["mask"].sentence == "The mask drops 10 % of draws at the start, all at or below t = 49."
    assert calm["beta"].sentence.endswith(
        "where its two errors differ by 2.2 % of the reference's."
    )  # 2·ln 9/(1000·0.2)
    assert calm["spread"].sentence == "Half of the squared gradient comes from 20 % of the noise levels."
    # Shares are of what training draws, and not of the grid.
    skewed = found(drawn=[0.55] + [0.05] * 9)["mask"]
    assert skewed.severity == "warning" and "drops 55 % of draws" in skewed.sentence and skewed.advice
    assert found(drawn=[0.95] + [0.05 / 9] * 9)["mask"].severity == "problem"
    assert found(highest=None)["mask"].sentence == "The mask drops no draws at the start."
    assert "up to the highest noise levels" in found(highest=999)["mask"].sentence
    assert not {"mask", "clip"} & set(found(threshold=0.0))
    assert "larger beta" in found(beta=20.0)["beta"].advice[0] and "smaller beta" in found(beta=1e5)["beta"].advice[0]
    assert not {"beta"} & set(found(plain=False))  # ln 9 is the sigmoid's
    nothing = {name: [None] * 10 for name in MEANS} | {"count": [0] * 10, "nonfinite": [10] * 10}
    assert list(found(**nothing)) == ["nonfinite"]
    differing = list(found(logits_sq=[0.25] * 10).values())
    assert differing[0].name == "differs" and "logits of 0.5" in differing[0].evidence[0]
    broken = list(found(nonfinite=[3] + [0] * 9).values())
    assert broken[0].name == "nonfinite" and broken[0].severity == "problem" and "3 of 100 draws" in said(broken[0])


def test_the_page_before_training_names_both_samples() -> None:
    page = untrained_page("sd15", "sipo", start(), [], {})
    (errors,) = (picture for picture in page.sections[0][2] if picture.title == "The reference's error")
    assert all(f">{name}</text>" in errors.content for name in ("chosen", "rejected"))
