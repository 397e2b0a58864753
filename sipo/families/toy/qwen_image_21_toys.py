"""The toy of Qwen-Image 2.1, whose processor makes its prompts and whose VAE has a channel of opacity."""

from __future__ import annotations

from typing import Any

from sipo.families.toy.components import DECODER, TRANSFORMER, WIDTH, qwen_tokenizer

_PATCH = 16  # side in pixels of a patch of the text encoder's image, as published
_CHAT = (  # the content of a message is a list of texts
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
)


def qwen_image_21() -> Any:
    from diffusers import (
        AutoencoderKLQwenImage21,
        FlowMatchEulerDiscreteScheduler,
        QwenImage21Pipeline,
        QwenImage21Transformer2DModel,
    )
    from transformers import PaddleOCRVLProcessor, Qwen2VLImageProcessorPil

    tokenizer = qwen_tokenizer()
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=_PATCH, size={"shortest_edge": 4 * _PATCH**2, "longest_edge": 64 * _PATCH**2}
    )
    transformer: Any = QwenImage21Transformer2DModel(**TRANSFORMER, context_in_dim=WIDTH, axes_dims_rope=(4, 6, 6))
    # As diffusers makes them, the gates are nearly shut, and a few steps of training would not change a sample.
    transformer.modulation[1].weight.data *= 20
    return QwenImage21Pipeline(
        vae=AutoencoderKLQwenImage21(base_dim=4, decoder_base_dim=4, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1),
        text_encoder=_text_encoder(tokenizer),
        # Qwen3VLProcessor cannot be made without torchvision, for its videos.
        processor=PaddleOCRVLProcessor(image_processor, tokenizer, chat_template=_CHAT),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02
        ),
    )


def _text_encoder(tokenizer: Any) -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    special = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    config = Qwen3VLConfig(
        text_config=DECODER
        | {
            "vocab_size": len(tokenizer),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_heads": 2,
            "patch_size": _PATCH,
            "out_hidden_size": WIDTH,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{piece}|>") for name, piece in special.items()},
    )
    return Qwen3VLForConditionalGeneration(config).eval()
