"""The options of the loss: one list, from which everything that takes or documents them derives."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import torch

from sipo import NoiseSchedule, SIPOLoss
from sipo_kernels import LossOptions, pair_loss, reference
from sipo_kernels.options import DEFAULT_BETA, DEFAULTS, METHODS, OptionValues, Settings, markdown_tables

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "options.md"
_X = torch.ones(2, 3)
_NEW_OPTION = (
    "    dummy: float = _number("
    '0.25, lambda value: 0 <= value <= 1, "0 <= dummy <= 1", "a number for a test (§9)", hidden=True)\n'
)

# Runs where options.py has one field more, and nothing else is changed.
_WITH_A_NEW_OPTION = """
import importlib.util, pathlib, sys

root = pathlib.Path(sys.argv[1])
path = root / "sipo_kernels" / "options.py"
source = path.read_text()
before = "    def __post_init__(self) -> None:"
assert source.count(before) == 1
spec = importlib.util.spec_from_file_location("sipo_kernels.options", path)
module = importlib.util.module_from_spec(spec)
sys.modules["sipo_kernels.options"] = module
exec(compile(source.replace(before, sys.argv[2] + "\\n" + before), str(path), "exec"), module.__dict__)

import inspect, torch
from sipo import NoiseSchedule, SIPOLoss
from sipo.recipe.card import model_card
from sipo.recipe.config import ConfigError, from_dict
from sipo_kernels import pair_loss, reference

x = torch.ones(2, 3)
call = dict(method="diffusion_dpo", beta=1.0)
for function in (pair_loss, reference.pair_loss, reference.pair_grad):
    function(x, x, x, dummy=0.5, **call)
    assert inspect.signature(function).parameters["dummy"].default == 0.25
    try:
        function(x, x, x, dummy=2, **call)
    except ValueError as error:
        assert str(error) == "dummy=2: expected 0 <= dummy <= 1", error
    else:
        raise AssertionError("dummy=2 was accepted")

loss_fn = SIPOLoss(NoiseSchedule.discrete(), dummy=0.75)
assert loss_fn.options.dummy == 0.75 == loss_fn.settings()["dummy"] and "dummy=0.75" in repr(loss_fn)
assert "dummy" not in repr(SIPOLoss(NoiseSchedule.discrete()))
assert inspect.signature(SIPOLoss).parameters["dummy"].default == 0.25
names = [argument.name for argument in torch.ops.sipo.pair_loss.default._schema.arguments]
assert names[-2:] == ["dummy", "backend"], names
compiled = torch.compile(lambda x: pair_loss(x, x, x, dummy=0.5, **call).loss, fullgraph=True, backend="aot_eager")
assert compiled(x) == pair_loss(x, x, x, dummy=0.5, **call).loss

tree = {
    "model": {"family": "sd15", "pretrained_model_name_or_path": "toy"},
    "data": {"dataset_name": "toy", "cache": "cache"},
    "training": {"output_dir": "run", "max_train_steps": 1},
}
config = from_dict(tree | {"loss": {"dummy": 0.5}})
assert config.loss.dummy == 0.5 and config.as_dict()["loss"]["dummy"] == 0.5
assert SIPOLoss(NoiseSchedule.discrete(), options=config.loss).options.dummy == 0.5
try:
    from_dict(tree | {"loss": {"dummy": -1}})
except ConfigError as error:
    assert str(error) == "loss.dummy=-1.0: expected 0 <= dummy <= 1", error
else:
    raise AssertionError("loss.dummy=-1 was accepted")

from sipo.families import get_family

card = model_card(get_family("sd15"), config, beta=1.0, pairs=1, data_hash="0", steps=1)
assert "| dummy | 0.5 |" in card, card
assert "| `dummy` | `0.25` | 0 <= dummy <= 1 | a number for a test (§9) |" in module.markdown_tables()
print("as expected")
"""


def test_a_new_option_needs_its_field_alone() -> None:
    """All but the arithmetic follows from it (CONTRIBUTING.md, "Add an option or a method")."""
    command = [sys.executable, "-c", _WITH_A_NEW_OPTION, str(ROOT), _NEW_OPTION]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.stdout, done.returncode) == ("as expected\n", 0), done.stderr


def test_the_page_has_the_tables_of_the_options() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert markdown_tables() in text, "put in what sipo_kernels.options.markdown_tables() returns"


def test_type_checkers_see_the_same_options() -> None:
    fields = {field.name: field.type for field in dataclasses.fields(LossOptions)}
    assert {name: hint.__forward_arg__ for name, hint in OptionValues.__annotations__.items()} == fields
    assert typing.get_type_hints(Settings)["beta"] is float


@pytest.mark.parametrize("function", [pair_loss, reference.pair_loss, reference.pair_grad, SIPOLoss])
def test_a_signature_lists_every_option(function: Any) -> None:
    parameters = inspect.signature(function).parameters
    assert {name: parameters[name].default for name in DEFAULTS} == DEFAULTS
    for name, field in zip(DEFAULTS, dataclasses.fields(LossOptions), strict=True):
        assert f"{name}: {field.metadata['meaning'].replace('`', '``')}" in (LossOptions.__doc__ or "")


@pytest.mark.parametrize(
    "call",
    [
        lambda **given: pair_loss(_X, _X, _X, **given),
        lambda **given: reference.pair_loss(_X, _X, _X, **given),
        lambda **given: SIPOLoss(NoiseSchedule.discrete(), **given),
    ],
)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask_treshold": 0.5}, "mask_treshold: no such option, did you mean mask_threshold?"),
        ({"gain": 0.5}, "gain: no such option, expected one of method, beta, ratio, clip_low"),
        ({"gain": [0.5]}, "gain: no such option, expected one of method, beta, ratio, clip_low"),
        ({"options": LossOptions(), "beta": 2.0}, "options and beta given: expected either options= or keyword"),
        ({"options": {"beta": 2.0}}, "options is a dict: expected sipo_kernels.LossOptions"),
    ],
)
def test_wrong_options(call: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError) as raised:
        call(**given)
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


def test_options_are_numbers_and_equal_where_their_values_are() -> None:
    options = LossOptions(beta=3, mask_threshold=0, clip_high=1)
    assert [type(value) for value in (options.beta, options.mask_threshold, options.clip_high)] == [float] * 3
    assert options == LossOptions(beta=3.0, mask_threshold=0.0, clip_high=1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.beta = 2.0  # type: ignore[misc]
    with pytest.raises(ValueError, match="mask_threshold=2: expected"):
        dataclasses.replace(options, mask_threshold=2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ndim", [4, 5])
def test_a_beta_of_none_is_that_of_method_and_medium(method: str, ndim: int) -> None:
    shape = (4, 2, 3, 3, 3)[:ndim]
    tensors = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    scale = torch.full((4,), 0.01)
    given = pair_loss(*tensors, ratio_scale=scale, method=method)
    meant = pair_loss(*tensors, ratio_scale=scale, method=method, beta=DEFAULT_BETA[method][ndim])
    assert (
        torch.equal(given.loss, meant.loss) and LossOptions(method=method).beta_for(ndim) == DEFAULT_BETA[method][ndim]
    )
    truth = reference.pair_loss(*tensors, ratio_scale=scale, options=LossOptions(method=method))
    torch.testing.assert_close(given.logits.double(), truth.logits, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="beta=None with a 2-D model_pred: expected a number"):
        pair_loss(_X, _X, _X, method=method, ratio_scale=torch.zeros(2))
