"""Small models of several shapes, made as their libraries make them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
TOKENS = torch.arange(10)[None]
PIXELS = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)


def llama(**changes: Any) -> Any:
    """A random Llama. Its tied lm_head is left out when it is saved."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**{**SHAPE, "num_key_value_heads": 2, "tie_word_embeddings": True, **changes})
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> Any:
    """A random GPT-2: saved under `transformer.`, with tied embeddings."""
    torch.manual_seed(2)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


def mixtral(**changes: Any) -> Any:
    """A random mixture of experts, which transformers fuses when it loads them."""
    torch.manual_seed(3)
    config = transformers.MixtralConfig(**{**SHAPE, "num_key_value_heads": 2, "num_local_experts": 4, **changes})
    return transformers.MixtralForCausalLM(config).eval()


def qwen_moe() -> Any:
    """A random Qwen with experts in one of its two layers."""
    torch.manual_seed(4)
    config = transformers.Qwen3MoeConfig(
        **SHAPE, num_key_value_heads=2, head_dim=8, mlp_only_layers=[0],
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config).eval()


def t5() -> Any:
    """A random T5: encoder and decoder, three names for one embedding, and layers that stay float32 in float16."""
    torch.manual_seed(5)
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=96, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def bert() -> Any:
    """A random BERT for classification, with position_ids that no file holds."""
    torch.manual_seed(6)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SHAPE, num_labels=3)).eval()


def vit() -> Any:
    """A random ViT."""
    torch.manual_seed(7)
    shape = {name: value for name, value in SHAPE.items() if name != "vocab_size"}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**shape, image_size=32, patch_size=8)).eval()


def saved(model: Any, directory: Path, **options: Any) -> Path:
    """The model as save_pretrained writes it."""
    model.save_pretrained(directory, **options)
    return directory


def logits(model: Any) -> torch.Tensor:
    """What it says to ten tokens, or to one picture."""
    tokens = TOKENS.to(model.device)
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": PIXELS.to(model.device, model.dtype)}
    elif model.config.is_encoder_decoder:
        inputs = {"input_ids": tokens, "decoder_input_ids": tokens}
    else:
        inputs = {"input_ids": tokens}
    with torch.no_grad():
        output = model(**inputs)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state
