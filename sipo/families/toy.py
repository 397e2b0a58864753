"""Builds small pipelines of every family with random weights, from the real classes.

For tests and examples: nothing is downloaded, a network's forward takes milliseconds, and an image of 32x32 pixels has
4x4 latents. Text encoders, VAE and network have the same parts, scaling and schedules as the full-size ones.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sipo.files import aside

_WIDTH = 32  # width of every text encoder
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"()-/"
_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_UNET: dict[str, Any] = {"sample_size": 4, "block_out_channels": (16, 32), "norm_num_groups": 8}
_TRANSFORMER: dict[str, Any] = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}


def build_toy(name: str, folder: str | Path, seed: int = 0) -> Path:
    """Writes a family's toy pipeline with random weights, in diffusers' layout.

    Args:
        name: a family's name, or "cogvideox-2b", which has no rotary embeddings, while "cogvideox" is like the 5B.
        folder: output folder; replaced if it exists.
        seed: seed of the weights. The same name and seed give the same bytes; torch's generators are not changed.

    Returns:
        ``folder``.

    Raises:
        ValueError: the name is not known.
    """
    if name not in _TOYS:
        raise ValueError(f"toy={name!r}: expected one of {', '.join(_TOYS)}")
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = _TOYS[name]()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with aside(folder) as place:
        pipeline.save_pretrained(place, safe_serialization=True)
    return folder


def _sd15() -> Any:
    from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    tokenizer = _clip_tokenizer()
    return StableDiffusionPipeline(
        vae=_image_vae(scaling_factor=0.18215),
        text_encoder=_clip(tokenizer),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            **_UNET,
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=_WIDTH,
            attention_head_dim=2,
        ),
        scheduler=PNDMScheduler(**_BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    tokenizer, time_width = _clip_tokenizer(), 8
    return StableDiffusionXLPipeline(
        vae=_image_vae(scaling_factor=0.13025),
        text_encoder=_clip(tokenizer),
        text_encoder_2=_clip(tokenizer, pooled=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(
            **_UNET,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            cross_attention_dim=2 * _WIDTH,
            attention_head_dim=(2, 4),
            addition_embed_type="text_time",
            addition_time_embed_dim=time_width,
            projection_class_embeddings_input_dim=6 * time_width + _WIDTH,
        ),
        scheduler=EulerDiscreteScheduler(**_BETAS, timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def _sd3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    clip, t5 = _clip_tokenizer(), _t5_tokenizer()
    return StableDiffusion3Pipeline(
        vae=_image_vae(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(clip, pooled=True, width=_WIDTH // 2),
        text_encoder_2=_clip(clip, pooled=True, width=_WIDTH // 2),
        text_encoder_3=_t5(t5),
        tokenizer=clip,
        tokenizer_2=clip,
        tokenizer_3=t5,
        transformer=SD3Transformer2DModel(
            sample_size=4,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            **_TRANSFORMER,
            joint_attention_dim=_WIDTH,
            caption_projection_dim=32,
            pooled_projection_dim=_WIDTH,
            pos_embed_max_size=16,
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _cogvideox(rotary: bool = True) -> Any:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXDPMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    tokenizer = _t5_tokenizer()
    scheduler_class = CogVideoXDPMScheduler if rotary else CogVideoXDDIMScheduler
    return CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=_t5(tokenizer),
        vae=AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            scaling_factor=0.7 if rotary else 1.15258426,
        ),
        transformer=CogVideoXTransformer3DModel(
            **_TRANSFORMER,
            in_channels=4,
            out_channels=4,
            time_embed_dim=16,
            text_embed_dim=_WIDTH,
            sample_width=12,
            sample_height=6,
            sample_frames=9,
            use_rotary_positional_embeddings=rotary,
        ),
        scheduler=scheduler_class(
            **_BETAS,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            set_alpha_to_one=True,
            snr_shift_scale=1.0 if rotary else 3.0,
            timestep_spacing="trailing",
        ),
    )


def _wan() -> Any:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    tokenizer = _t5_tokenizer()
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=_t5(tokenizer, multilingual=True),
        vae=AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        transformer=WanTransformer3DModel(
            **_TRANSFORMER, text_dim=_WIDTH, freq_dim=32, ffn_dim=64, rope_max_seq_len=64
        ),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


_TOYS: dict[str, Callable[[], Any]] = {
    "sd15": _sd15,
    "sdxl": _sdxl,
    "sd3": _sd3,
    "cogvideox": _cogvideox,
    "cogvideox-2b": lambda: _cogvideox(rotary=False),
    "wan": _wan,
}


def _image_vae(**options: Any) -> Any:
    from diffusers import AutoencoderKL

    blocks = 4
    return AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        norm_num_groups=4,
        sample_size=32,
        **options,
    )


def _clip_tokenizer() -> Any:
    """Makes CLIP's tokenizer with a vocabulary of single bytes and a few merges."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    merges: Any = [("t", "h"), ("i", "n"), ("th", "e</w>")]  # transformers declares strings, but takes pairs
    pieces = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def _clip(tokenizer: Any, *, pooled: bool = False, width: int = _WIDTH) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if pooled else CLIPTextModel)(config).eval()


def _t5_tokenizer() -> Any:
    """Makes T5's tokenizer with a vocabulary of single letters."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in _LETTERS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def _t5(tokenizer: Any, *, multilingual: bool = False) -> Any:
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    classes: tuple[Any, Any] = (UMT5Config, UMT5EncoderModel) if multilingual else (T5Config, T5EncoderModel)
    config_class, model_class = classes
    config = config_class(
        vocab_size=len(tokenizer),
        d_model=_WIDTH,
        d_kv=_WIDTH // 2,
        d_ff=2 * _WIDTH,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model_class(config).eval()
