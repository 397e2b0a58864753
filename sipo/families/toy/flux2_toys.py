"""Toys of FLUX.2: dev, whose network is told the guidance scale, and klein, with classifier-free guidance."""

from __future__ import annotations

from typing import Any

from sipo.families.toy.components import DECODER, TRANSFORMER, WIDTH, qwen_tokenizer

_CHAT = (  # what the pipeline uses of Mistral's template
    "<s>{% for message in messages %}"
    "{% if message.role == 'system' %}[SYSTEM_PROMPT]{{ message.content[0].text }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ message.content[0].text }}[/INST]{% endif %}{% endfor %}"
)


def dev() -> Any:
    """Builds FLUX.2 dev. Its tokenizer is bare: the published one is inside a processor, which needs torchvision."""
    from diffusers import Flux2Pipeline
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    tokenizer = _mistral_tokenizer()
    config = Mistral3Config(
        text_config=_decoder("mistral", 31, tokenizer),
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "head_dim": 16,
            "image_size": 32,
            "patch_size": 4,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
    )
    encoder = Mistral3ForConditionalGeneration(config).eval()
    return Flux2Pipeline(text_encoder=encoder, tokenizer=tokenizer, **_parts(guidance_embeds=True))


def klein() -> Any:
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = qwen_tokenizer()
    encoder = Qwen3ForCausalLM(Qwen3Config(**_decoder("qwen3", 28, tokenizer), tie_word_embeddings=True)).eval()
    return Flux2KleinPipeline(text_encoder=encoder, tokenizer=tokenizer, **_parts(guidance_embeds=False))


def _mistral_tokenizer() -> Any:
    """Makes Mistral's tokenizer with a vocabulary of single bytes, and the tokens and the template of a chat."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    return Qwen2Tokenizer(  # Mistral Small has byte-level BPE too
        vocab={letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))},
        merges=[],
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]"],
        chat_template=_CHAT,
        padding_side="left",
    )


def _decoder(model_type: str, layers: int, tokenizer: Any) -> dict[str, Any]:
    """Returns a decoder's configuration, with one layer more than the deepest whose output the pipeline uses."""
    return DECODER | {
        "model_type": model_type,
        "vocab_size": len(tokenizer),
        "intermediate_size": WIDTH,
        "num_hidden_layers": layers,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _parts(guidance_embeds: bool) -> dict[str, Any]:
    """Makes what dev and klein have in common: VAE, network and scheduler."""
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel

    vae: Any = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32
    )
    # A new batch norm has mean 0 and variance 1, which would leave latents as they are.
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    network = Flux2Transformer2DModel(
        **TRANSFORMER,
        in_channels=4 * 4,
        num_single_layers=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return {"vae": vae.eval(), "transformer": network, "scheduler": scheduler}
