"""A policy that accelerate or its user has compiled: names, checkpoints and weights are those of the plain network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor, nn

from sipo.training import AdapterOff
from tests.training_cases import Adapted, Network, Pairs, fit, networks, same, untimed, without_adapter


class Blocks(nn.Module):
    """A network with a row of equal blocks, each of which accelerate can compile by itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner = Network()
        self.blocks = nn.ModuleList(nn.Conv2d(1, 1, 3, padding=1) for _ in range(2))

    def forward(self, noisy: Tensor, timesteps: Tensor, classes: Tensor) -> Tensor:
        for block in self.blocks:
            noisy = noisy + torch.tanh(block(noisy))
        return self.inner(noisy, timesteps, classes)


COMPILED = ["whole", "regions", "by the caller"]


@pytest.fixture(params=COMPILED)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Turns compiling on or off for the next run, and makes a policy as it is passed in."""
    torch._dynamo.reset()

    def turned(policy: nn.Module, on: bool = True) -> Any:
        AcceleratorState._reset_state(reset_partial_state=True)
        if request.param == "by the caller":
            return torch.compile(policy, backend="eager") if on else policy
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER" if on else "NO")
        monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", str(request.param == "regions").lower())
        return policy

    return turned


OPTIONS: dict[str, Any] = {
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "use_ema": True,
    "ema_decay": 0.9,
    "validation_steps": 2,
    "gradient_accumulation_steps": 2,
}


def written(folder: Path) -> dict[str, Any]:
    """Names and shapes of what a run's checkpoints hold, and what identifies it."""
    found: dict[str, Any] = {}
    for path in sorted((folder / "checkpoints").rglob("*.safetensors")):
        found[str(path.relative_to(folder))] = {name: tensor.shape for name, tensor in load_file(path).items()}
    for path in sorted((folder / "checkpoints").rglob("state.json")):
        state = json.loads(path.read_text())
        found[str(path.relative_to(folder))] = {key: state[key] for key in ("identity", "progress", "optimizer")}
    return found


def test_a_compiled_run_is_a_plain_one(tmp_path: Path, compiled: Any) -> None:
    # In bfloat16 accelerate puts a forward of its own into the policy, and the loop takes it out again.
    seen: list[nn.Module] = []
    options = OPTIONS | {"validation": Pairs(4), "mixed_precision": "bf16"}
    options["on_validation"] = lambda step, network: seen.append(network)
    plain, one = fit(tmp_path / "plain", policy=Blocks(), reference=Blocks(), **options)
    torch._dynamo.utils.counters.clear()
    policy = Blocks()
    _, other = fit(tmp_path / "compiled", policy=compiled(policy), reference=Blocks(), **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert same(plain, policy) and written(tmp_path / "compiled") == written(tmp_path / "plain")
    assert untimed(other.history) == untimed(one.history) and untimed(other.validation) == untimed(one.validation)
    assert one.ema is not None and other.ema is not None and list(one.ema) == list(other.ema)
    assert all(torch.equal(one.ema[name], other.ema[name]) for name in one.ema)
    assert not policy.load_state_dict(other.ema, strict=False).unexpected_keys
    assert seen[2:] == [policy, policy] and not policy.blocks[0].__dict__.get("forward")


@pytest.mark.parametrize("first", [True, False])
def test_compiling_may_change_when_a_run_is_resumed(tmp_path: Path, compiled: Any, first: bool) -> None:
    straight, _ = fit(tmp_path / "straight", policy=Blocks(), reference=Blocks(), **OPTIONS | {"validation": Pairs(4)})
    options = OPTIONS | {"validation": Pairs(4), "reference": Blocks()}
    fit(tmp_path, policy=compiled(Blocks(), first), **options | {"max_train_steps": 2})
    resumed = Blocks()
    fit(tmp_path, policy=compiled(resumed, not first), resume_from="latest", **options)
    assert same(straight, resumed)


def test_adapters_are_switched_off_in_a_compiled_policy(tmp_path: Path, compiled: Any) -> None:
    options: dict[str, Any] = {
        "max_train_steps": 3,
        "checkpointing_steps": 3,
        "validation_steps": 3,
        "validation": Pairs(4),
    }
    options["reference"] = AdapterOff(without_adapter)
    plain, one = fit(tmp_path / "plain", policy=Adapted(networks()[0]), **options)
    policy = Adapted(networks()[0])
    _, other = fit(tmp_path / "compiled", policy=compiled(policy), **options)
    assert same(plain, policy) and untimed(other.history) == untimed(one.history)
    assert untimed(other.validation) == untimed(one.validation) and other.history[-1]["rewards/margins"] != 0.0
    assert written(tmp_path / "compiled") == written(tmp_path / "plain")
