"""Preference optimisation for diffusion models: Diffusion-DPO, DPO-C&M, SIPO and SDPO.

The loss (:class:`SIPOLoss`), the noise schedule behind it (:class:`NoiseSchedule`) and β's conventions
(:func:`convert_beta`). The formulas are those of docs/math.md; ``sipo.reference`` has them in float64.
"""

from sipo.loss import SIPOLoss, convert_beta
from sipo.schedule import NoiseSchedule
from sipo_kernels import PairLossOutput, reference

__version__ = "0.1.0"

__all__ = ["NoiseSchedule", "PairLossOutput", "SIPOLoss", "__version__", "convert_beta", "reference"]
