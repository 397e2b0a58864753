"""Parts of toy pipelines: tokenizers made locally, small text encoders and a small image VAE."""

from __future__ import annotations

from typing import Any

WIDTH = 32
"""Width of every text encoder."""

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TRANSFORMER: dict[str, Any] = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}

DECODER: dict[str, Any] = {  # a text encoder that was a language model
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
_CHAT = (  # as published: without thinking, the answer begins with an empty thought
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"()-/"


def image_vae(**options: Any) -> Any:
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


def flux_vae() -> Any:
    """Makes FLUX.1's VAE, which Chroma, Lumina 2 and Z-Image have too."""
    return image_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)


def gemma_tokenizer() -> Any:
    """Makes Gemma 2's tokenizer with a vocabulary of single letters and of bytes for all other characters."""
    from transformers import GemmaTokenizer

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += sorted({*_LETTERS, *_LETTERS.upper()})
    return GemmaTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, add_bos_token=True)


def gemma(tokenizer: Any) -> Any:
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=len(tokenizer),
        **DECODER,
        query_pre_attn_scalar=16,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Gemma2Model(config).eval()


def qwen_tokenizer() -> Any:
    """Makes Qwen's tokenizer with a vocabulary of single bytes, and the tokens and the template of a chat."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    chat = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    letters = sorted(ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(
        vocab={piece: number for number, piece in enumerate([*letters, "<|endoftext|>", *chat])},
        merges=[],
        extra_special_tokens=chat,
        image_token="<|image_pad|>",  # for a processor
    )
    tokenizer.chat_template = _CHAT
    return tokenizer


def qwen3(tokenizer: Any) -> Any:
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), **DECODER)).eval()


def clip_tokenizer() -> Any:
    """Makes CLIP's tokenizer with a vocabulary of single bytes and a few merges."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    merges: Any = [("t", "h"), ("i", "n"), ("th", "e</w>")]  # transformers declares strings, but takes pairs
    pieces = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def clip(tokenizer: Any, *, pooled: bool = False, width: int = WIDTH) -> Any:
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


def t5_tokenizer() -> Any:
    """Makes T5's tokenizer with a vocabulary of single letters."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in _LETTERS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def t5(tokenizer: Any, *, multilingual: bool = False) -> Any:
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    classes: tuple[Any, Any] = (UMT5Config, UMT5EncoderModel) if multilingual else (T5Config, T5EncoderModel)
    config_class, model_class = classes
    config = config_class(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=WIDTH // 2,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model_class(config).eval()
