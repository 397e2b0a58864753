"""SIPOLoss: schedules, defaults and settings on their way to the pair loss; and the conventions of β."""

from __future__ import annotations

import copy
import math
from typing import Any

import diffusers
import pytest
import torch
from conftest import GOLDEN_FILES, assert_refused
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sipo import NoiseSchedule, PairLossOutput, SIPOLoss, convert_beta
from sipo.batch import level_argument
from sipo_kernels import reference
from sipo_kernels.testing import GoldenCase, golden_cases
from tests.schedule_cases import from_config

CASES = golden_cases(GOLDEN_FILES)


def close(actual: Tensor, expected: Tensor | float, rtol: float = 1e-12) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-15)


def batch(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    model, step, target = (torch.randn(shape, generator=generator) for _ in range(3))
    return model.requires_grad_(), model.detach() + 0.01 * step, target


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden(case: GoldenCase) -> None:
    loss_fn = SIPOLoss(from_config(case.schedule), **case.options)
    model_pred = case.model_pred.clone().requires_grad_()
    out = loss_fn(model_pred, case.ref_pred, case.target, **level_argument(loss_fn.schedule, case.noise_levels))
    assert isinstance(out, PairLossOutput)
    for name in ("model_error", "ref_error", "error_gap", "log_ratio", "weight", "logits", "loss"):
        torch.testing.assert_close(getattr(out, name).detach(), case.expected[name], rtol=1e-9, atol=1e-13)
    assert out.mask.tolist() == case.expected["mask"].tolist()
    out.loss.backward()
    torch.testing.assert_close(model_pred.grad, case.expected["grad"], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("case", CASES[:1] + CASES[-1:], ids=lambda case: case.name)
def test_timesteps_may_be_shared_by_the_pair(case: GoldenCase) -> None:
    loss_fn = SIPOLoss(from_config(case.schedule), **case.options)
    tensors = (case.model_pred, case.ref_pred, case.target)
    full = loss_fn(*tensors, **level_argument(loss_fn.schedule, case.noise_levels))
    shared = loss_fn(*tensors, **level_argument(loss_fn.schedule, case.noise_levels[: case.num_pairs]))
    assert torch.equal(shared.loss, full.loss)
    assert torch.equal(shared.log_ratio, full.log_ratio)


def test_chosen_and_rejected_may_differ_in_timestep() -> None:
    model, ref, target = batch(4, 2, 3, 3)
    timesteps = torch.tensor([30, 500, 700, 100])
    schedule = NoiseSchedule.discrete()
    out = SIPOLoss(schedule)(model, ref, target, timesteps)
    close(out.log_ratio.double(), -schedule.ratio_scale(timesteps) * out.model_error.double(), rtol=1e-6)


def test_scheduler_and_schedule_say_the_same() -> None:
    model, ref, target = batch(4, 2, 3, 3)
    timesteps = torch.tensor([50, 500])
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction"
    )
    for steps in (None, 20):
        by_scheduler = SIPOLoss(scheduler, num_inference_steps=steps)
        own = NoiseSchedule.from_scheduler(scheduler, steps or 50)
        assert by_scheduler.schedule.num_inference_steps == (steps or 50)
        out = by_scheduler(model, ref, target, timesteps)
        # naming what the schedule has anyway is no conflict
        named = SIPOLoss(own, num_inference_steps=steps or 50, prediction_type="v_prediction")
        assert torch.equal(named(model, ref, target, timesteps).loss, out.loss)
    told = SIPOLoss(scheduler, prediction_type="epsilon")
    assert told.schedule.prediction_type == "epsilon"
    flow = SIPOLoss(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), prediction_type="flow_prediction")
    assert (flow.schedule.kind, flow.schedule.shift) == ("flow", 3.0)
    close(
        flow(model, ref, target, sigmas=torch.tensor([0.5, 0.9])).log_ratio[0] / out.model_error[0],
        -0.030665826507036226,
        1e-5,
    )


@pytest.mark.parametrize(
    ("method", "image", "video"),
    [("diffusion_dpo", 5000, 2000), ("dpo_cm", 1000, 20), ("sipo", 1000, 20), ("sdpo", 1000, 20)],
)
def test_default_beta(method: str, image: float, video: float) -> None:
    loss_fn = SIPOLoss(NoiseSchedule.flow(), method=method)
    timesteps = torch.tensor([0.9, 0.5])
    for shape, beta in (((4, 2, 3, 3), image), ((4, 2, 2, 3, 3), video)):
        tensors = batch(*shape)
        default = loss_fn(*tensors, sigmas=timesteps)
        explicit = SIPOLoss(NoiseSchedule.flow(), method=method, beta=beta)(*tensors, sigmas=timesteps)
        assert torch.equal(default.logits, explicit.logits)
        assert default.logits.abs().min() > 0
    with pytest.raises(ValueError, match=r"^beta=None with a 3-D model_pred: expected a number"):
        loss_fn(*batch(4, 7, 3), sigmas=timesteps)
    assert SIPOLoss(NoiseSchedule.flow(), beta=3.0)(*batch(4, 7, 3), sigmas=timesteps).logits.shape == (2,)


def test_every_setting_arrives() -> None:
    model, ref, target = (t.detach().double() for t in batch(4, 2, 3, 3))
    options: dict[str, Any] = {
        "method": "sdpo", "beta": 70.0, "ratio": "reference", "clip_low": 1e-4, "clip_high": 2e-4,
        "mask_threshold": 0.99, "reduction": "none",
    }  # fmt: skip
    schedule, timesteps = NoiseSchedule.discrete(), torch.tensor([22, 500, 100, 600])
    c = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    out = SIPOLoss(schedule, **options)(model, ref, target, timesteps, error_weight=c)
    scale = schedule.ratio_scale(timesteps)
    expected = reference.pair_loss(model, ref, target, ratio_scale=scale, error_weight=c, **options)
    close(out.loss, expected.loss, 1e-9)
    close(out.weight, expected.weight, 1e-9)
    assert out.mask.tolist() == expected.mask.tolist()
    metrics = expected.metrics()
    for name, value in out.metrics().items():
        assert value.item() == pytest.approx(metrics[name].item(), rel=1e-6), name
    given_error = SIPOLoss(schedule, **options)(model, None, target, timesteps, ref_error=expected.ref_error)
    close(given_error.ref_error, expected.ref_error)
    broken = model.clone()
    broken[0, 0, 0, 0] = math.nan
    skipped = SIPOLoss(schedule, **{**options, "nonfinite": "skip"})(broken, ref, target, timesteps)
    assert skipped.loss[0].item() == 0.0
    with pytest.raises(FloatingPointError, match="0"):
        SIPOLoss(schedule, nonfinite="raise")(broken, ref, target, timesteps)


def test_accumulation_and_upstream_gradient() -> None:
    model, ref, target = batch(4, 2, 3, 3)
    loss_fn = SIPOLoss(NoiseSchedule.flow(), method="diffusion_dpo", beta=100.0)
    timesteps = torch.tensor([0.9, 0.5])
    loss_fn(model, ref, target, sigmas=timesteps).loss.backward()
    assert model.grad is not None
    once = model.grad.clone()
    (0.25 * loss_fn(model, ref, target, sigmas=timesteps).loss).backward()
    torch.testing.assert_close(model.grad, 1.25 * once, rtol=1e-6, atol=1e-9)


def test_compiled_is_the_same() -> None:
    torch._dynamo.reset()
    loss_fn = SIPOLoss(NoiseSchedule.discrete(), beta=50.0)
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
    timesteps = torch.tensor([100, 900])
    model, ref, target = batch(4, 2, 3, 3)
    eager = loss_fn(model, ref, target, timesteps)
    eager.loss.backward()
    assert model.grad is not None
    expected, model.grad = model.grad, None
    out = compiled(model, ref, target, timesteps)
    out.loss.backward()
    torch.testing.assert_close(out.loss, eager.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(model.grad, expected, rtol=1e-5, atol=1e-8)


def test_it_is_a_module_without_state() -> None:
    loss_fn = SIPOLoss(NoiseSchedule.flow(3.0), method="dpo_cm", clip_low=0.2)
    assert list(loss_fn.state_dict()) == [] and list(loss_fn.parameters()) == []
    assert repr(loss_fn) == (
        "SIPOLoss(method='dpo_cm', beta=None, ratio='posterior', clip_low=0.2, clip_high=0.1, "
        "mask_threshold=0.9, reduction='mean', nonfinite='propagate', backend='auto', "
        "schedule=NoiseSchedule(kind='flow', prediction_type='flow', shift=3, num_inference_steps=50, "
        "num_train_timesteps=1000))"
    )
    tensors, timesteps = batch(4, 2, 3, 3), torch.tensor([0.9, 0.5])
    again = copy.deepcopy(loss_fn)
    assert torch.equal(again(*tensors, sigmas=timesteps).loss, loss_fn(*tensors, sigmas=timesteps).loss)


SCHEDULE = NoiseSchedule.discrete()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "dpo"}, ValueError, "method='dpo': expected one of diffusion_dpo, dpo_cm, sipo, sdpo"),
        ({"beta": 0.0}, ValueError, "beta=0.0: expected a finite number > 0"),
        ({"beta": math.nan}, ValueError, "beta=nan"),
        ({"beta": math.inf}, ValueError, "beta=inf"),
        ({"beta": "5000"}, TypeError, "beta='5000' is a str"),
        ({"ratio": "policy"}, ValueError, "ratio='policy'"),
        ({"clip_low": 1.5}, ValueError, "clip_low=1.5"),
        ({"clip_high": -0.1}, ValueError, "clip_high=-0.1"),
        ({"mask_threshold": 2}, ValueError, "mask_threshold=2"),
        ({"reduction": "avg"}, ValueError, "reduction='avg'"),
        ({"nonfinite": "ignore"}, ValueError, "nonfinite='ignore'"),
        ({"backend": "cudnn"}, ValueError, "backend='cudnn': expected one of auto, eager, triton, native"),
        ({"num_inference_steps": 20}, ValueError, "num_inference_steps=20: expected None or 50"),
        ({"prediction_type": "v_prediction"}, ValueError, "prediction_type='v_prediction': expected None or 'epsilon'"),
        ({"schedule": "sd15"}, ValueError, "scheduler str is not modelled, it has no alphas_cumprod: expected"),
    ],
)
def test_construction_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    assert_refused(lambda: SIPOLoss(**{"schedule": SCHEDULE, **options}), error, message)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"timesteps": torch.tensor([1, 2, 3])}, ValueError, "timesteps has shape [3]: expected [4], or [2]"),
        ({"timesteps": torch.tensor([1, 1000])}, ValueError, "timesteps[1]=1000"),
        ({"timesteps": 3}, TypeError, "timesteps is a int"),
        ({"model_pred": None}, TypeError, "model_pred is a NoneType"),
        ({"model_pred": torch.tensor(1.0)}, ValueError, "model_pred has shape []"),
        (
            {"model_pred": torch.zeros(3, 2, 3, 3), "timesteps": torch.tensor([1, 2, 3])},
            ValueError,
            "first dimension 3",
        ),
        ({"ref_pred": None}, ValueError, "ref_pred and ref_error"),
    ],
)
def test_call_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    model, ref, target = batch(4, 2, 3, 3)
    arguments: dict[str, Any] = {"model_pred": model, "ref_pred": ref, "target": target}
    arguments |= {"timesteps": torch.tensor([1, 2]), **change}
    assert_refused(lambda: SIPOLoss(SCHEDULE)(**arguments), error, message)


CONVENTIONS = ["sipo", "paper", "diffusers_sd", "diffusers_sdxl", "sum"]


@pytest.mark.parametrize(
    ("target", "expected"),
    [("sipo", 5000), ("paper", 5), ("diffusers_sd", 2500), ("diffusers_sdxl", 5000), ("sum", 5000 / 16384)],
)
def test_beta_in_every_convention(target: str, expected: float) -> None:
    assert convert_beta(5000, source="sipo", target=target, elements=16384) == pytest.approx(expected, rel=1e-15)
    back = convert_beta(expected, source=target, target="sipo", elements=16384)
    assert back == pytest.approx(5000, rel=1e-15)


@given(st.sampled_from(CONVENTIONS), st.sampled_from(CONVENTIONS), st.floats(1e-6, 1e6), st.integers(1, 10**7))
def test_beta_there_and_back(source: str, target: str, value: float, elements: int) -> None:
    there = convert_beta(value, source=source, target=target, elements=elements)
    assert convert_beta(there, source=target, target=source, elements=elements) == pytest.approx(value, rel=1e-14)
    if source == target:
        assert there == value


def test_conventions_give_the_same_logits() -> None:
    """What each convention's own formula makes of its β, against the pair loss."""
    case = next(c for c in CASES if c.name == "diffusion_dpo-sd15")
    beta, elements = case.options["beta"], case.model_pred[0].numel()
    model = ((case.model_pred - case.target) ** 2).flatten(1)
    ref = ((case.ref_pred - case.target) ** 2).flatten(1)

    def gap(reduce: Any) -> Tensor:
        gaps = reduce(model, 1) - reduce(ref, 1)
        return gaps[: case.num_pairs] - gaps[case.num_pairs :]

    def to(target: str) -> float:
        return convert_beta(beta, source="sipo", target=target, elements=elements)

    for logits in (
        -to("diffusers_sd") * gap(torch.mean),
        -0.5 * to("diffusers_sdxl") * gap(torch.mean),
        -0.5 * to("sum") * gap(torch.sum),
        -0.5 * 1000 * to("paper") * gap(torch.mean),
    ):
        close(logits, case.expected["logits"], 1e-9)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"source": "trl"}, ValueError, "source='trl': expected one of sipo, paper, diffusers_sd, diffusers_sdxl, sum"),
        ({"target": "trl"}, ValueError, "target='trl'"),
        ({"target": "sum"}, ValueError, "elements=None: expected the number of elements"),
        ({"target": "sum", "elements": 0}, ValueError, "elements=0: expected an integer >= 1"),
        ({"target": "sum", "elements": 4.0}, TypeError, "elements=4.0 is a float"),
        ({"value": -1}, ValueError, "value=-1: expected a finite number > 0"),
        ({"value": math.nan}, ValueError, "value=nan"),
        ({"value": "5000"}, TypeError, "value='5000' is a str"),
    ],
)
def test_convert_beta_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"value": 1.0, "source": "sipo", "target": "paper"} | arguments
    assert_refused(lambda: convert_beta(**arguments), error, message)


def test_help_on_the_constructor_is_not_torchs() -> None:
    assert "noise schedule" in (SIPOLoss.__init__.__doc__ or "")
