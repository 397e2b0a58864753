"""What moves the weights (optimiser, learning rate, moving average), and who is told."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sipo.training.optimization import rate_factor
from tests.training_cases import fit, networks, same, settings

# ---------------------------------------------------------------- what moves the weights


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant_with_warmup", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_the_learning_rate_follows_its_schedule(tmp_path: Path, schedule: str, expected: list[float]) -> None:
    _, result = fit(tmp_path, max_train_steps=6, lr_warmup_steps=2, learning_rate=1e-3, lr_scheduler=schedule)
    assert [line["learning_rate"] for line in result.history] == pytest.approx([1e-3 * rate for rate in expected])


def test_the_rate_is_defined_where_the_warm_up_takes_all_steps(tmp_path: Path) -> None:
    config = settings(tmp_path, max_train_steps=3, lr_warmup_steps=3, lr_scheduler="cosine")
    assert [rate_factor(config, step) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1.0])
    config = settings(tmp_path, max_train_steps=3, lr_warmup_steps=9, lr_scheduler="constant_with_warmup")
    assert rate_factor(config, 2) == pytest.approx(1 / 3)


def test_adamw_takes_its_settings(tmp_path: Path) -> None:
    options = {
        "adam_beta1": 0.5,
        "adam_beta2": 0.6,
        "adam_epsilon": 1e-3,
        "adam_weight_decay": 0.1,
        "max_train_steps": 3,
        "max_grad_norm": None,
    }
    own, _ = fit(tmp_path / "own", **options)
    policy, _ = networks()
    given = torch.optim.AdamW(policy.parameters(), lr=1e-2, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.1)
    other, _ = fit(tmp_path / "given", policy=policy, optimizer=given, max_train_steps=3, max_grad_norm=None)
    for a, b in zip(own.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "kind"), [("adamw8bit", "AdamW8bit"), ("paged_adamw8bit", "PagedAdamW8bit")])
def test_bitsandbytes_is_asked_for_by_name_or_named_as_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=rf"optimizer='{name}': bitsandbytes is not installed, expected `pip"):
        fit(tmp_path / "a", optimizer=name)
    made: list[tuple[str, dict[str, Any]]] = []

    def stand_in(which: str) -> Any:
        def make(parameters: Any, **options: Any) -> torch.optim.Optimizer:
            made.append((which, options))
            return torch.optim.AdamW(parameters, **options)

        return make

    kinds = {k: stand_in(k) for k in ("AdamW8bit", "PagedAdamW8bit")}
    module = types.SimpleNamespace(optim=types.SimpleNamespace(**kinds))
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    fit(tmp_path / "b", optimizer=name, max_train_steps=1)
    assert made == [(kind, {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2})]


def test_the_average_is_of_the_weights_after_each_step(tmp_path: Path) -> None:
    def weights(folder: str, **options: Any) -> Tensor:
        return fit(tmp_path / folder, **options)[0].outward.weight.detach()

    # The first update takes the weights as they are, then the average forgets at no more than (1 + n) / (10 + n).
    expected = weights("1", max_train_steps=1)
    for steps in (2, 3, 4):
        keep = min(0.2, steps / (9 + steps))
        expected = keep * expected + (1 - keep) * weights(str(steps), max_train_steps=steps)
    _, result = fit(tmp_path / "ema", max_train_steps=4, use_ema=True, ema_decay=0.2)
    assert result.ema is not None
    torch.testing.assert_close(result.ema["outward.weight"], expected, rtol=1e-5, atol=1e-7)
    policy, _ = networks()
    assert not policy.load_state_dict(result.ema, strict=False).unexpected_keys


def test_an_optimiser_that_nests_its_state_resumes(tmp_path: Path) -> None:
    """As bitsandbytes' do: tensors of the 8 bits one level down, and counts that are no tensors."""

    class Nesting(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    state = self.state[parameter]
                    inner = state.setdefault("inner", {"sum": torch.zeros_like(parameter), "count": 0})
                    inner["count"] += 1
                    inner["sum"] += parameter.grad
                    parameter.data.sub_(0.01 * inner["sum"] / inner["count"])

    results = []
    for name, steps in (("whole", (4,)), ("parts", (2, 4))):
        for number, last in enumerate(steps):
            policy, _ = networks()
            optimizer = Nesting(policy.parameters(), lr=0.1)
            resume = {"resume_from": "latest"} if number else {}
            fit(
                tmp_path / name,
                policy=policy,
                optimizer=optimizer,
                max_train_steps=last,
                checkpointing_steps=2,
                **resume,
            )
        results.append(policy)
    assert same(*results)


def test_bitsandbytes_trains_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="an extra that is not always there")
    whole, _ = fit(tmp_path / "whole", max_train_steps=4, optimizer="adamw8bit")
    fit(tmp_path / "parts", max_train_steps=2, checkpointing_steps=2, optimizer="adamw8bit")
    resumed, _ = fit(tmp_path / "parts", max_train_steps=4, optimizer="adamw8bit", resume_from="latest")
    assert same(whole, resumed)
