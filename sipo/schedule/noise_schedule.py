"""Noise schedules: α and σ, training targets and the scale of the importance ratio (docs/math.md §3).

The formulas are in ``levels.py``. Only torch is needed: ``diffusers_schedulers.py`` recognises classes by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sipo.schedule.diffusers_schedulers import read_scheduler
from sipo.schedule.levels import (
    PREDICTIONS,
    SettingError,
    check_count,
    check_discrete,
    check_positive,
    checked_alphas_cumprod,
    draw_levels,
    flow_ratio_scale,
    terminal_stretch,
    vp_alphas_cumprod,
    vp_tables,
)
from sipo.schedule.timestep_checks import checked_levels, level_arguments
from sipo_kernels.layout import pair_dtype
from sipo_kernels.options import check_choice

DEFAULT_INFERENCE_STEPS = 50


class NoiseSchedule:
    """α and σ of every noise level, and how far the sampler's next step goes from there.

    Built by :meth:`from_scheduler`, :meth:`discrete`, :meth:`from_alphas_cumprod` or :meth:`flow`; it does not change
    afterwards.

    Every method takes noise levels as a 1-D tensor in one of two arguments:

    - ``timesteps``, in the units of diffusers' schedulers. For ``kind="discrete"``: indices in
      ``[0, num_train_timesteps)`` of any integer type, or float32 or float64 holding whole numbers (half types cannot
      hold every index and are refused). For ``kind="flow"``: ``σ * num_train_timesteps``, 0 to 1000 for most, of any
      floating-point type; with ``invert_sigmas``, ``(1 − σ) * num_train_timesteps``.
    - ``sigmas``, for a flow only: σ in (0, 1] of any floating-point type, the share of noise.

    The name of the argument decides what the numbers mean, never their size. Timesteps of a flow that can only be
    sigmas are refused: four or more different values that are all in (0, 1], where ``shift`` is 1 or more and
    ``num_train_timesteps`` 1000 or more. Fewer values, or those of another flow or with ``invert_sigmas``, may be low
    timesteps, so sigmas passed as such are not noticed.

    A value out of range, or NaN, is a ValueError on the CPU. On CUDA, and in compiled code, it fails an assertion that
    needs no synchronisation (``torch._assert_async``): on CUDA "device-side assert triggered" at the next
    synchronisation, with the text on stderr; on the CPU a RuntimeError with that text. Where there is no assertion
    (``torch.jit.trace``, other devices, ROCm), results for such a σ are NaN.

    Attributes:
        kind: ``"discrete"`` (variance preserving, α² + σ² = 1) or ``"flow"`` (rectified flow, α = 1 − σ).
        prediction_type: What the network predicts: ``"epsilon"``, ``"v_prediction"``, ``"sample"`` or ``"flow"``
            (ε − x₀).
        num_inference_steps: Steps of the sampler whose previous level enters :meth:`ratio_scale`.
        num_train_timesteps: Number of discrete levels; for a flow, the factor from σ to the network's timesteps.
        shift: ``k`` of the flow's sampling grid σ = k·u / (1 + (k − 1)·u); 1 for a discrete schedule.
        shift_terminal: Lowest σ above 0 of a flow's sampling grid that is stretched; ``None`` without a stretch.
        invert_sigmas: The flow's network predicts x₀ − ε and is told the share of data in place of noise (Mochi).
    """

    def __init__(
        self,
        kind: str,
        *,
        prediction_type: str,
        num_inference_steps: int,
        num_train_timesteps: int,
        shift: float = 1.0,
        shift_terminal: float | None = None,
        invert_sigmas: bool = False,
        alphas_cumprod: Tensor | None = None,
    ) -> None:
        """Takes the results of the named constructors, which are to be preferred.

        Raises:
            TypeError, ValueError: A value outside its range; most are :class:`sipo.schedule.levels.SettingError`, which
                has the argument's name.
        """
        check_choice("kind", kind, tuple(PREDICTIONS))
        spelt_out = "flow_prediction" if prediction_type == "flow" else prediction_type  # "flow" is short for it
        if spelt_out not in PREDICTIONS[kind]:
            expected = f"one of {', '.join(PREDICTIONS[kind])} for a {kind} schedule"
            raise SettingError("prediction_type", f"={prediction_type!r}: expected {expected}")
        check_count("num_train_timesteps", num_train_timesteps, 1)
        most_steps = num_train_timesteps if kind == "discrete" else None
        check_count("num_inference_steps", num_inference_steps, 1, most_steps)
        check_positive("shift", shift)
        if kind == "discrete":
            check_discrete(num_train_timesteps, shift, shift_terminal, invert_sigmas, alphas_cumprod)
        elif alphas_cumprod is not None:
            raise ValueError("alphas_cumprod: expected none for a flow schedule")
        self.kind = kind
        self.prediction_type = "flow" if spelt_out == "flow_prediction" else prediction_type
        self.num_inference_steps = num_inference_steps
        self.num_train_timesteps = num_train_timesteps
        self.shift = float(shift)
        self.shift_terminal = shift_terminal
        self.invert_sigmas = invert_sigmas
        self._level_arguments = level_arguments(kind, num_train_timesteps, invert_sigmas, shift)
        self._stretch = terminal_stretch(self.shift, num_inference_steps, shift_terminal)
        self._tables = {} if alphas_cumprod is None else vp_tables(alphas_cumprod, num_inference_steps, prediction_type)
        self._device_tables = {torch.device("cpu"): self._tables}

    @classmethod
    def from_scheduler(
        cls,
        scheduler: Any,
        num_inference_steps: int = DEFAULT_INFERENCE_STEPS,
        prediction_type: str | None = None,
        *,
        shift: float | None = None,
        image_seq_len: int | None = None,
        mu: float | None = None,
    ) -> NoiseSchedule:
        """Reads the schedule of a diffusers scheduler, or of a subclass of one.

        FlowMatchEulerDiscrete, FlowMatchHeunDiscrete, FlowMatchLCM and solvers with ``use_flow_sigmas`` set (DPMSolver,
        UniPC, DEIS, SASolver) are flows. Every other scheduler that has ``alphas_cumprod`` is a discrete schedule, read
        from that table, even if it was changed by hand. Most tables are float32, so ``ratio_scale`` is accurate to 1e-4
        for Stable Diffusion's β and to a few 1e-3 for those that start nearer to 0. How the sampler spaces its steps
        (``timestep_spacing``, Karras sigmas, ...) does not matter: §3's stride is uniform.

        Args:
            scheduler: The scheduler; not kept and not changed.
            num_inference_steps: Steps of the sampler (§3), whatever the scheduler is set to.
            prediction_type: In place of the scheduler's own; ``"flow"`` and diffusers' ``"flow_prediction"``
                are the same.
            shift: ``k`` in place of the scheduler's.
            image_seq_len: Number of tokens of the resolution trained on, (height / 16) · (width / 16) for Stable
                Diffusion 3 and Flux. With ``use_dynamic_shifting`` it determines ``k``, as in most of diffusers'
                pipelines; such a scheduler needs it, ``mu`` or ``shift``. Others ignore it.
            mu: What the model's pipeline passes to ``set_timesteps(mu=)``, in place of ``image_seq_len``. For FLUX.2
                it is :func:`sipo.schedule.empirical_mu`, which depends on the number of steps as well.

        Raises:
            TypeError: A number of the wrong type.
            ValueError: A scheduler that is not modelled (with the reason), or an option of it that is not.
        """
        read = read_scheduler(scheduler, shift, image_seq_len, mu)
        if prediction_type is not None:
            read = read._replace(prediction_type=prediction_type)
        if read.alphas_cumprod is not None:
            return cls.from_alphas_cumprod(read.alphas_cumprod, read.prediction_type, num_inference_steps)
        return cls("flow", num_inference_steps=num_inference_steps, **read._asdict())

    @classmethod
    def discrete(
        cls,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        prediction_type: str = "epsilon",
        snr_shift_scale: float = 1.0,
        rescale_betas_zero_snr: bool = False,
        num_inference_steps: int = DEFAULT_INFERENCE_STEPS,
    ) -> NoiseSchedule:
        """Makes a variance-preserving schedule in float64; the defaults are Stable Diffusion's.

        Args:
            num_train_timesteps: ``T``.
            beta_start: First β of the forward process (not of any loss), in (0, 1).
            beta_end: Last β, in [beta_start, 1). ``squaredcos_cap_v2`` uses neither.
            beta_schedule: ``"linear"`` in β, ``"scaled_linear"`` in √β, or ``"squaredcos_cap_v2"`` (ᾱ a
                squared cosine, β at most 0.999).
            prediction_type: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``.
            snr_shift_scale: Divides every SNR (CogVideoX).
            rescale_betas_zero_snr: Rescales √ᾱ so that it ends at exactly 0, after the shift of the SNR.
            num_inference_steps: Steps of the sampler (§3).

        Raises:
            TypeError, ValueError: A value outside its range.
        """
        table = vp_alphas_cumprod(
            num_train_timesteps, beta_start, beta_end, beta_schedule, snr_shift_scale, rescale_betas_zero_snr
        )
        return cls.from_alphas_cumprod(table, prediction_type, num_inference_steps)

    @classmethod
    def from_alphas_cumprod(
        cls,
        alphas_cumprod: Tensor | Sequence[float],
        prediction_type: str = "epsilon",
        num_inference_steps: int = DEFAULT_INFERENCE_STEPS,
    ) -> NoiseSchedule:
        """Makes a variance-preserving schedule from ᾱ = α² of each level (tensor, NumPy array or sequence ``[T]``).

        Raises:
            ValueError: Not 1-D, empty, a value outside [0, 1] or larger than the one before.
        """
        table = checked_alphas_cumprod(alphas_cumprod)
        return cls(
            "discrete",
            prediction_type=prediction_type,
            num_inference_steps=num_inference_steps,
            num_train_timesteps=table.numel(),
            alphas_cumprod=table,
        )

    @classmethod
    def flow(cls, shift: float = 1.0, num_inference_steps: int = DEFAULT_INFERENCE_STEPS) -> NoiseSchedule:
        """Makes a rectified flow, x_t = (1 − σ)·x₀ + σ·ε with target ε − x₀, on a grid shifted by ``shift`` > 0.

        Raises:
            TypeError, ValueError: A value outside its range.
        """
        return cls(
            "flow",
            prediction_type="flow",
            num_inference_steps=num_inference_steps,
            num_train_timesteps=1000,
            shift=shift,
        )

    def ratio_scale(self, timesteps: Tensor | None = None, *, sigmas: Tensor | None = None) -> Tensor:
        """Computes ½ (SNR(t') − SNR(t)) · x0_factor of §3: minus the log ratio per unit of squared error.

        A flow's last step is recognised within the rounding of the argument's type: a u' counts as 0 if an error of a
        few units in the last place of σ explains it.

        Args:
            timesteps: ``[N]``, see the class.
            sigmas: ``[N]``, in place of ``timesteps``.

        Returns:
            ``[N]``, float64 (float32 on a device without it) on the device of the argument. Never NaN and never
            negative; inf at the terminal step, and with ε-prediction also where the SNR is 0.

        Raises:
            TypeError, ValueError: An argument of the wrong type, shape or range, or not exactly one of them.
        """
        levels, given = self._levels(timesteps, sigmas)
        if self.kind == "discrete":
            return self._table("ratio_scale", levels.device).index_select(0, levels)
        return flow_ratio_scale(
            levels,
            self.shift,
            self.num_inference_steps,
            self.prediction_type,
            torch.finfo(given.dtype).eps,
            self._stretch,
            subtracted=self.invert_sigmas or self.shift_terminal is not None,
        )

    def alpha_sigma(self, timesteps: Tensor | None = None, *, sigmas: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns α and σ of x_t = α·x₀ + σ·ε, ``[N]`` each; arguments, types and errors as :meth:`ratio_scale`."""
        levels, _ = self._levels(timesteps, sigmas)
        if self.kind == "flow":
            return 1 - levels, levels
        alpha = self._table("alpha", levels.device).index_select(0, levels)
        return alpha, self._table("sigma", levels.device).index_select(0, levels)

    def add_noise(
        self, sample: Tensor, noise: Tensor, timesteps: Tensor | None = None, *, sigmas: Tensor | None = None
    ) -> Tensor:
        """Returns x_t = α·x₀ + σ·ε, the network's input (EulerDiscrete's own ``add_noise`` is this over α).

        Args:
            sample: x₀, ``[N, ...]``, any floating-point type; ``noise`` is ε, shaped likewise.
            timesteps: ``[N]``, see the class; moved to the device of ``sample``.
            sigmas: ``[N]``, in place of ``timesteps``.

        Returns:
            Shaped and typed as ``sample``; computed in float32 or wider.

        Raises:
            TypeError, ValueError: Types, shapes or values that do not fit.
        """
        alpha, sigma, work = self._coefficients(sample, noise, timesteps, sigmas)
        return (alpha * sample.to(work) + sigma * noise.to(work)).to(sample.dtype)

    def target(
        self, sample: Tensor, noise: Tensor, timesteps: Tensor | None = None, *, sigmas: Tensor | None = None
    ) -> Tensor:
        """Returns what the network should predict: ε, v = α·ε − σ·x₀, ε − x₀ (flow) or x₀, by ``prediction_type``.

        With ``invert_sigmas`` a flow's target is x₀ − ε. Arguments, result and errors as for :meth:`add_noise`.
        """
        alpha, sigma, work = self._coefficients(sample, noise, timesteps, sigmas)
        if self.prediction_type == "epsilon":
            return noise.to(sample.dtype)
        if self.prediction_type == "sample":
            return sample
        if self.prediction_type == "flow":
            flow = noise.to(work) - sample.to(work)
            return (-flow if self.invert_sigmas else flow).to(sample.dtype)
        return (alpha * noise.to(work) - sigma * sample.to(work)).to(sample.dtype)

    def sample_levels(
        self,
        n: int,
        generator: torch.Generator | None = None,
        *,
        distribution: str = "uniform",
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draws random noise levels to train on: timestep indices, or σ of a flow.

        ======================== ================================== ==========================================
        ``distribution``         noise levels                       in diffusers' training scripts
        ======================== ================================== ==========================================
        ``uniform``              discrete: uniform in [0, T)        all of them
        ``uniform``              flow: σ uniform in (0, 1]          Flux with ``weighting_scheme="none"``
        ``logit_normal``         σ = sigmoid(N(0, 1))               Flux with ``"logit_normal"``
        ``shifted``              uniform, then shifted              SD3 with ``"none"``; Wan
        ``shifted_logit_normal`` logit-normal, then shifted         SD3 with ``"logit_normal"``
        ======================== ================================== ==========================================

        Shifted is σ = k·u / (1 + (k − 1)·u) with k = ``shift``; with ``shift_terminal`` τ it is then stretched to
        (τ, 1] as τ + (1 − τ)·σ, the grid of a sampler with many steps. (SD3's scripts shift because the scheduler's own
        table of σ, from which they pick, is shifted; Flux's is not, as it shifts dynamically.)

        Args:
            n: How many.
            generator: Draws come from it, on its own device; torch's global generator if left out.
            distribution: See above; a discrete schedule has only ``uniform``.
            device: Device of the result; by default the generator's, or the CPU without one.

        Returns:
            ``[n]``: int64 indices of a discrete schedule; float32 σ in (0, 1] of a flow, to be passed as ``sigmas=``.

        Raises:
            TypeError, ValueError: ``n`` < 1 or an unknown distribution.
        """
        draws = n, generator, distribution, device
        return draw_levels(self.kind, self.num_train_timesteps, self.shift, self.shift_terminal, *draws)

    def settings(self) -> dict[str, Any]:
        """Returns all that the schedule's numbers depend on, as JSON values; part of a checkpoint's identity."""
        values: dict[str, Any] = {"kind": self.kind, "prediction_type": self.prediction_type}
        if self.kind == "flow":
            values["shift"] = float(f"{self.shift:.12g}")
        else:
            # In float32, whose digits do not depend on how a library rounds the last digit of a float64.
            table = self._tables["alpha"].square().float().numpy().tobytes()
            values["alphas_cumprod"] = f"sha256:{hashlib.sha256(table).hexdigest()[:12]}"
        values["num_inference_steps"] = self.num_inference_steps
        values["num_train_timesteps"] = self.num_train_timesteps
        if self.shift_terminal is not None:
            values["shift_terminal"] = float(f"{self.shift_terminal:.12g}")
        if self.invert_sigmas:
            values["invert_sigmas"] = True
        return values

    def __repr__(self) -> str:
        fields = (
            f"{name}={value:.12g}" if isinstance(value, float) else f"{name}={value!r}"
            for name, value in self.settings().items()
        )
        return f"{type(self).__name__}({', '.join(fields)})"

    def _table(self, name: str, device: torch.device) -> Tensor:
        # Cached by device, so that a call uploads nothing. A device first seen in compiled code costs a recompilation.
        tables = self._device_tables.get(device)
        if tables is None:
            dtype = pair_dtype(device)
            tables = {key: table.to(device, dtype) for key, table in self._tables.items()}
            if all(type(table) is Tensor for table in tables.values()):  # fake tensors are useless later
                self._device_tables[device] = tables
        return tables[name]

    def _levels(self, timesteps: Tensor | None, sigmas: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the checked levels, int64 indices or σ in the type that results have, and the argument given."""
        if (timesteps is None) == (sigmas is None):
            raise ValueError(f"{'neither' if sigmas is None else 'both'} of timesteps and sigmas given: expected one")
        given: Any = timesteps if sigmas is None else sigmas
        name = "timesteps" if sigmas is None else "sigmas"
        if name not in self._level_arguments:
            raise ValueError("sigmas given: expected timesteps, a discrete schedule has no sigma in (0, 1]")
        return checked_levels(given, self._level_arguments[name]), given

    def _coefficients(
        self, sample: Tensor, noise: Tensor, timesteps: Tensor | None, sigmas: Tensor | None
    ) -> tuple[Tensor, Tensor, torch.dtype]:
        """Returns α and σ shaped to multiply ``sample``, and the type to compute in: float32 or wider."""
        for name, tensor in (("sample", sample), ("noise", noise)):
            if not isinstance(tensor, Tensor) or not tensor.dtype.is_floating_point:
                found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"{name} is a {found}: expected a floating-point torch.Tensor")
        if noise.shape != sample.shape:
            raise ValueError(f"noise has shape {list(noise.shape)}: expected {list(sample.shape)}, that of sample")
        timesteps, sigmas = (v.to(sample.device) if isinstance(v, Tensor) else v for v in (timesteps, sigmas))
        alpha, sigma = self.alpha_sigma(timesteps, sigmas=sigmas)
        if alpha.shape != sample.shape[:1]:
            name = "timesteps" if sigmas is None else "sigmas"
            raise ValueError(f"{name} has shape {list(alpha.shape)}: expected {list(sample.shape[:1])}, one a sample")
        work = torch.promote_types(torch.promote_types(sample.dtype, noise.dtype), torch.float32)
        shape = (-1, *[1] * (sample.ndim - 1))
        return alpha.to(work).reshape(shape), sigma.to(work).reshape(shape), work
