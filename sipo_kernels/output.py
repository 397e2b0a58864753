"""The output of a call, and docs/math.md §8 in plain torch: the metrics of a batch and its sums by noise level.

The kernels compute the same numbers along with the loss (``csrc/report.h``, ``backends/triton/batch_report.py``). The
functions here serve outputs without them: those of plain torch or of a compiled graph, and those whose fields a loss
has replaced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sipo_kernels.layout import pair_dtype

# Results of each sample (§2 to §6), in the order in which the kernels write them.
SAMPLE_ROWS = ("model_error", "ref_error", "error_gap", "log_ratio", "weight", "reward", "coef")
COEF_ROW = SAMPLE_ROWS.index("coef")
# The fields of PairLossOutput that are results.
RESULTS = ("loss", *SAMPLE_ROWS, "mask", "logits")
# What a batch reports (§8), in the order in which the kernels write it.
METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "model_mse",
    "ref_mse",
    "chosen_gap",
    "rejected_gap",
    "weight_mean",
    "clip_fraction",
    "active_fraction",
    "nonfinite_pairs",
)
# Rows of the sums by noise level (§8): pairs that the sums are over, pairs that are left out, and what is summed.
STATISTICS = (
    "count",
    "nonfinite",
    "model_error_chosen",
    "model_error_rejected",
    "ref_error_chosen",
    "ref_error_rejected",
    "chosen_gap",
    "rejected_gap",
    "ratio",
    "weight",
    "clipped",
    "active",
    "logits",
    "logits_sq",
    "accuracy",
    "coef",
    "coef_sq",
    "grad_sq",
)


class Totals(NamedTuple):
    """Running sums that a call adds its numbers to, on its device, so that many calls are read at once (§8).

    Attributes:
        metrics: ``[2, len(METRICS)]`` float32: sums of each metric's finite values, each times the pairs that it is a
            mean over, and sums of these pairs; of ``nonfinite_pairs`` its total, and the calls.
        levels: ``[len(STATISTICS), n]`` float32: sums over pairs by noise level, in n bins of equal width.
        pair_levels: where each pair is in them: ``[B]`` or ``[S]`` (then the chosen samples'), of any type but bool.
        top: the end of the noise levels: the number of training timesteps, or 1 for σ. Pair i is in bin
            ``⌊pair_levels[i] · n / top⌋``, the first or last where that lies outside.
    """

    metrics: Tensor | None = None
    levels: Tensor | None = None
    pair_levels: Tensor | None = None
    top: float = 1.0


@dataclass(frozen=True, eq=False)
class PairLossOutput:
    """Result of :func:`sipo_kernels.pair_loss` for ``B`` pairs, ``S = 2B`` samples. Names of ``docs/math.md``.

    Attributes:
        loss: scalar, or ``[B]`` for ``reduction="none"``; differentiable in ``model_pred``.
        samples: ``[len(SAMPLE_ROWS), S]``, the results of each sample, which the properties below name.
        logits: ``[B]`` (§5).
        mask: ``[B]`` bool, the pairs that take part.
        clip_range: the clip's bounds, ``None`` for a method that does not clip.
        loss_type: the loss of a logit.
        skip_nonfinite: whether non-finite pairs were left out.
        numbers: the metrics as the kernel wrote them, in the order of ``METRICS`` and with one more number behind;
            ``None``: they are made from the fields above. To replace a field (``dataclasses.replace``), set this to
            ``None`` too.
    """

    loss: Tensor
    samples: Tensor
    logits: Tensor
    mask: Tensor
    clip_range: tuple[float, float] | None = None
    loss_type: str = "sigmoid"
    skip_nonfinite: bool = False
    numbers: Tensor | None = None

    @property
    def model_error(self) -> Tensor:
        """``[S]`` mean squared error of the policy (§2)."""
        return self.samples[SAMPLE_ROWS.index("model_error")]

    @property
    def ref_error(self) -> Tensor:
        """``[S]`` mean squared error of the reference (§2)."""
        return self.samples[SAMPLE_ROWS.index("ref_error")]

    @property
    def error_gap(self) -> Tensor:
        """``[S]`` ``model_error − ref_error``, accumulated without cancellation."""
        return self.samples[SAMPLE_ROWS.index("error_gap")]

    @property
    def log_ratio(self) -> Tensor:
        """``[S]`` log importance ratio (§3); 0 where no ``ratio_scale`` was given."""
        return self.samples[SAMPLE_ROWS.index("log_ratio")]

    @property
    def weight(self) -> Tensor:
        """``[S]`` clipped importance ratio (§4)."""
        return self.samples[SAMPLE_ROWS.index("weight")]

    @property
    def reward(self) -> Tensor:
        """``[S]`` implicit reward, the sample's term in the logit (§5).

        Positive where the policy denoises the sample better than the reference does.
        """
        return self.samples[SAMPLE_ROWS.index("reward")]

    @property
    def coef(self) -> Tensor:
        """``[S]`` factor of ``model_pred − target`` in the gradient (§6) for an upstream gradient of 1.

        With ``safeguard``, the rejected sample's includes λ.
        """
        return self.samples[COEF_ROW]

    def finite_pairs(self) -> Tensor:
        """``[B]`` bool: pairs whose errors, gaps, weights, logits and losses (z² of ``"ipo"``) are finite here (§8)."""
        sample = torch.isfinite(self.model_error) & torch.isfinite(self.error_gap) & torch.isfinite(self.weight)
        chosen, rejected = sample.chunk(2)
        penalty = (self.logits - 0.5).square() if self.loss_type == "ipo" else self.logits
        return chosen & rejected & torch.isfinite(penalty)

    def metrics(self) -> dict[str, Tensor]:
        """Returns what a batch reports (§8), as 0-d tensors on the device, without a host synchronisation.

        Means run over all pairs; with ``nonfinite="skip"`` over the finite ones (0 if there are none), so that one
        broken pair does not blind the log. ``active_fraction`` always counts out of all pairs.
        """
        numbers = _metrics(self) if self.numbers is None else self.numbers
        return dict(zip(METRICS, numbers.unbind(), strict=False))


def _clipped(output: Any, ratio: Tensor) -> Tensor:
    """Returns ``[S]``: 1 where the ratio was clipped (§4), else 0."""
    clip_range = getattr(output, "clip_range", None)
    if clip_range is None:
        return torch.zeros_like(ratio)
    return ((ratio < clip_range[0]) | (ratio > clip_range[1])).to(ratio.dtype)


def _correct(logits: Tensor) -> Tensor:
    """Returns 1 where the logit prefers the chosen sample, 0.5 for a tie, else 0, also for NaN."""
    return (logits > 0).to(logits.dtype) + 0.5 * (logits == 0).to(logits.dtype)


def _metrics(output: PairLossOutput) -> Tensor:
    """Returns the metrics of §8 as a vector, in the order of ``METRICS``."""
    dtype = output.logits.dtype
    finite, loss = output.finite_pairs(), output.loss.detach().to(dtype)
    ratio = torch.exp(output.log_ratio)
    samples = torch.stack([output.model_error, output.ref_error, output.weight, _clipped(output, ratio)])
    model_mse, ref_mse, weight, clipped = samples.unflatten(1, (2, -1)).mean(1)
    chosen_reward, rejected_reward = output.reward.chunk(2)
    chosen_gap, rejected_gap = output.error_gap.chunk(2)
    rewards = [chosen_reward, rejected_reward, output.logits, _correct(output.logits)]
    rows = torch.stack([*rewards, model_mse, ref_mse, chosen_gap, rejected_gap, weight, clipped]).to(
        pair_dtype(output.logits.device)
    )
    if output.skip_nonfinite:
        means = torch.where(finite, rows, 0).sum(1) / finite.sum().clamp(min=1)
    else:
        means = rows.mean(1)
    counts = torch.stack([output.mask.to(dtype).mean(), (~finite).sum().to(dtype)])
    return torch.cat([loss.mean()[None], means.to(dtype), counts])


def level_bins(pair_levels: Tensor, bins: int, top: float) -> Tensor:
    """Returns the bin of each noise level, int64: ``bins`` of equal width from 0 to ``top``; in float32, as σ is."""
    place = (pair_levels.to(pair_dtype(pair_levels.device)) * bins / top).float()
    return place.nan_to_num(0.0).clamp(0, bins - 1).long()


def add_levels(levels: Tensor, bins: Tensor, output: Any, coef_unit: Tensor | float) -> None:
    """Adds a batch to sums by noise level, ``[len(STATISTICS), n]`` float32.

    Args:
        levels: the sums.
        bins: ``[B]``, each pair's.
        output: with the fields of :class:`PairLossOutput`, ``clip_range`` left out or not.
        coef_unit: The factor that turns a sample's coefficient into §8's ``k``: a number, or ``[S]``.
    """
    ratio = output.log_ratio.exp()
    coef = output.coef * coef_unit
    each = (output.model_error, output.ref_error, output.error_gap, ratio, output.weight, _clipped(output, ratio))
    both = torch.stack([*each, coef]).float().unflatten(1, (2, -1))  # [7, chosen and rejected sample, B]
    logits, coef = output.logits.float(), both[6]
    pair = (output.mask, logits, logits.square(), _correct(logits), coef[0], coef[0].square())
    grad_sq = (coef.square() * both[0]).sum(0)
    rows = torch.cat([both[:3].flatten(0, 1), both[3:6].mean(1), torch.stack([*pair, grad_sq])])
    finite = torch.isfinite(rows).all(0)
    rows = torch.cat([torch.stack([finite, ~finite]), torch.where(finite, rows, 0.0)])
    hits = bins == torch.arange(levels.shape[1], device=rows.device)[:, None]
    # Not index_add, whose order of addition is not fixed on a GPU, nor matmul, which may round to TF32.
    levels += (rows[:, None] * hits).sum(-1)


def _metric_pairs(output: PairLossOutput) -> Tensor:
    """Returns how many pairs each of ``METRICS`` is a mean over, and 1 for ``nonfinite_pairs``, which is a count."""
    pairs = output.logits.new_full((), output.mask.shape[0])
    counted = output.finite_pairs().sum().to(pairs.dtype) if output.skip_nonfinite else pairs
    means = len(METRICS) - 3  # all but the first and the last two
    return torch.cat([pairs[None], counted.expand(means), torch.stack([pairs, torch.ones_like(pairs)])])


def add_metrics(totals: Tensor, values: Tensor, pairs: Tensor | float = 1.0) -> None:
    """Adds a batch's numbers to ``[2, M]``: sums of the finite values times their pairs, and of these pairs."""
    products = values * pairs
    finite = torch.isfinite(products)
    totals += torch.stack([torch.where(finite, products, 0.0), finite * pairs])


def add_totals(totals: Totals, output: PairLossOutput, coef_unit: Tensor | float) -> None:
    """Adds a batch to ``totals``, as a kernel does, for an output that no kernel made."""
    with torch.no_grad():
        if totals.metrics is not None:
            add_metrics(totals.metrics, _metrics(output).float(), _metric_pairs(output).float())
        if totals.levels is not None:
            assert totals.pair_levels is not None  # inputs.py
            pairs = output.mask.shape[0]
            bins = level_bins(totals.pair_levels[:pairs], totals.levels.shape[1], totals.top)
            add_levels(totals.levels, bins, output, coef_unit)
