"""A model on Cerebrium: loaded when the container starts, from its persistent storage. `cerebrium deploy` here.

Put the model there first: weightctl pull Qwen/Qwen3-0.6B --to model; cerebrium cp model model. And put weightctl where
pip finds it: the name in cerebrium.toml is looked up on its index.
"""

from __future__ import annotations

from typing import Any

import transformers

import weightctl

DIRECTORY = "/persistent-storage/model"

tokenizer = transformers.AutoTokenizer.from_pretrained(DIRECTORY)
model: Any = weightctl.load_model(DIRECTORY, "cuda")


def run(prompt: str) -> dict[str, str]:
    """What a POST to /run answers."""
    tokens = tokenizer(prompt, return_tensors="pt").to("cuda")
    return {"answer": tokenizer.decode(model.generate(**tokens, max_new_tokens=64)[0])}
