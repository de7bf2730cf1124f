"""A model on Modal, from a Volume to the GPU: `modal run examples/modal_app.py::fetch`, then `modal deploy` it.

Written after Modal's documentation; it needs an account there, and weightctl's checkout, from which it is installed.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import modal

MODEL = "Qwen/Qwen3-0.6B"
DIRECTORY = f"/models/{MODEL}"
CHECKOUT = Path(__file__).resolve().parent.parent

app = modal.App("weightctl-example")
volume = modal.Volume.from_name("weightctl-models", create_if_missing=True)
image = (
    modal.Image.debian_slim(python_version="3.12")
    .add_local_dir(CHECKOUT, "/weightctl", copy=True, ignore=[".git", "**/__pycache__"])
    .run_commands("pip install '/weightctl[transformers]'")
)


@app.function(image=image, volumes={"/models": volume}, timeout=3600)
def fetch() -> None:
    """Once: the model onto the Volume, every byte checked. Containers that start after the commit see it."""
    subprocess.run(["weightctl", "pull", MODEL, "--to", DIRECTORY], check=True)
    volume.commit()


@app.cls(image=image, volumes={"/models": volume}, gpu="H100")
class Model:
    """One container's."""

    @modal.enter()
    def load(self) -> None:
        """When the container starts, before its first request."""
        import transformers

        import weightctl

        self.tokenizer = transformers.AutoTokenizer.from_pretrained(DIRECTORY)
        self.model: Any = weightctl.load_model(DIRECTORY, "cuda")

    @modal.method()
    def answer(self, prompt: str) -> str:
        """What the model says."""
        tokens = self.tokenizer(prompt, return_tensors="pt").to("cuda")
        return str(self.tokenizer.decode(self.model.generate(**tokens, max_new_tokens=64)[0]))


@app.local_entrypoint()
def main(prompt: str = "The quickest way to the station is") -> None:
    """`modal run examples/modal_app.py`"""
    print(Model().answer.remote(prompt))
