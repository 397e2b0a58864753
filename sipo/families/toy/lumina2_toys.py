"""Toy of Lumina Image 2.0."""

from __future__ import annotations

from typing import Any

from sipo.families.toy.components import WIDTH, flux_vae, gemma, gemma_tokenizer


def lumina2() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    tokenizer = gemma_tokenizer()
    return Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel(
            sample_size=4,
            in_channels=4,
            hidden_size=48,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(8, 8, 8),
            axes_lens=(300, 64, 64),
            cap_feat_dim=WIDTH,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=flux_vae(),
        text_encoder=gemma(tokenizer),
        tokenizer=tokenizer,
    )
