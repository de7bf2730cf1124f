"""Small models of several shapes, made as their libraries make them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
TOKENS = torch.arange(10)[None]


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


def mixtral() -> Any:
    """A random mixture of experts, which transformers fuses when it loads them."""
    torch.manual_seed(3)
    config = transformers.MixtralConfig(**SHAPE, num_key_value_heads=2, num_local_experts=4)
    return transformers.MixtralForCausalLM(config).eval()


def saved(model: Any, directory: Path, **options: Any) -> Path:
    """The model as save_pretrained writes it."""
    model.save_pretrained(directory, **options)
    return directory


def logits(model: Any) -> torch.Tensor:
    """What it says to ten tokens."""
    with torch.no_grad():
        output = model(TOKENS)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state
