"""Every strategy on a large random Llama on a GPU: the bench table, its JSON, and whether load_model thinks right.

python tests/benchmarks/load_on_gpu.py --directory /tmp/llama --gib 8
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

SHARD_BYTES = 2 << 30
STRATEGIES = ("safetensors", "pipelined", "torch", "tensorizer")


def write_llama(directory: Path, nbytes: int) -> None:
    """About `nbytes` of random bf16 weights in shards with an index, as save_pretrained lays them out."""
    large = nbytes >= 1 << 30
    hidden, inner, heads, vocabulary = (4096, 14336, 32, 32000) if large else (256, 896, 4, 1000)
    kv = hidden // 4
    layer = {
        "input_layernorm.weight": (hidden,),
        "mlp.down_proj.weight": (hidden, inner),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
    }
    ends = 2 * 2 * vocabulary * hidden
    layers = max(1, round((nbytes - ends) / (2 * sum(torch.Size(shape).numel() for shape in layer.values()))))
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for number in range(layers):
        shapes.update({f"model.layers.{number}.{name}": shape for name, shape in layer.items()})
    shapes.update({"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)})

    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        if size > min(SHARD_BYTES, nbytes // 3):
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += 2 * torch.Size(shape).numel()
    directory.mkdir(parents=True, exist_ok=True)
    where = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(where).manual_seed(0)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {
            name: torch.randn(shape, dtype=torch.bfloat16, device=where, generator=generator).mul_(0.02).cpu()
            for name, shape in shard.items()
        }
        save_file(tensors, directory / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": heads // 4,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(config))


def check_logits(directory: Path, scratch: Path, device: str) -> None:
    """load_model by each strategy against from_pretrained: the same logits, bit by bit."""
    import transformers

    import weightctl

    tokens = torch.arange(64, device=device)[None]
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, device_map={"": device})
        expected = theirs.eval()(tokens).logits.cpu()
        del theirs
        for strategy in STRATEGIES:
            torch.cuda.empty_cache()
            model = directory
            if strategy not in ("safetensors", "pipelined"):
                (converted,) = scratch.glob(
                    "*/" + {"torch": "pytorch_model.bin", "tensorizer": "model.tensors"}[strategy]
                )
                (converted.parent / "config.json").write_bytes((directory / "config.json").read_bytes())
                model = converted
            ours = weightctl.load_model(model, device=device, strategy=strategy)
            equal = torch.equal(ours(tokens).logits.cpu(), expected)
            placed = {str(tensor.device) for tensor in (*ours.parameters(), *ours.buffers())}
            print(
                f"load_model by {strategy}: {'the same logits' if equal else 'OTHER LOGITS'}, on {placed}", flush=True
            )
            assert equal
            del ours


def main() -> None:
    """Make the model, run the bench as a user does, then compare logits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path("llama"))
    parser.add_argument("--gib", type=float, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cache", action="append", choices=("warm", "cold"))
    parser.add_argument("--output", type=Path, default=Path("load_on_gpu.json"))
    arguments = parser.parse_args()
    directory, scratch = arguments.directory.absolute() / "model", arguments.directory.absolute() / "scratch"
    if not (directory / "config.json").exists():
        write_llama(directory, int(arguments.gib * (1 << 30)))
    command = [
        *(sys.executable, "-m", "weightctl", "bench", str(directory), "--device", arguments.device),
        *(option for cache in arguments.cache or ("warm", "cold") for option in ("--cache", cache)),
        *("--runs", str(arguments.runs), "--scratch", str(scratch)),
        *("--output", str(arguments.output)),
    ]
    subprocess.run(command, check=True)
    check_logits(directory, scratch, "cuda:0" if arguments.device == "cuda" else arguments.device)


if __name__ == "__main__":
    main()
