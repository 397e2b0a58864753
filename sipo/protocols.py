"""What training needs of a schedule, a loss, a data set and a network; each is small enough to write by hand."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Schedule(Protocol):
    """A noise schedule; :class:`sipo.NoiseSchedule` is one. ``B`` samples of any shape, one timestep each.

    One that has an attribute ``kind`` of ``"flow"`` gets what it draws as ``sigmas=`` in place of ``timesteps``, and so
    does its loss.
    """

    @property
    def prediction_type(self) -> str:
        """What the network predicts; "epsilon" lets both samples of a pair share one target."""

    def add_noise(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``sample`` at the noise level of ``timesteps``."""

    def target(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network should predict. For "epsilon" that is ``noise``, whatever ``sample`` holds."""

    def sample_timesteps(
        self,
        n: int,
        generator: torch.Generator | None = None,
        *,
        distribution: str = "uniform",
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draws ``n`` noise levels: timesteps, or σ in (0, 1] where the schedule's ``kind`` is "flow"."""


class PairLossResult(Protocol):
    """What a loss returns; :class:`sipo_kernels.PairLossOutput` is one."""

    @property
    def loss(self) -> Tensor:
        """Scalar, differentiable in the policy's prediction."""

    def metrics(self) -> dict[str, Tensor]:
        """0-d tensors on the device, under the names of docs/math.md §8."""


class PairLoss(Protocol):
    """A loss over stacked pairs; :class:`sipo.SIPOLoss` is one."""

    @property
    def schedule(self) -> Schedule:
        """The noise schedule that the loss was made for, and that the loop trains with."""

    def __call__(self, model_pred: Tensor, ref_pred: Tensor, target: Tensor, timesteps: Tensor) -> PairLossResult:
        """Loss of ``[chosen; rejected]`` stacked along dimension 0.

        The loop passes the noise levels by name: ``timesteps``, or ``sigmas`` where the schedule's ``kind`` is "flow".
        ``target`` is ``[B, ...]`` where the schedule predicts "epsilon", which both samples share.
        Where items carry ``"ref_error"``, ``ref_pred`` is ``None`` and a keyword ``ref_error`` has them, ``[2B]``. A
        loss that has a keyword ``totals`` gets :class:`sipo_kernels.Totals` and adds its metrics and, where they are
        given, its sums by noise level to them; for others the loop does it from what they return.
        """


class PairDataset(Protocol):
    """A map-style data set of pairs.

    An item is ``{"chosen": tensor, "rejected": tensor}`` and, where the network is conditioned,
    ``"condition": tensor or dictionary of tensors``, one for both samples. Items are stacked as torch's
    ``default_collate`` does. Latents of half precision are cast to float32 on the device; a condition reaches
    :class:`Predict` in its own type. Further keys, each optional and the same in every item of a data set:

    - ``"own_condition"``: dictionary of tensors ``[2, ...]``, what differs between the samples, chosen first (SDXL's
      time ids).
    - ``"noise"`` (shaped as ``"chosen"``, float32) and ``"timestep"`` (0-d; σ in (0, 1] for a flow), which come
      together: this item's fixed draw, in place of one from the run's stream.
    - ``"ref_error"``: ``[2]`` float64 with such a draw: the reference's errors there, chosen first; no reference
      network runs.

    Two attributes are optional as well: ``groups``, lists of indices that cover the data set, where not all items have
    one shape (a batch then holds items of one group); and ``unconditional``, a condition as in an item's, which caption
    dropout puts in place of an item's own.
    """

    def __len__(self) -> int:
        """Number of pairs."""

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        """One pair."""


class Predict(Protocol):
    """Adapts a network to the loop: calls ``module(...)`` and returns its prediction as a tensor.

    It is called with the policy and with the reference. It must go through ``module``'s own call and not its
    ``forward``, so that hooks, autocast and gradient reduction between processes take part.
    """

    def __call__(self, module: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
        """Prediction for ``noisy`` ``[2B, ...]`` at ``timesteps`` ``[2B]``, ``condition`` stacked likewise.

        ``noisy`` is float32 (float64 where the latents are), whatever type the network computes in. For a flow,
        ``timesteps`` are σ in (0, 1]; a diffusers network takes 1,000 times that.
        """
