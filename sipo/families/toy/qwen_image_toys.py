"""Toys of Qwen-Image, of its editing models, whose text encoder sees the image, and of Qwen-Image 2.1."""

from __future__ import annotations

from typing import Any

from sipo.families.toy.components import DECODER, TRANSFORMER, WIDTH, qwen_tokenizer

_PATCH, _PATCH_21 = 8, 16  # side in pixels of a patch of the text encoder's image; 2.1's as published
_CHAT = (  # of 2.1: the content of a message is a list of texts
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
)


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


def qwen_image_21() -> Any:
    """Makes Qwen-Image 2.1, whose processor makes its prompts and whose VAE has a channel of opacity."""
    from diffusers import AutoencoderKLQwenImage21, QwenImage21Pipeline, QwenImage21Transformer2DModel
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tokenizer = qwen_tokenizer()
    transformer: Any = QwenImage21Transformer2DModel(**TRANSFORMER, context_in_dim=WIDTH, axes_dims_rope=(4, 6, 6))
    # As diffusers makes them, the gates are nearly shut, and a few steps of training would not change a sample.
    transformer.modulation[1].weight.data *= 20
    vision = {"patch_size": _PATCH_21, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return QwenImage21Pipeline(
        vae=AutoencoderKLQwenImage21(base_dim=4, decoder_base_dim=4, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1),
        text_encoder=_text_encoder(Qwen3VLConfig, Qwen3VLForConditionalGeneration, tokenizer, vision),
        processor=_processor(tokenizer, _PATCH_21, chat_template=_CHAT),
        transformer=transformer,
        scheduler=_scheduler(),
    )


def _edit(pipeline_class: Any, **network_options: Any) -> Any:
    tokenizer = _tokenizer(pipeline_class(None, None, None, None, None, None))
    parts = {"processor": _processor(tokenizer, _PATCH), **_parts(tokenizer, **network_options)}
    return pipeline_class(tokenizer=tokenizer, **parts)


def _tokenizer(pipeline: Any) -> Any:
    """Makes Qwen's tokenizer with the words of the pipeline's template.

    Each of these words is one token, as in the published vocabulary: the pipeline cuts off so many tokens.
    """
    template = [pipeline.prompt_template_encode]
    return qwen_tokenizer().train_new_from_iterator(template, vocab_size=1000, show_progress=False)


def _processor(tokenizer: Any, patch: int, **options: Any) -> Any:
    """Makes a processor that works as Qwen's own, which cannot be made without torchvision, for their videos."""
    from transformers import PaddleOCRVLProcessor, Qwen2VLImageProcessorPil

    size = {"shortest_edge": 4 * patch**2, "longest_edge": 64 * patch**2}
    return PaddleOCRVLProcessor(Qwen2VLImageProcessorPil(patch_size=patch, size=size), tokenizer, **options)


def _parts(tokenizer: Any, **network_options: Any) -> dict[str, Any]:
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {"patch_size": _PATCH, "window_size": 4 * _PATCH, "fullatt_block_indexes": [1]}
    return {
        "vae": AutoencoderKLQwenImage(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        "text_encoder": _text_encoder(Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, tokenizer, vision),
        "transformer": QwenImageTransformer2DModel(
            **TRANSFORMER, joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6), **network_options
        ),
        "scheduler": _scheduler(),
    }


def _scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02
    )


def _text_encoder(config_class: Any, model_class: Any, tokenizer: Any, vision: dict[str, Any]) -> Any:
    special = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    text = {
        "vocab_size": len(tokenizer),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    size = {"depth": 2, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_heads": 2, "out_hidden_size": WIDTH}
    config = config_class(
        text_config=DECODER | text,
        vision_config=size | vision,
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{piece}|>") for name, piece in special.items()},
    )
    return model_class(config).eval()
