"""Toys of Qwen-Image and of its editing models, whose text encoder sees the image."""

from __future__ import annotations

from typing import Any

from sipo.families.toy.components import TRANSFORMER, WIDTH, qwen_tokenizer

_PATCH = 8  # side in pixels of a patch of the text encoder's image


def qwen_image() -> Any:
    from diffusers import QwenImagePipeline

    tokenizer = _tokenizer(QwenImagePipeline(None, None, None, None, None))
    return QwenImagePipeline(tokenizer=tokenizer, **_parts(tokenizer))


def qwen_image_edit() -> Any:
    from diffusers import QwenImageEditPipeline

    return _edit(QwenImageEditPipeline)


def qwen_image_edit_plus(zero_cond_t: bool = False) -> Any:
    """Makes the pipeline of 2509, or with ``zero_cond_t`` of 2511."""
    from diffusers import QwenImageEditPlusPipeline

    return _edit(QwenImageEditPlusPipeline, zero_cond_t=zero_cond_t)


def _edit(pipeline_class: Any, **network_options: Any) -> Any:
    from transformers import PaddleOCRVLProcessor, Qwen2VLImageProcessorPil

    tokenizer = _tokenizer(pipeline_class(None, None, None, None, None, None))
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=_PATCH, size={"shortest_edge": 4 * _PATCH**2, "longest_edge": 64 * _PATCH**2}
    )
    # Images and texts are processed as by Qwen2VLProcessor, which cannot be made without torchvision, for its videos.
    processor = PaddleOCRVLProcessor(image_processor, tokenizer)
    return pipeline_class(tokenizer=tokenizer, processor=processor, **_parts(tokenizer, **network_options))


def _tokenizer(pipeline: Any) -> Any:
    """Makes Qwen's tokenizer with the words of the pipeline's template.

    Each of these words is one token, as in the published vocabulary: the pipeline cuts off so many tokens.
    """
    template = [pipeline.prompt_template_encode]
    return qwen_tokenizer().train_new_from_iterator(template, vocab_size=1000, show_progress=False)


def _parts(tokenizer: Any, **network_options: Any) -> dict[str, Any]:
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel

    return {
        "vae": AutoencoderKLQwenImage(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        "text_encoder": _text_encoder(tokenizer),
        "transformer": QwenImageTransformer2DModel(
            **TRANSFORMER, joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6), **network_options
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02
        ),
    }


def _text_encoder(tokenizer: Any) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    special = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "depth": 2,
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_heads": 2,
            "patch_size": _PATCH,
            "window_size": 4 * _PATCH,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [1],
        },
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{piece}|>") for name, piece in special.items()},
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()
