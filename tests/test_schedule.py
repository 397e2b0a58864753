"""NoiseSchedule against the golden files; its targets, draws, devices, compilation and errors."""

from __future__ import annotations

import math
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import GOLDEN_FILES, assert_refused
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import sipo.schedule.noise_schedule
from sipo import NoiseSchedule, SIPOLoss
from sipo.batch import level_argument as at
from sipo.schedule.levels import SettingError
from sipo_kernels.testing import RatioScaleCase, golden_cases
from tests.schedule_cases import ALL_STEPS, BY_NAME, GOLDEN, SD, close, from_config, latents, table

GOLDEN_SD15 = NoiseSchedule.discrete().ratio_scale(ALL_STEPS)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.name)
def test_golden_from_configuration(case: RatioScaleCase) -> None:
    schedule = from_config(case.schedule)
    scale = schedule.ratio_scale(**at(schedule, case.noise_levels))
    assert scale.dtype == torch.float64
    close(scale, case.ratio_scale)


@pytest.mark.parametrize("case", golden_cases(GOLDEN_FILES), ids=lambda case: case.name)
def test_golden_batches(case: Any) -> None:
    schedule = from_config(case.schedule)
    close(schedule.ratio_scale(**at(schedule, case.noise_levels)), case.ratio_scale)


@pytest.mark.parametrize("name", ["sd15", "cogvideox2b", "cogvideox5b"])
@pytest.mark.parametrize("convert", [lambda t: t, lambda t: t.numpy(), lambda t: t.tolist()])
def test_golden_from_arrays(name: str, convert: Any) -> None:
    # worked out in NumPy, apart from the code under test
    config = BY_NAME[name].schedule
    betas = np.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, 1000) ** 2
    cumprod = np.cumprod(1 - betas)
    snr = cumprod / (1 - cumprod) / config.get("snr_shift_scale", 1.0)
    root = np.sqrt(snr / (1 + snr))
    if config.get("rescale_betas_zero_snr"):
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    schedule = NoiseSchedule.from_alphas_cumprod(convert(torch.from_numpy(root**2)), config["prediction"], 50)
    close(schedule.ratio_scale(BY_NAME[name].noise_levels), BY_NAME[name].ratio_scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow"])
def test_noise_and_target_round_once(dtype: torch.dtype, prediction: str) -> None:
    sample, noise = latents(4, dtype)
    if prediction == "flow":
        schedule, t = NoiseSchedule.flow(), torch.tensor([0.1, 0.2, 0.7, 1.0], dtype=torch.float64)
        alpha, sigma = 1 - t, t
    else:
        schedule, t = NoiseSchedule.discrete(prediction_type=prediction), torch.tensor([0, 100, 700, 999])
        # ᾱ to 1e-5, in logarithms: Σ log(1 − β)
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        alpha = torch.log1p(-betas).cumsum(0)[t].mul(0.5).exp()
        sigma = (1 - alpha**2).sqrt()
    alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in (alpha, sigma))
    x0, eps = sample.double(), noise.double()
    target = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0, "flow": eps - x0}[prediction]
    for actual, exact in (
        (schedule.add_noise(sample, noise, **at(schedule, t)), alpha * x0 + sigma * eps),
        (schedule.target(sample, noise, **at(schedule, t)), target),
    ):
        assert actual.dtype == dtype and actual.shape == sample.shape
        # half a unit in the last place of dtype, and float32's error of the computation
        bound = exact.abs() * torch.finfo(dtype).eps / 2 + (1e-6 if dtype != torch.float64 else 1e-14)
        assert ((actual.double() - exact).abs() <= bound).all()


def test_noise_of_another_type_keeps_its_accuracy() -> None:
    sample, noise = latents(2)
    schedule, t = NoiseSchedule.discrete(), torch.tensor([10, 800])
    mixed = schedule.add_noise(sample.bfloat16(), noise.double(), t)
    assert mixed.dtype == torch.bfloat16
    expected = schedule.add_noise(sample.bfloat16().double(), noise.double(), t)
    assert torch.equal(mixed, expected.bfloat16())


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_discrete_timesteps_are_those_of_randint() -> None:
    schedule = NoiseSchedule.discrete(num_train_timesteps=7, num_inference_steps=7)
    drawn = schedule.sample_levels(5000, seeded())
    assert drawn.dtype == torch.int64
    assert torch.equal(drawn, torch.randint(0, 7, (5000,), generator=seeded()))
    counts = drawn.bincount(minlength=7)
    assert len(counts) == 7 and (counts - 5000 / 7).abs().max() < 5 * math.sqrt(5000 / 7)


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal", "shifted", "shifted_logit_normal"])
def test_flow_timesteps_have_their_distribution(distribution: str) -> None:
    n = 20000
    schedule = NoiseSchedule.flow(shift=3.0)
    drawn = schedule.sample_levels(n, seeded(), distribution=distribution)
    assert drawn.dtype == torch.float32 and drawn.shape == (n,)
    assert drawn.min() > 0 and drawn.max() <= 1
    assert torch.equal(drawn, schedule.sample_levels(n, seeded(), distribution=distribution))
    assert not torch.equal(drawn, schedule.sample_levels(n, seeded(1), distribution=distribution))
    sigma = drawn.double().sort().values
    if distribution.startswith("shifted"):
        sigma = sigma / (3 - 2 * sigma)
    cumulative = sigma
    if distribution.endswith("logit_normal"):
        cumulative = torch.special.ndtr(torch.logit(sigma))
    # Kolmogorov and Smirnov's distance exceeds 1.95 / √n once in a thousand samples
    empirical = (torch.arange(n) + 0.5) / n
    assert (cumulative - empirical).abs().max() < 1.95 / math.sqrt(n)


@pytest.fixture(params=[torch.bfloat16, torch.float64])
def other_default_dtype(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("other_default_dtype")
def test_nothing_follows_torchs_default_type() -> None:
    """bfloat16 has 256 distinct sigmas."""
    for distribution in ("uniform", "logit_normal", "shifted", "shifted_logit_normal"):
        drawn = NoiseSchedule.flow(3.0).sample_levels(4000, seeded(), distribution=distribution)
        assert drawn.dtype == torch.float32 and len(drawn.unique()) > 3900
    for schedule, t in (schedule_and_timesteps(kind) for kind in ("discrete", "flow")):
        t = t if schedule.kind == "discrete" else t.float()
        assert schedule.ratio_scale(**at(schedule, t)).dtype == torch.float64
        compiled = torch.compile(schedule.ratio_scale, backend="eager", fullgraph=True)
        assert torch.equal(compiled(**at(schedule, t)), schedule.ratio_scale(**at(schedule, t)))
    close(table(NoiseSchedule.discrete()), GOLDEN_SD15, rtol=1e-10)


def test_largest_draw_is_one_and_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: torch.zeros(*size))
    for distribution in ("uniform", "shifted"):
        for schedule in (NoiseSchedule.flow(1.15), flow_schedule(terminal=0.02)):
            assert schedule.sample_levels(2, distribution=distribution).tolist() == [1.0, 1.0]


def test_shift_of_one_leaves_the_draws_alone() -> None:
    schedule = NoiseSchedule.flow()
    for name in ("uniform", "logit_normal"):
        shifted = "shifted" if name == "uniform" else "shifted_logit_normal"
        plain = schedule.sample_levels(100, seeded(), distribution=name)
        close(schedule.sample_levels(100, seeded(), distribution=shifted), plain, rtol=1e-6)


def test_a_setting_that_is_refused_is_named_and_can_be_sent_to_other_processes() -> None:
    for name, options in (("num_inference_steps", {"num_inference_steps": 0}), ("shift", {"shift": math.inf})):
        with pytest.raises(SettingError) as caught:
            NoiseSchedule.flow(**options)  # type: ignore[arg-type]
        sent = pickle.loads(pickle.dumps(caught.value))
        assert (sent.name, str(sent)) == (name, str(caught.value)) and str(sent).startswith(f"{name}=")


def test_shifted_draws_are_stretched_as_the_grid_of_many_steps_is() -> None:
    schedule, plain = flow_schedule(terminal=0.3), flow_schedule()
    for distribution in ("uniform", "logit_normal"):
        drawn = schedule.sample_levels(50, seeded(), distribution=distribution)
        assert torch.equal(drawn, plain.sample_levels(50, seeded(), distribution=distribution))
    u = schedule.sample_levels(50, seeded(), distribution="uniform")
    shifted = schedule.sample_levels(50, seeded(), distribution="shifted")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.3)
    steps = 10**5
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    grid = scheduler.sigmas[((1 - u) * steps).long()]
    close(shifted, grid, rtol=1e-3)
    assert grid.min() > 0.3 and shifted.min() > 0.3


def test_timesteps_go_where_they_are_wanted() -> None:
    schedule = NoiseSchedule.flow()
    assert schedule.sample_levels(3, device="meta").device.type == "meta"
    assert schedule.sample_levels(3, seeded(), device="meta").device.type == "meta"
    torch.manual_seed(5)
    first = schedule.sample_levels(3)
    torch.manual_seed(5)
    assert torch.equal(schedule.sample_levels(3), first)


@pytest.mark.parametrize(
    "dtype",
    [*(torch.int64, torch.int32, torch.int16, torch.uint16, torch.uint32, torch.uint64), torch.float32, torch.float64],
)
def test_types_of_discrete_timesteps(dtype: torch.dtype) -> None:
    schedule = NoiseSchedule.discrete()
    expected = table(schedule)
    assert torch.equal(schedule.ratio_scale(ALL_STEPS.to(dtype)), expected)
    scheduler = diffusers.EulerDiscreteScheduler(**SD)
    assert torch.equal(schedule.ratio_scale(scheduler.timesteps), expected.flip(0))


def test_tables_are_uploaded_once_to_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    # "meta" stands for an accelerator, here one without float64
    monkeypatch.setattr(sipo.schedule.noise_schedule, "pair_dtype", lambda device: torch.float32)
    schedule = NoiseSchedule.discrete()
    meta = ALL_STEPS.to("meta")
    scale = schedule.ratio_scale(meta)
    assert (scale.device.type, scale.dtype) == ("meta", torch.float32)
    uploads: list[Any] = []
    monkeypatch.setattr(Tensor, "to", lambda self, *args, **kwargs: uploads.append(args) or self)
    schedule.ratio_scale(meta)
    schedule.alpha_sigma(meta)
    assert [args for args in uploads if args != (torch.int64,)] == []


@pytest.mark.parametrize("prime", [True, False])
def test_compiled(prime: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    sample, noise = latents(3)

    @torch.compile(fullgraph=True, backend=counter)
    def run(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale = schedule.ratio_scale(**at(schedule, t))
        return (
            scale,
            schedule.add_noise(sample, noise, **at(schedule, t)),
            schedule.target(sample, noise, **at(schedule, t)),
        )

    schedules = [NoiseSchedule.discrete(prediction_type=p) for p in ("epsilon", "v_prediction")]
    schedules += [NoiseSchedule.flow(k, 40) for k in (3.0, 5.0)]
    if not prime:
        # as for a device that the schedule has never seen
        for schedule in schedules:
            schedule._device_tables.clear()
    for schedule in [*schedules, *schedules]:
        t = torch.tensor([5, 40, 999])
        if schedule.kind == "flow":
            t = t / 1000
        expected = (
            schedule.ratio_scale(**at(schedule, t)),
            schedule.add_noise(sample, noise, **at(schedule, t)),
            schedule.target(sample, noise, **at(schedule, t)),
        )
        for actual, value in zip(run(schedule, t), expected, strict=True):
            close(actual, value, rtol=1e-12)
    assert counter.frame_count <= 2 * len(schedules)
    seen = counter.frame_count
    for schedule in schedules:
        run(schedule, torch.tensor([7, 8, 9]) if schedule.kind == "discrete" else torch.rand(3) * 0.8 + 0.1)
    assert counter.frame_count == seen


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_flow_takes_timesteps_as_diffusers_gives_them(inverted: bool, dtype: torch.dtype) -> None:
    schedule, (sample, noise) = flow_schedule(inverted=inverted), latents(4, torch.float64)
    sigma = torch.tensor([0.0004, 0.25, 0.75, 1.0], dtype=dtype)
    timesteps = 1000 * (1 - sigma if inverted else sigma)
    tolerance = 4 * torch.finfo(dtype).eps
    pairs = [
        (schedule.alpha_sigma(timesteps)[1], sigma.double()),
        (schedule.ratio_scale(timesteps)[1:], schedule.ratio_scale(sigmas=sigma)[1:]),
        (schedule.add_noise(sample, noise, timesteps), schedule.add_noise(sample, noise, sigmas=sigma)),
        (schedule.target(sample, noise, timesteps), schedule.target(sample, noise, sigmas=sigma)),
    ]
    for actual, expected in pairs:
        close(actual, expected, rtol=tolerance, atol=tolerance)
    assert schedule.ratio_scale(timesteps)[0] == schedule.ratio_scale(sigmas=sigma)[0] == math.inf
    loss_fn = SIPOLoss(schedule, beta=20.0, mask_threshold=0.0)
    given, meant = (loss_fn(sample, noise, sample - noise, **a) for a in ({"timesteps": timesteps}, {"sigmas": sigma}))
    close(given.loss, meant.loss, rtol=10 * tolerance)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_every_timestep_of_a_diffusers_flow_is_one(shift: float) -> None:
    """The lowest of its table too, alone or together: those are never taken for sigmas."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    for timesteps in (scheduler.timesteps, scheduler.timesteps[-1:], scheduler.timesteps[-8:]):
        expected = scheduler.sigmas[: len(scheduler.timesteps)][-len(timesteps) :]
        close(schedule.alpha_sigma(timesteps)[1], expected, rtol=1e-6)


def test_low_timesteps_of_a_flow_are_never_taken_for_sigmas() -> None:
    """What a batch can hold by chance, one level for many pairs, and grids that are dense near 0."""
    few, one, many = torch.tensor([0.25, 0.5, 1.0]).repeat(2), torch.tensor([0.25]), torch.full((64,), 0.5)
    low = diffusers.FlowMatchEulerDiscreteScheduler(shift=0.1)
    dense = low.timesteps[low.timesteps < 1]
    assert len(dense) == 9
    cases = [(NoiseSchedule.flow(), t) for t in (few, one, many)]
    cases += [(NoiseSchedule.from_scheduler(low), dense), (flow_schedule(inverted=True), dense)]
    for schedule, timesteps in cases:
        close(schedule.alpha_sigma(timesteps)[schedule.invert_sigmas - 1], timesteps / 1000, rtol=1e-6)


def test_sigmas_as_timesteps_are_refused_without_a_read() -> None:
    schedule = flow_schedule()
    torch._dynamo.reset()
    run = torch.compile(schedule.ratio_scale, fullgraph=True, backend="aot_eager", dynamic=True)
    close(run(torch.tensor([0.5, 0.25, 1.5, 0.75])), schedule.ratio_scale(torch.tensor([0.5, 0.25, 1.5, 0.75])))
    with pytest.raises(RuntimeError, match=r"timesteps: expected a number in \(0, 1000\], .* or sigmas="):
        run(torch.tensor([0.5, 0.25, 1.0, 0.75]))


WRONG: list[tuple[str, list[float], str]] = [
    ("discrete", [-1, -1000, 1000], "timesteps: expected an integer in [0, 1000)"),
    ("discrete", [-1.0, 1000.0, 2.5, math.nan, math.inf], "timesteps: expected an integer in [0, 1000)"),
    ("flow", [-3.0, 0.0, 1.001, 500.0, math.nan, math.inf], "sigmas: expected sigma in (0, 1]"),
    ("timesteps", [-3.0, 0.0, 1001.0, math.nan, math.inf], "timesteps: expected a number in (0, 1000], which is"),
    ("inverted", [-3.0, 1000.0, 1001.0, math.nan, math.inf], "timesteps: expected a number in [0, 1000), which is"),
]


def schedule_and_timesteps(kind: str) -> tuple[NoiseSchedule, Tensor]:
    """A schedule and levels as it draws them, by the name of the argument that takes them."""
    if kind == "discrete":
        return NoiseSchedule.discrete(), torch.tensor([5, 998])
    return NoiseSchedule.flow(3.0), torch.tensor([0.5, 1.0])


def schedule_and_argument(kind: str) -> tuple[NoiseSchedule, str, Tensor]:
    """The same, and the argument; "timesteps" and "inverted" are flows given diffusers' timesteps."""
    if kind in ("timesteps", "inverted"):
        return flow_schedule(inverted=kind == "inverted"), "timesteps", torch.tensor([0.75, 900.0])
    schedule, levels = schedule_and_timesteps(kind)
    ((name, levels),) = at(schedule, levels).items()
    return schedule, name, levels


def flow_schedule(*, inverted: bool = False, terminal: float | None = None) -> NoiseSchedule:
    return NoiseSchedule(
        "flow", prediction_type="flow", num_inference_steps=50, num_train_timesteps=1000, shift=3.0,
        shift_terminal=terminal, invert_sigmas=inverted,
    )  # fmt: skip


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    ("kind", "values", "message"), WRONG, ids=["indices", "float indices", "sigma", "timesteps", "inverted"]
)
def test_compiled_refuses_what_is_out_of_range(
    kind: str, values: list[float], message: str, dynamic: bool | None
) -> None:
    """Inductor takes a negative index from the end. It is too slow to be run here; what it is given is what runs."""
    torch._dynamo.reset()
    schedule, name, good = schedule_and_argument(kind)
    good = good.to(torch.tensor(values).dtype)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    def run(t: Tensor) -> tuple[Tensor, ...]:
        return schedule.ratio_scale(**{name: t}), *schedule.alpha_sigma(**{name: t})

    wanted = (schedule.ratio_scale(**{name: good}), *schedule.alpha_sigma(**{name: good}))
    for actual, expected in zip(run(good), wanted, strict=True):
        close(actual, expected, rtol=1e-12)
    for value in values:
        with pytest.raises(RuntimeError) as caught:
            run(torch.tensor([good[0].item(), value], dtype=good.dtype))
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "dtype", "asserts"),
    [
        ("flow", torch.float32, 2),
        ("timesteps", torch.float32, 2),
        ("inverted", torch.bfloat16, 2),
        ("discrete", torch.float32, 2),
        ("discrete", torch.int64, 0),
    ],
)
def test_an_accelerator_is_asserted_on_and_not_waited_for(
    kind: str, dtype: torch.dtype, asserts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake tensor raises where anyone asks for a value of it. Indices are asserted on where they are looked up."""
    schedule, name, _ = schedule_and_argument(kind)
    asserted: list[tuple[Tensor, str]] = []
    monkeypatch.setattr(torch, "_assert_async", lambda condition, message: asserted.append((condition, message)))
    with FakeTensorMode():
        on_gpu = torch.empty(2, dtype=dtype, device="cuda")
        tables = {name: torch.empty(table.shape, device="cuda") for name, table in schedule._tables.items()}
        schedule._device_tables[on_gpu.device] = tables
        assert schedule.ratio_scale(**{name: on_gpu}).device.type == "cuda"
        assert schedule.alpha_sigma(**{name: on_gpu})[0].device.type == "cuda"
    assert len(asserted) == asserts
    for condition, message in asserted:
        assert (condition.device.type, condition.dtype, condition.shape) == ("cuda", torch.bool, ())
        assert len(message.encode()) < 255  # CUDA's limit


@pytest.mark.parametrize("mode", ["fake", "real", "symbolic", "FakeTensorMode"])
@pytest.mark.parametrize("kind", ["discrete", "flow"])
def test_a_whole_loss_without_values(kind: str, mode: str) -> None:
    """Under a mode that has shapes alone, or that writes down what is done, no value is read."""
    schedule, timesteps = schedule_and_timesteps(kind)
    loss_fn = SIPOLoss(schedule, beta=5.0, backend="eager")
    timesteps = timesteps.repeat(2)  # a pair has one
    before = schedule.ratio_scale(**at(schedule, timesteps))
    sample, noise = latents(4)

    def run(noise: Tensor, t: Tensor) -> Tensor:
        noisy, target = (
            schedule.add_noise(sample, noise, **at(schedule, t)),
            schedule.target(sample, noise, **at(schedule, t)),
        )
        return loss_fn(noisy, noise, target, **at(schedule, t)).loss

    if mode == "FakeTensorMode":
        with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
            assert run(fakes.from_tensor(noise), fakes.from_tensor(timesteps)).shape == ()
            on_gpu = torch.empty(2, dtype=timesteps.dtype, device="cuda")
            assert schedule.ratio_scale(**at(schedule, on_gpu)).device.type == "cuda"
    else:
        graph = make_fx(run, tracing_mode=mode, _allow_non_fake_inputs=True)(noise, timesteps)
        other = timesteps.flip(0) if kind == "discrete" else timesteps * 0.75
        torch.testing.assert_close(graph(noise, other), run(noise, other))
        with pytest.raises(RuntimeError, match=r"(timesteps|sigmas): expected"):
            graph(noise, -other)
    assert torch.equal(schedule.ratio_scale(**at(schedule, timesteps)), before)
    assert set(schedule._device_tables) == {torch.device("cpu")}  # nothing of it stays


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", ["discrete", "flow"])
def test_traced(kind: str) -> None:
    """A trace drops assertions: what is out of range must be seen in the values, or raise where it is looked up."""
    schedule, timesteps = schedule_and_timesteps(kind)
    sample, noise = latents(2)

    def run(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            schedule.ratio_scale(**at(schedule, t)),
            schedule.add_noise(sample, noise, **at(schedule, t)),
            schedule.target(sample, noise, **at(schedule, t)),
        )

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traced = torch.jit.trace(run, timesteps)
    here = [str(w.message) for w in caught if "timestep_checks" in w.filename or "levels" in w.filename]
    assert here == []  # no value was taken for a constant
    other = timesteps.flip(0)
    for actual, expected in zip(traced(other), run(other), strict=True):
        close(actual, expected, rtol=1e-12)
    for value in (-1, 5000):
        wrong = torch.tensor([value, timesteps[0]]).to(timesteps.dtype)
        if kind == "discrete":
            with pytest.raises(RuntimeError, match="index out of range"):
                traced(wrong)
        else:
            scale, noisy, _ = traced(wrong)
            assert scale[0].isnan() and noisy[0].isnan().all()
            assert scale[1].isfinite() and noisy[1].isfinite().all()


def test_import_needs_torch_alone() -> None:
    code = "import sipo, sys; print([m for m in ('diffusers', 'accelerate') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_repr_has_all_that_the_numbers_depend_on() -> None:
    assert repr(NoiseSchedule.flow(3.0, 40)) == (
        "NoiseSchedule(kind='flow', prediction_type='flow', shift=3, num_inference_steps=40, num_train_timesteps=1000)"
    )
    digest = re.search("alphas_cumprod='sha256:[0-9a-f]{12}', ", repr(NoiseSchedule.discrete()))
    assert digest is not None
    assert repr(NoiseSchedule.discrete()).replace(digest[0], "") == (
        "NoiseSchedule(kind='discrete', prediction_type='epsilon', num_inference_steps=50, num_train_timesteps=1000)"
    )
    flow_options: dict[str, Any] = {"prediction_type": "flow", "num_inference_steps": 50, "num_train_timesteps": 1000}
    changed = NoiseSchedule.discrete().alpha_sigma(ALL_STEPS)[0].square()
    changed[300] *= 1 - 1e-6
    different = [
        NoiseSchedule.discrete(),
        NoiseSchedule.discrete(beta_end=0.0121),
        NoiseSchedule.discrete(num_inference_steps=40),
        NoiseSchedule.from_alphas_cumprod(changed),
        NoiseSchedule.flow(3.1581929096897672),
        NoiseSchedule.flow(3.15819),
        *(NoiseSchedule("flow", shift_terminal=value, **flow_options) for value in (0.1, 0.1000001)),
        NoiseSchedule("flow", invert_sigmas=True, **flow_options),
        NoiseSchedule("flow", **flow_options),
    ]
    assert len({repr(schedule) for schedule in different}) == len(different)
    assert repr(NoiseSchedule.discrete()) == repr(NoiseSchedule.discrete())


T = torch.tensor
read, cumprod = NoiseSchedule.from_scheduler, NoiseSchedule.from_alphas_cumprod
discrete, flow = NoiseSchedule.discrete, NoiseSchedule.flow
DISCRETE, FLOW = NoiseSchedule.discrete(), NoiseSchedule.flow()
X = torch.zeros(2, 3)
COUNTS: dict[str, Any] = {"num_inference_steps": 5, "num_train_timesteps": 10}
INVERTED = flow_schedule(inverted=True)
ERRORS: list[tuple[Any, type, str]] = [
    (lambda: flow(num_inference_steps=0), ValueError, "num_inference_steps=0: expected an integer >= 1"),
    (lambda: flow(0.0), ValueError, "shift=0.0: expected a finite number > 0"),
    (lambda: flow(math.nan), ValueError, "shift=nan"),
    (lambda: flow("3"), TypeError, "shift='3' is a str"),
    (
        lambda: discrete(prediction_type="flow"),
        ValueError,
        "prediction_type='flow': expected one of epsilon, v_prediction, sample",
    ),
    (
        lambda: NoiseSchedule("discrete", prediction_type="epsilon", **COUNTS),
        ValueError,
        "alphas_cumprod=None: expected the table [10] of a discrete schedule",
    ),
    (
        lambda: NoiseSchedule("discrete", prediction_type="epsilon", alphas_cumprod=torch.ones(9), **COUNTS),
        ValueError,
        "alphas_cumprod has shape [9]: expected [10]",
    ),
    (
        lambda: NoiseSchedule("flow", prediction_type="flow", alphas_cumprod=torch.ones(10), **COUNTS),
        ValueError,
        "alphas_cumprod: expected none for a flow schedule",
    ),
    *[
        (
            lambda o=option: NoiseSchedule(
                "discrete", prediction_type="epsilon", alphas_cumprod=torch.ones(10), **o, **COUNTS
            ),
            ValueError,
            message,
        )
        for option, message in (
            ({"shift_terminal": 0.1}, "shift_terminal=0.1: expected it only for a flow schedule"),
            ({"shift": 3.0}, "shift=3.0: expected it only for a flow schedule"),
            ({"invert_sigmas": True}, "invert_sigmas=True: expected it only for a flow schedule"),
        )
    ],
    (lambda: discrete(prediction_type="x0"), ValueError, "prediction_type='x0'"),
    (lambda: discrete(beta_schedule="cosine"), ValueError, "beta_schedule='cosine': expected one of linear"),
    (lambda: discrete(beta_start=0.02, beta_end=0.01), ValueError, "beta_start=0.02, beta_end=0.01"),
    (lambda: discrete(snr_shift_scale=-1), ValueError, "snr_shift_scale=-1"),
    (lambda: discrete(1, rescale_betas_zero_snr=True), ValueError, "num_train_timesteps=1: expected an integer >= 2"),
    (
        lambda: NoiseSchedule("vp", prediction_type="epsilon", num_inference_steps=1, num_train_timesteps=1),
        ValueError,
        "kind='vp'",
    ),
    (lambda: cumprod([0.5, 0.6]), ValueError, "alphas_cumprod[1]=0.6: expected a value in [0, 0.5]"),
    (lambda: cumprod([1.5]), ValueError, "alphas_cumprod[0]=1.5: expected a value in [0, 1.0]"),
    (lambda: cumprod([0.5, math.nan]), ValueError, "alphas_cumprod[1]=nan"),
    (lambda: cumprod([]), ValueError, "alphas_cumprod has shape [0]"),
    (lambda: cumprod(torch.ones(2, 2)), ValueError, "alphas_cumprod has shape [2, 2]"),
    (lambda: DISCRETE.ratio_scale([1, 2]), TypeError, "timesteps is a list: expected a torch.Tensor"),
    (lambda: DISCRETE.ratio_scale(T(5)), ValueError, "timesteps has shape []: expected [N]"),
    (lambda: DISCRETE.ratio_scale(T([3, 1000])), ValueError, "timesteps[1]=1000: expected an integer in [0, 1000)"),
    (lambda: DISCRETE.ratio_scale(T([-1])), ValueError, "timesteps[0]=-1"),
    (lambda: DISCRETE.ratio_scale(T([3.0, 2.5])), ValueError, "timesteps[1]=2.5: expected an integer"),
    (lambda: DISCRETE.ratio_scale(T([math.nan])), ValueError, "timesteps[0]=nan"),
    (lambda: DISCRETE.ratio_scale(T([1.0]).bfloat16()), TypeError, "timesteps has dtype torch.bfloat16"),
    (lambda: DISCRETE.ratio_scale(T([True])), TypeError, "timesteps has dtype torch.bool"),
    (lambda: DISCRETE.ratio_scale(T([5 + 0j])), TypeError, "timesteps has dtype torch.complex64"),
    (lambda: DISCRETE.ratio_scale(T([2**63], dtype=torch.uint64)), ValueError, "timesteps[0]=9223372036854775808"),
    (lambda: DISCRETE.ratio_scale(T([5, 1000], dtype=torch.uint16)), ValueError, "timesteps[1]=1000: expected an"),
    (lambda: FLOW.ratio_scale(sigmas=T([0.5, 500.0])), ValueError, "sigmas[1]=500.0: expected sigma in (0, 1]"),
    (lambda: FLOW.ratio_scale(sigmas=T([0.0])), ValueError, "sigmas[0]=0.0: expected sigma in (0, 1]"),
    (lambda: FLOW.ratio_scale(sigmas=T([math.nan])), ValueError, "sigmas[0]=nan"),
    (lambda: FLOW.ratio_scale(sigmas=T([1.001])), ValueError, "sigmas[0]=1.001"),
    (lambda: FLOW.ratio_scale(sigmas=T([1])), TypeError, "sigmas has dtype torch.int64: expected a floating"),
    (
        lambda: FLOW.ratio_scale(T([500])),
        TypeError,
        "timesteps has dtype torch.int64: expected a floating-point type, a number in (0, 1000], which is "
        "sigma * 1000, or sigmas= in (0, 1]; a solver with use_flow_sigmas rounds its timesteps, pass its sigmas",
    ),
    (
        lambda: FLOW.ratio_scale(T([900.0, 1001.0])),
        ValueError,
        "timesteps[1]=1001.0: expected a number in (0, 1000], which is sigma * 1000, or sigmas= in (0, 1]",
    ),
    (lambda: FLOW.add_noise(X, X, T([0.0, 500.0])), ValueError, "timesteps[0]=0.0: expected a number in (0, 1000]"),
    (
        lambda: FLOW.ratio_scale(T([0.5, 0.25, 1.0, 0.75])),
        ValueError,
        "timesteps are all in (0, 1], as sigmas are: expected a number in (0, 1000]",
    ),
    (lambda: INVERTED.ratio_scale(T([1000.0])), ValueError, "timesteps[0]=1000.0: expected a number"),
    (lambda: FLOW.ratio_scale(), ValueError, "neither of timesteps and sigmas given: expected one"),
    (lambda: FLOW.ratio_scale(T([5.0]), sigmas=T([0.5])), ValueError, "both of timesteps and sigmas given"),
    (lambda: DISCRETE.ratio_scale(sigmas=T([0.5])), ValueError, "sigmas given: expected timesteps, a discrete"),
    (lambda: FLOW.add_noise(X, X, sigmas=T([0.5])), ValueError, "sigmas has shape [1]: expected [2]"),
    (lambda: SIPOLoss(FLOW, beta=1.0)(X, X, X, sigmas=T([0.5] * 3)), ValueError, "sigmas has shape [3]: expected [2]"),
    (lambda: DISCRETE.add_noise(X, X, T([1, 2, 3])), ValueError, "timesteps has shape [3]: expected [2]"),
    (lambda: DISCRETE.add_noise(X, X[:1], T([1, 2])), ValueError, "noise has shape [1, 3]: expected [2, 3]"),
    (lambda: DISCRETE.target(X.long(), X, T([1, 2])), TypeError, "sample is a torch.int64"),
    (lambda: DISCRETE.target(X, None, T([1, 2])), TypeError, "noise is a NoneType"),
    (lambda: DISCRETE.add_noise(X, X, [1, 2]), TypeError, "timesteps is a list"),
    (lambda: DISCRETE.sample_levels(0), ValueError, "n=0: expected an integer >= 1"),
    (
        lambda: DISCRETE.sample_levels(2, distribution="shifted"),
        ValueError,
        "distribution='shifted': expected one of uniform",
    ),
    (
        lambda: FLOW.sample_levels(2, distribution="mode"),
        ValueError,
        "distribution='mode': expected one of uniform, logit_normal",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[message[:60] for _, _, message in ERRORS])
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    assert_refused(call, error, message)
