"""Toys of the video families: CogVideoX 2B and 5B, and Wan 2.1."""

from __future__ import annotations

from typing import Any

from sipo.families.toy.components import BETAS, TRANSFORMER, WIDTH, t5, t5_tokenizer


def cogvideox(rotary: bool = True) -> Any:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXDPMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    tokenizer = t5_tokenizer()
    scheduler_class = CogVideoXDPMScheduler if rotary else CogVideoXDDIMScheduler
    return CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=t5(tokenizer),
        vae=AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            scaling_factor=0.7 if rotary else 1.15258426,
        ),
        transformer=CogVideoXTransformer3DModel(
            **TRANSFORMER,
            in_channels=4,
            out_channels=4,
            time_embed_dim=16,
            text_embed_dim=WIDTH,
            sample_width=12,
            sample_height=6,
            sample_frames=9,
            use_rotary_positional_embeddings=rotary,
        ),
        scheduler=scheduler_class(
            **BETAS,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            set_alpha_to_one=True,
            snr_shift_scale=1.0 if rotary else 3.0,
            timestep_spacing="trailing",
        ),
    )


def wan(experts: bool = False) -> Any:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    def network() -> Any:
        return WanTransformer3DModel(**TRANSFORMER, text_dim=WIDTH, freq_dim=32, ffn_dim=64, rope_max_seq_len=64)

    tokenizer = t5_tokenizer()
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=t5(tokenizer, multilingual=True),
        vae=AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        transformer=network(),
        transformer_2=network() if experts else None,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        boundary_ratio=0.875 if experts else None,
    )
