"""Toy of Z-Image."""

from __future__ import annotations

from typing import Any

from sipo.families.toy.components import WIDTH, flux_vae, qwen3, qwen_tokenizer


def z_image() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    tokenizer = qwen_tokenizer()
    transformer: Any = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 64, 64],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        token.data.normal_()  # zero at first; trained ones are not
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=flux_vae(),
        text_encoder=qwen3(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer,
    )
