"""Toys of FLUX.1 (dev, schnell and Kontext) and of Chroma."""

from __future__ import annotations

from typing import Any

from sipo.families.toy.components import TRANSFORMER, WIDTH, clip, clip_tokenizer, flux_vae, t5, t5_tokenizer

_NETWORK: dict[str, Any] = {
    **TRANSFORMER,
    "in_channels": 16,
    "num_single_layers": 2,
    "joint_attention_dim": WIDTH,
    "axes_dims_rope": (4, 6, 6),
}


def _flux(pipeline_class: Any, *, distilled: bool) -> Any:
    """Makes a pipeline of FLUX.1; ``distilled`` as schnell is, without guidance and without a dynamic shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    short, long = clip_tokenizer(), t5_tokenizer()
    return pipeline_class(
        vae=flux_vae(),
        text_encoder=clip(short),
        text_encoder_2=t5(long),
        tokenizer=short,
        tokenizer_2=long,
        transformer=FluxTransformer2DModel(**_NETWORK, pooled_projection_dim=WIDTH, guidance_embeds=not distilled),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0 if distilled else 3.0, use_dynamic_shifting=not distilled),
    )


def dev() -> Any:
    from diffusers import FluxPipeline

    return _flux(FluxPipeline, distilled=False)


def schnell() -> Any:
    from diffusers import FluxPipeline

    return _flux(FluxPipeline, distilled=True)


def kontext() -> Any:
    from diffusers import FluxKontextPipeline

    return _flux(FluxKontextPipeline, distilled=False)


def chroma() -> Any:
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    tokenizer = t5_tokenizer()
    return ChromaPipeline(
        vae=flux_vae(),
        text_encoder=t5(tokenizer),
        tokenizer=tokenizer,
        transformer=ChromaTransformer2DModel(
            **_NETWORK, approximator_num_channels=16, approximator_hidden_dim=32, approximator_layers=2
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )
