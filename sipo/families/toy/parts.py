"""Parts of toy pipelines: tokenizers made locally, small text encoders and a small image VAE."""

from __future__ import annotations

from typing import Any

WIDTH = 32
"""Width of every text encoder."""

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TRANSFORMER: dict[str, Any] = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}

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
