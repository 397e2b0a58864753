"""Fused preference losses for diffusion models: one operation from network outputs to gradient.

Needs torch alone (and Triton where there is a GPU). ``sipo`` builds on it; nothing here imports ``sipo``.
"""

from sipo_kernels.options import METHODS, LossOptions
from sipo_kernels.output import METRICS, STATISTICS, PairLossOutput, Totals
from sipo_kernels.pair_loss import pair_loss

__all__ = ["METHODS", "METRICS", "STATISTICS", "LossOptions", "PairLossOutput", "Totals", "pair_loss"]
