"""What is read from results files: comparisons, the summary that README.md quotes, and plots."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks import baselines, cases, host, kernel, kernel_summary, parts, timing
from benchmarks.cases import Case
from benchmarks.full_size import CASES
from benchmarks.training_implementations import HAND, HAND_LORA
from sipo.families import get_family
from tests.benchmark_results import made_up, run_compare, slow_down, summary

ROOT = Path(__file__).parent.parent
FROZEN, ERRORS, LORA = "ours, SIPO, frozen copy", "ours, SIPO, reference errors", "ours, LoRA, SIPO, adapter off"


def test_compare_flags_a_regression_and_not_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = made_up()
    assert run_compare(tmp_path, old, old) == 0
    assert run_compare(tmp_path, old, slow_down(old, 1.08, "sipo native")) == 0  # quartiles part, but by little
    wide = slow_down(old, 1.3, "sipo native")
    for entry in wide["cases"]:  # a large change within a wide spread
        entry["results"]["sipo native"]["wall_ms"]["quartiles"][0] /= 1.5
    assert run_compare(tmp_path, old, wide) == 0
    capsys.readouterr()

    def is_one(entry: dict[str, Any]) -> bool:
        return entry["state"] == "cold" and entry["label"] == "SD1.5" and entry["target"] == "bfloat16"

    one = slow_down(old, 1.3, "sipo native", is_one)
    assert run_compare(tmp_path, old, one) == 1
    out = capsys.readouterr().out
    assert out.count("slower") == 5  # two numbers of pairs, two modes; and a case with an upstream gradient of 1/8
    assert "1.30x" in out
    assert "5 regressions" in out
    assert run_compare(tmp_path, one, old) == 0
    assert "5 faster" in capsys.readouterr().out

    baseline = slow_down(old, 2, baselines.UPCAST)
    assert run_compare(tmp_path, old, baseline) == 0
    assert run_compare(tmp_path, old, baseline, "--everything") == 1


def test_compare_takes_a_slow_day_of_the_memory_out(tmp_path: Path) -> None:
    def large(entry: dict[str, Any]) -> bool:
        return entry["floor_bytes"] > 32 << 20

    old = made_up()
    slow_day = slow_down(made_up(copy_gb_s=10.0), 2, "sipo native", large)
    assert any(map(large, old["cases"]))
    assert not all(map(large, old["cases"]))
    assert run_compare(tmp_path, old, slow_day) == 0
    everything = slow_down(made_up(copy_gb_s=10.0), 2, "sipo native")
    assert run_compare(tmp_path, old, everything) == 1  # small cases do not wait for memory


def test_compare_refuses_what_is_not_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, other = made_up(), made_up()
    other["machine"]["device"] = "another processor"
    assert run_compare(tmp_path, old, other) == 2
    assert "another processor" in capsys.readouterr().err
    assert run_compare(tmp_path, old, other, "--force") == 0
    assert run_compare(tmp_path, old, made_up("sweep"), "--force") == 2

    fewer = made_up()
    fewer["cases"] = [entry for entry in fewer["cases"] if entry["pairs"] == 4]
    capsys.readouterr()
    assert run_compare(tmp_path, old, fewer) == 0
    assert f"only in old, not compared: {len(old['cases']) - len(fewer['cases'])} entries" in capsys.readouterr().out
    fewer["cases"] = []
    assert run_compare(tmp_path, old, fewer) == 2


@pytest.mark.parametrize(
    ("kind", "device_type", "expected"),
    [
        ("kernel", "cpu", {"headline", "speedup-bfloat16-cold", "bandwidth", "memory", "one-pair"}),
        ("kernel", "cuda", {"headline", "speedup-bfloat16-cold", "bandwidth", "memory", "one-pair"}),
        ("sweep", "cpu", {"bfloat16"}),
    ],
)
def test_plots_are_written_from_results_alone(tmp_path: Path, kind: str, device_type: str, expected: set[str]) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    source = tmp_path / f"{kind}.json"
    source.write_text(json.dumps(made_up(kind, device_type)))
    plots.main([str(source), "--output", str(tmp_path / "png")])
    found = list((tmp_path / "png").glob("*.png"))
    assert {path.stem for path in found} == {f"{kind}-{name}" for name in expected}
    for path in found:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 20_000


def test_speed_ups_below_one_or_within_the_spread_are_told() -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    entry = made_up()["cases"][0]
    assert plots.ratios(entry, "sipo native") == {
        "torch": (pytest.approx(5), True),
        "compile": (pytest.approx(0.9), True),
    }
    entry["results"][baselines.AUTOTUNED] = {"wall_ms": summary(1.0)}
    entry["results"][baselines.AUTOTUNED_NO_GRAPHS] = {"wall_ms": summary(0.5)}
    own = entry["results"]["sipo native"]["wall_ms"]["median"]
    assert plots.ratios(entry, "sipo native")["autotune"][0] == pytest.approx(0.5 / own)  # the faster of the two
    entry["results"][baselines.COMPILED]["wall_ms"]["quartiles"][1] = 2 * own
    assert plots.ratios(entry, "sipo native")["compile"] == (pytest.approx(0.9), False)  # the quartiles overlap


def test_a_summary_follows_from_the_file_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = made_up()
    table = [entry for entry in results["cases"] if Case.of(entry) in list(cases.table_cases())]
    for place, entry in enumerate(entry for entry in table if entry["state"] == "cold"):
        ours = entry["results"]["sipo native"]["wall_ms"]["median"]
        entry["results"][baselines.COMPILED]["wall_ms"] = summary(ours * (4.0 if place % 2 else 1.0))
    found = kernel_summary.summarize(json.loads(json.dumps(results)))
    assert found["table"]["cold"]["geometric_mean"] == pytest.approx(2)
    assert found["table"]["cold"]["smallest"] == pytest.approx(1)
    assert list(found["table"]["cold"]["compile"]) == [case.name for case in cases.table_cases()]
    assert list(found["table"]["cold"]["torch"].values()) == [pytest.approx(5)] * 16
    assert found["table"]["in turn"]["geometric_mean"] == pytest.approx(0.9)
    assert [len(states["cold"]["missing"]) for states in found.values()] == [0, 0, 0]
    (tmp_path / "k.json").write_text(json.dumps(results))
    kernel.main(["--summary", str(tmp_path / "k.json")])
    out = capsys.readouterr().out
    assert out.count("SLOWER") == 16 + 2 * (13 + 3)
    assert "2.00 geometric mean of 16, smallest 1.00" in out

    results["cases"] = [entry for entry in results["cases"] if entry is not table[0]]
    del table[2]["results"]["sipo native"]
    found = kernel_summary.summarize(results)["table"]["cold"]
    assert found["missing"] == [Case.of(table[0]).name, Case.of(table[2]).name]
    assert len(found["compile"]) == 14
    nothing = kernel_summary.summarize({**results, "cases": []})["float32 video"]["cold"]
    assert (nothing["geometric_mean"], nothing["smallest"], len(nothing["missing"])) == (None, None, 3)


def test_files_of_one_device_are_drawn_together(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plot_frame

    old, new = made_up(), made_up()
    new["cases"] = slow_down(new, 2, "sipo native")["cases"][:3]
    old["cases"] = old["cases"][1:]
    for name, results in (("a", old), ("b", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps(results))
    ((stem, merged),) = plot_frame.load([tmp_path / "a.json", tmp_path / "b.json"])
    assert stem == "a"
    assert len(merged["cases"]) == len(old["cases"]) + 1
    assert all(entry in merged["cases"] for entry in new["cases"])


def test_a_step_file_is_drawn_and_compared(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    step = made_up("step")
    step["cases"] = step["cases"][:1]
    for result in step["cases"][0]["results"].values():
        result["direct_ms"] = {"wall_ms": summary(0.2), "host_ms": None, "device_ms": None}
    assert run_compare(tmp_path, step, step) == 0
    slower = copy.deepcopy(step)
    slower["cases"][0]["results"]["sipo native"]["direct_ms"]["wall_ms"] = summary(0.3)
    assert run_compare(tmp_path, step, slower) == 1  # the loss alone, though the step is as it was
    (tmp_path / "step.json").write_text(json.dumps(step))
    plots.main([str(tmp_path / "step.json"), "--output", str(tmp_path)])
    assert (tmp_path / "step.png").stat().st_size > 20_000


def committed(name: str) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((timing.RESULTS / name).read_text(encoding="utf-8"))
    return results


def median(entry: dict[str, Any], name: str, time: str = "wall_ms") -> float:
    return float(entry["results"][name][time]["median"])


def test_the_readme_quotes_the_committed_file() -> None:
    results = committed("kernel-cpu.json")
    assert results["complete"] and not any(part["missing"] for part in results["summary"]["table"].values())
    assert kernel_summary.table(results) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_examples_state_the_size_of_full_size_networks() -> None:
    """Of 2 bytes a parameter, counted on networks without storage."""
    import diffusers

    stated = 0
    for path in ROOT.glob("examples/*.yaml"):
        text = path.read_text(encoding="utf-8")
        if not re.search(r"billion|[GM]B\b", text):
            continue
        family = get_family(yaml.safe_load(text)["model"]["family"])
        case = max((case for case in CASES if family.name.startswith(case.family)), key=lambda case: len(case.family))
        with torch.device("meta"):
            network = getattr(diffusers, family.network_class).from_config(case.config)
        count = sum(parameter.numel() for parameter in network.parameters())
        first = text.splitlines()[0]
        assert first.endswith(f": {count / 1e9:.1f} billion parameters, {2 * count / 1e9:.1f} GB in bfloat16."), path
        stated += 1
    assert stated == 9


def test_families_page_says_which_full_size_networks_were_whole() -> None:
    page = " ".join((ROOT / "docs" / "families.md").read_text(encoding="utf-8").split())
    quoted = re.search(r"full-size-cpu.json\)\)\. (.+?) were whole\. (.+?) had their full width", page)
    assert quoted is not None
    whole, fewer = (re.split(r", | and ", names) for names in quoted.groups())
    cases = committed("full-size-cpu.json")["cases"]
    assert all(case["adapters_that_moved"] for case in cases)
    assert whole == [case["name"] for case in cases if not case["left_out"]]
    assert fewer == [case["name"] for case in cases if case["left_out"]]
    assert [case["name"] for case in cases] == [case.name for case in CASES]


def test_pages_quote_the_other_committed_files() -> None:
    readme, errors_page = (
        (ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/reference-errors.md")
    )
    quotes, entries = [], committed("training-cpu.json")["cases"]
    for entry in entries:
        name, results = entry["label"].split(",")[0], entry["results"]
        hand, copied, errors, lora = (results[key] for key in (HAND, FROZEN, ERRORS, LORA))
        cells = [f"{result['ratio']['median']:.2f}, {result['peak_mb']:.0f} MB" for result in (copied, errors, lora)]
        row = [f"{median(entry, HAND, 'step_ms'):.0f} ms, {hand['peak_mb']:.0f} MB", *cells]
        assert f"| {name} | {' | '.join(row)} |" in readme.replace("**", "")
        ratio = f"{errors['ratio']['median']:.2f}{' of it' if entry is entries[0] else ''}"
        assert f"| {name} | {ratio} | {errors['peak_mb']:.1f} of {hand['peak_mb']:.1f} MB |" in errors_page
    peaks = [f"{entry['results'][HAND_LORA]['peak_mb']:.0f}" for entry in entries]
    quotes.append(f"({', '.join(peaks[:-1])} and {peaks[-1]} MB)")
    one_pair, _, tiny = committed("host-cpu.json")["cases"]
    quotes.append(f"takes {1e3 * median(one_pair, host.LOSS, 'host_ms'):.0f} µs in Python for one SD1.5 pair")
    quotes.append(f"together take {1e3 * median(tiny, host.PASS, 'host_ms'):.0f} µs")
    (entry,) = committed("step-cpu.json")["cases"]
    names = (baselines.OURS + "native", baselines.UPCAST, baselines.COMPILED)
    ours, plain, compiled = (entry["results"][name]["direct_ms"]["wall_ms"]["median"] for name in names)
    quotes.append(
        f"of {median(entry, names[0]):.0f} ms for a {entry['parameters'] / 1e6:.1f} M-parameter Wan transformer"
    )
    quotes.append(f"ours takes {ours:.1f} ms right after the networks")
    quotes.append(f"plain torch {plain:.1f} and torch.compile {compiled:.1f}")
    entry = committed("parts-cpu.json")["cases"][0]
    forward, again, write = (median(entry, name) for name in (parts.FORWARD_PART, parts.AGAIN, parts.USED))
    quotes.append(f"forward takes {forward:.2f} ms, reading policy and target again {again:.2f}")
    quotes.append(f"a write of the gradient's size {write:.2f}: {entry['least_ms']:.2f} ms of the")
    quotes.append(f"{median(entry, parts.CALL):.2f} that the call takes")
    quotes.append(f"where torch.compile takes {median(entry, parts.COMPILE):.2f}")
    table = committed("kernel-cpu.json")["summary"]["table"].values()
    mean, smallest = ([f"{part[key]:.2f}×" for part in table] for key in ("geometric_mean", "smallest"))
    quotes.append(f"mean is {mean[0]} cold and {mean[1]} in turn, the smallest {' and '.join(smallest)}.")
    demo = committed("demo.json")
    before, after = demo["before"], demo["after"]
    quotes.append(f"as measured here in {demo['seconds']['total']} seconds")
    quotes.append(f"goes from {before['ink']:.2f} to {after['ink']:+.2f}")
    quotes.append(f"({demo['judge_accuracy']:.1%} right".replace("%", " %"))
    quotes.append(f"{before['agreement']:.1%} of the samples".replace("%", " %"))
    quotes.append(f"before, {after['agreement']:.1%} after; {demo['active_fraction']:.1%} of the".replace("%", " %"))
    text = " ".join(readme.split())
    assert [quote for quote in quotes if quote not in text] == []
