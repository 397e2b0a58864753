"""Protocols of a schedule, a loss, a data set and a network for training; each is small enough to write by hand."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Schedule(Protocol):
    """A noise schedule; :class:`sipo.NoiseSchedule` is one. ``B`` samples of any shape, one noise level each.

    A noise level is a timestep index or, for a schedule with an attribute ``kind`` of ``"flow"``, σ in (0, 1]. Such a
    schedule and its loss get noise levels as ``sigmas=`` in place of ``timesteps``. It also has
    ``num_train_timesteps``: its network is given ``σ * num_train_timesteps`` (see :class:`Predict`).
    """

    @property
    def prediction_type(self) -> str:
        """What the network predicts; "epsilon" lets both samples of a pair share one target."""

    def add_noise(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Returns ``sample`` at the noise level of ``timesteps``."""

    def target(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Returns what the network should predict. For "epsilon" that is ``noise``, whatever ``sample`` holds."""

    def sample_levels(
        self,
        n: int,
        generator: torch.Generator | None = None,
        *,
        distribution: str = "uniform",
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draws ``n`` noise levels, ``[n]``."""


class PairLossResult(Protocol):
    """What a loss returns; :class:`sipo_kernels.PairLossOutput` is one."""

    @property
    def loss(self) -> Tensor:
        """Scalar, differentiable in the policy's prediction."""

    def metrics(self) -> dict[str, Tensor]:
        """Returns 0-d tensors on the device, under the names of docs/math.md §8."""


class PairLoss(Protocol):
    """A loss over stacked pairs; :class:`sipo.SIPOLoss` is one."""

    @property
    def schedule(self) -> Schedule:
        """The noise schedule that the loss was made for, and that the loop trains with."""

    def __call__(self, model_pred: Tensor, ref_pred: Tensor, target: Tensor, timesteps: Tensor) -> PairLossResult:
        """Computes the loss of ``[chosen; rejected]`` stacked along dimension 0.

        Args:
            model_pred: the policy's prediction, ``[2B, ...]``.
            ref_pred: the reference's, shaped likewise; ``None`` where items carry ``"ref_error"``. The loss then gets
                these errors as a keyword ``ref_error``, ``[2B]`` float64.
            target: ``[2B, ...]``, or ``[B, ...]`` shared by both samples of a pair where the schedule's
                ``prediction_type`` is "epsilon".
            timesteps: ``[2B]``, passed by name. The loss of a schedule whose ``kind`` is "flow" is called with
                ``sigmas=``, σ in (0, 1], in place of it.

        Where items carry ``"error_mask"``, the loss gets it as a keyword ``error_mask``, ``[B, ...]``.
        A loss that has a keyword ``totals`` gets :class:`sipo_kernels.Totals` and adds its metrics and, where they are
        given, its sums by noise level to them; for others the loop does it from what they return.
        """


class PairDataset(Protocol):
    """A map-style data set of pairs.

    An item is ``{"chosen": tensor, "rejected": tensor}`` and, where the network is conditioned,
    ``"condition": tensor or dictionary of tensors``, one for both samples. Items are stacked as torch's
    ``default_collate`` does. Tensors of a condition whose length differs between items come with a mask, and are padded
    (:func:`sipo.batch.is_ragged`). Latents of half precision are cast to float32 on the device; a condition reaches
    :class:`Predict` in its own type. Further keys, each optional and the same in every item of a group (see below):

    - ``"own_condition"``: dictionary of tensors ``[2, ...]``, what differs between the samples, chosen first (SDXL's
      time ids).
    - ``"noise"`` (shaped as ``"chosen"``, float32) and ``"level"`` (0-d: a timestep index, or σ in (0, 1] of a
      flow), which come together: this item's fixed draw, in place of one from the run's stream.
    - ``"ref_error"``: ``[2]`` float64 with such a draw: the reference's errors there, chosen first; no reference
      network runs.
    - ``"error_mask"``: bool, or weights ≥ 0 of a floating-point type: which elements count in the errors of both
      samples (docs/math.md §2). It has the dimensions of ``"chosen"``, with 1 in place of any.

    Two attributes are optional as well: ``groups``, lists of indices that cover the data set, where not all items have
    one shape (a batch then holds items of one group); and ``unconditional``, a condition as in an item's, which caption
    dropout puts in place of an item's own.
    """

    def __len__(self) -> int:
        """Returns the number of pairs."""

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        """Returns one pair."""


class Predict(Protocol):
    """Adapts a network to the loop: calls ``module(...)`` and returns its prediction as a tensor.

    It is called with the policy and with the reference. It must go through ``module``'s own call and not its
    ``forward``, so that hooks, autocast and gradient reduction between processes take part.
    """

    def __call__(self, module: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
        """Predicts for ``noisy`` ``[2B, ...]`` at ``timesteps`` ``[2B]``, ``condition`` stacked likewise.

        ``noisy`` is float32 (float64 where the latents are), whatever type the network computes in. ``timesteps`` are
        what diffusers' networks take: indices, or for a flow ``σ * num_train_timesteps`` as floats, 0 to 1000 for most
        (:func:`sipo.batch.network_timesteps`).
        """
