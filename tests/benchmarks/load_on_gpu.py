"""Every strategy on a large random Llama on a GPU, and what a server that loads a model at start waits for.

python -m tests.benchmarks.load_on_gpu --directory /tmp/llama --gib 16 [--phases warm,cold,memory,small,sweep,…]

A disk that holds the model three times, and as much memory, make all of it possible. Every run is saved to --output as
soon as it has ended, and a phase that fails does not end the others. Each run is a fresh process that brings the files
into the page cache, so nothing is gained by a round to warm up. `--device cpu --gib 0.1` tries it out.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from weightctl.cli import bench_table, ui
from weightctl.config import Config
from weightctl.loaders.blocks import lay_out
from weightctl.loaders.lanes import CudaLane, SlabLane
from weightctl.loaders.pipelined import Tuning, load_shards
from weightctl.loaders.safetensors import own_checkpoint
from weightctl.operations.bench import bench
from weightctl.sources.directory import read_directory

SHARD_BYTES = 2 << 30
STRATEGIES = ("pipelined", "safetensors", "fastsafetensors", "runai", "instanttensor")


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


def check_logits(directory: Path, device: str) -> None:
    """load_model by each strategy against from_pretrained: the same logits, bit by bit."""
    import transformers

    import weightctl
    from weightctl.loaders import loaders

    other = []
    tokens = torch.arange(64, device=device)[None]
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, device_map={"": device})
        expected = theirs.eval()(tokens).logits.cpu()
        del theirs
        for strategy in STRATEGIES:
            torch.cuda.empty_cache()
            if loaders.get(strategy).unavailable() or (strategy, device) == ("instanttensor", "cpu"):
                continue
            try:
                ours = weightctl.load_model(directory, device=device, strategy=strategy)
            except weightctl.WeightctlError as error:
                outcome = str(error)
            else:
                outcome = "the same logits" if torch.equal(ours(tokens).logits.cpu(), expected) else "OTHER LOGITS"
                del ours
            print(f"load_model by {strategy}: {outcome}", flush=True)
            if outcome != "the same logits":
                other.append(strategy)
    assert not other, other


WHOLE = {
    "weightctl.load_model": """
import sys, torch, weightctl
model = weightctl.load_model(sys.argv[1], sys.argv[2])
""",
    "from_pretrained": """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map={"": sys.argv[2]}).eval()
""",
}
"""What a server does once, at start."""

PEAKS = """
if torch.cuda.is_available():
    torch.cuda.synchronize()
nbytes = sum(tensor.nbytes for tensor in model.parameters())
print(torch.cuda.max_memory_allocated() / nbytes, torch.cuda.max_memory_reserved() / nbytes)
"""


def time_whole_processes(directory: Path, device: str, rounds: int) -> None:
    """From the start of Python to a model on the device, by turns."""
    seconds: dict[str, list[float]] = {name: [] for name in WHOLE}
    peaks: dict[str, str] = {}
    for _ in range(rounds):
        for name, program in WHOLE.items():
            began = time.monotonic()
            done = subprocess.run(
                [sys.executable, "-c", program + PEAKS, str(directory), device],
                stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            seconds[name].append(time.monotonic() - began)
            peaks[name] = done.stdout.strip()
            print(f"{name}: {seconds[name][-1]:.2f} s", flush=True)
    print("whole process, seconds of each round; peak device memory allocated and reserved / the model's")
    for name, found in seconds.items():
        each = ", ".join(f"{one:.2f}" for one in found)
        print(f"{name:24} {statistics.median(found):6.2f}  ({each})  {peaks[name]}", flush=True)


def measure(arguments: argparse.Namespace, model: Path, name: str, cache: str, strategies: Sequence[str] = ()) -> None:
    """`weightctl bench`, without its round to warm up, and always with all rounds; its table."""
    settings = {"device": arguments.device, "runs": arguments.runs, "precision": 0, "timeout": 120}
    with ui.progress() as progress:
        result = bench(
            str(model), strategies=strategies, caches=(cache,), warm_up=False, scratch=arguments.directory / "scratch",
            output=arguments.output / f"{name}.json", config=Config.load(settings), progress=progress,
        )  # fmt: skip
    bench_table.show(result)


def sweep(directory: Path, device: str, rounds: int, output: Path) -> None:
    """Other readers, blocks and slabs than `pipelined` takes, by turns in this process: what its figures come from."""
    tensors = own_checkpoint(read_directory(directory)).tensors
    nbytes = sum(tensor.nbytes for tensor in tensors)
    others = [Tuning(readers, mib << 20) for readers, mib in itertools.product((8, 12, 16), (2, 4, 8))]
    tunings = [Tuning.of(nbytes, Config().ring_bytes), *others, Tuning(12, 4 << 20, 1), Tuning(12, 4 << 20, 3)]
    seconds: list[list[float]] = [[] for _ in tunings]
    for _, (tuning, found) in itertools.product(range(rounds), list(zip(tunings, seconds, strict=True))):
        torch.cuda.empty_cache()
        began = time.perf_counter()
        load_shards(lay_out(tensors), device, SlabLane if device == "cpu" else CudaLane, tuning)
        found.append(time.perf_counter() - began)
        rows = [{**dataclasses.asdict(tuning), "seconds": each} for tuning, each in zip(tunings, seconds, strict=True)]
        output.write_text(json.dumps({"bytes": nbytes, "rows": rows}, indent=2))
    for tuning, found in sorted(zip(tunings, seconds, strict=True), key=lambda row: statistics.median(row[1])):
        median = statistics.median(found)
        print(f"{median:.3f} s  {nbytes / median / 1e9:5.1f} GB/s  {tuning}", flush=True)


QUICK = ("pipelined", "instanttensor", "safetensors")
"""Those that come near the hardware, and the one that everybody has."""


def main() -> None:
    """Make the models, run the bench, then look at models in whole processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("llama"), help="on a disk")
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm/llama"), help="on a tmpfs")
    parser.add_argument("--gib", type=float, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--strategy", action="append", help="in the phase warm [default: all]")
    parser.add_argument("--output", type=Path, default=Path(), help="a directory for the results")
    parser.add_argument("--phases", default="warm,cold,memory,small,sweep,process,logits")
    arguments = parser.parse_args()
    arguments.directory = arguments.directory.absolute()
    arguments.output.mkdir(parents=True, exist_ok=True)
    model = arguments.directory / "model"

    def warm() -> None:
        measure(arguments, model, "warm", "warm", arguments.strategy or ())

    def cold() -> None:
        measure(arguments, model, "cold", "cold", QUICK)

    def memory() -> None:
        copy = arguments.memory.absolute() / "model"
        try:
            shutil.copytree(model, copy, dirs_exist_ok=True)
            measure(arguments, copy, "memory", "warm", QUICK)
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def small() -> None:
        for name, nbytes in (("1-gib", 1 << 30), ("91-mb", 91 * 10**6)):
            write_llama(arguments.directory / name, nbytes)
            measure(arguments, arguments.directory / name, name, "warm", QUICK)

    def process() -> None:
        time_whole_processes(model, arguments.device, arguments.runs)

    def logits() -> None:
        check_logits(model, arguments.device)

    def swept() -> None:
        sweep(model, arguments.device, arguments.runs, arguments.output / "sweep.json")

    phases = {action.__name__: action for action in (warm, cold, memory, small, process, logits)} | {"sweep": swept}
    wanted, failed = arguments.phases.split(","), []
    began = time.monotonic()
    if wanted != ["small"] and not (model / "config.json").exists():
        write_llama(model, int(arguments.gib * (1 << 30)))
        print(f"the model is written ({time.monotonic() - began:.0f} s)", flush=True)
    for name in wanted:
        began = time.monotonic()
        print(f"\n== {name}", flush=True)
        try:
            phases[name]()
        except Exception:  # noqa: BLE001 (one failure does not lose the rest)
            traceback.print_exc()
            failed.append(name)
        print(f"({time.monotonic() - began:.0f} s)", flush=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
