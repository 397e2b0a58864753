"""Toys of the families of Stable Diffusion: 1.5, XL and 3."""

from __future__ import annotations

from typing import Any

from sipo.families.toy.components import BETAS, TRANSFORMER, WIDTH, clip, clip_tokenizer, image_vae, t5, t5_tokenizer

_UNET: dict[str, Any] = {"sample_size": 4, "block_out_channels": (16, 32), "norm_num_groups": 8}


def sd15() -> Any:
    from diffusers import PNDMScheduler

    return _stable_diffusion(PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1))


def sd21() -> Any:
    from diffusers import DDIMScheduler

    options: dict[str, Any] = {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}
    scheduler = DDIMScheduler(**BETAS, **options, prediction_type="v_prediction")
    return _stable_diffusion(scheduler, use_linear_projection=True, upcast_attention=True)


def _stable_diffusion(scheduler: Any, **network_options: Any) -> Any:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    tokenizer = clip_tokenizer()
    return StableDiffusionPipeline(
        vae=image_vae(scaling_factor=0.18215),
        text_encoder=clip(tokenizer),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            **_UNET,
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=2,
            **network_options,
        ),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    tokenizer, time_width = clip_tokenizer(), 8
    return StableDiffusionXLPipeline(
        vae=image_vae(scaling_factor=0.13025),
        text_encoder=clip(tokenizer),
        text_encoder_2=clip(tokenizer, pooled=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(
            **_UNET,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            cross_attention_dim=2 * WIDTH,
            attention_head_dim=(2, 4),
            addition_embed_type="text_time",
            addition_time_embed_dim=time_width,
            projection_class_embeddings_input_dim=6 * time_width + WIDTH,
        ),
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def sd3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    short, long = clip_tokenizer(), t5_tokenizer()
    return StableDiffusion3Pipeline(
        vae=image_vae(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(short, pooled=True, width=WIDTH // 2),
        text_encoder_2=clip(short, pooled=True, width=WIDTH // 2),
        text_encoder_3=t5(long),
        tokenizer=short,
        tokenizer_2=short,
        tokenizer_3=long,
        transformer=SD3Transformer2DModel(
            sample_size=4,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            **TRANSFORMER,
            joint_attention_dim=WIDTH,
            caption_projection_dim=32,
            pooled_projection_dim=WIDTH,
            pos_embed_max_size=16,
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
