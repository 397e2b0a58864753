"""Settings of the network that is trained: the sections ``model`` and ``model.lora`` of a configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sipo.fields import AtLeast1, Positive, Share, check_fields

Dtype = Literal["float32", "bfloat16", "float16"]
"""Names of the types that weights and latents are held in."""


@dataclass(frozen=True)
class LoraConfig:
    """LoRA through peft.

    Attributes:
        rank: of each adapter.
        alpha: scale is alpha / rank; ``None`` is rank, a scale of 1.
        dropout: of the adapters' input.
        target_modules: names of modules to adapt; ``None`` takes the family's.
    """

    rank: AtLeast1 = 16
    alpha: Positive | None = None
    dropout: Share = 0.0
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class ModelConfig:
    """The network that is trained, and its reference.

    Attributes:
        family: see ``sipo.families.FAMILIES``.
        pretrained_model_name_or_path: a local folder or a hub id with a whole diffusers pipeline; "toy" for a small
            random one.
        revision: of a hub id.
        variant: of the weight files ("fp16").
        dtype: of frozen weights: text encoders, and with LoRA the network below the adapters. Weights that are trained
            are float32; the VAE has ``data.vae_dtype``.
        tuning: "lora" or "full".
        lora: with ``tuning: lora``.
        reference: where the reference's errors come from. "adapter_off": the same network without its adapters (LoRA);
            "copy": a frozen copy; "errors": computed beforehand (``data.draws``), no network. "auto" takes "errors"
            where ``data.reference_errors`` is set, else what fits ``tuning``.
        reference_dtype: of the reference's weights; ``None`` is the policy's: ``dtype`` with LoRA, and with full tuning
            what ``training.mixed_precision`` rounds them to.
        reference_offload: keep a frozen copy in host memory while it is not running.
        gradient_checkpointing: trade time for memory in the policy's backward pass.
        prediction_type: what the network was trained to predict; overrides the scheduler, for samples too.
        shift: of a flow's noise levels, ``k`` of docs/math.md §3; overrides the scheduler's own, dynamic or not, and
            grids of Karras, exponential and beta sigmas, for samples too.
        guidance_scale: what a network with a guidance embedding (FLUX.1 dev, FLUX.2 dev) is told in training; ``None``
            is the family's guidance scale for samples.
    """

    family: str
    pretrained_model_name_or_path: str
    revision: str | None = None
    variant: str | None = None
    dtype: Dtype = "float32"
    tuning: Literal["lora", "full"] = "lora"
    lora: LoraConfig = field(default_factory=LoraConfig)
    reference: Literal["auto", "adapter_off", "copy", "errors"] = "auto"
    reference_dtype: Dtype | None = None
    reference_offload: bool = False
    gradient_checkpointing: bool = False
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow_prediction"] | None = None
    shift: Positive | None = None
    guidance_scale: Positive | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.reference == "adapter_off" and self.tuning != "lora":
            raise ValueError("reference='adapter_off': expected model.tuning='lora', which has adapters")

    @property
    def hub_options(self) -> dict[str, str]:
        """Options of every ``from_pretrained``."""
        return {key: value for key in ("revision", "variant") if (value := getattr(self, key)) is not None}
