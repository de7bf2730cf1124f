"""A Diffusers model, filled by weightctl: python examples/diffusers_model.py (pip install diffusers).

It makes a tiny autoencoder of its own; a real one is the directory `vae` or `unet` of a pipeline.
"""

from __future__ import annotations

import tempfile

import torch
from diffusers import AutoencoderKL

import weightctl


def load(directory: str, device: str = "auto") -> AutoencoderKL:
    """The model that the directory's config.json describes, made without memory and filled in place."""
    with torch.device("meta"):
        model = AutoencoderKL.from_config(AutoencoderKL.load_config(directory))
    weightctl.load_into(model, directory, device)
    return model.eval()


def main() -> None:
    """Save one, load it, and see that it draws the same."""
    made = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, layers_per_block=1).eval()
    with tempfile.TemporaryDirectory() as directory:
        made.save_pretrained(directory)
        loaded = load(directory)
    noise = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        right = made.decode(noise).sample
        found = loaded.decode(noise.to(loaded.device)).sample
    torch.testing.assert_close(found.cpu(), right, rtol=1e-3, atol=1e-4)
    print(f"{loaded.num_parameters():,} parameters on {loaded.device}, and the same picture")


if __name__ == "__main__":
    main()
