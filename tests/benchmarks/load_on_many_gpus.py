"""One model on many GPUs: a process each, loading by itself, sharing the reads with the others, or its slices alone.

python -m tests.benchmarks.load_on_many_gpus --directory /tmp/llama --gib 16 --nproc 2

Every run is saved to --output as soon as it has ended. `--device cpu --gib 0.1` tries it out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import torch
from safetensors import safe_open
from torch import distributed

import weightctl
from tests.benchmarks.load_on_gpu import write_llama

PLAN = {
    **dict.fromkeys(("*.q_proj", "*.k_proj", "*.v_proj", "*.gate_proj", "*.up_proj", "lm_head"), "colwise"),
    **dict.fromkeys(("*.o_proj", "*.down_proj"), "rowwise"),
    "*.embed_tokens": 0,
}
"""As vLLM and Megatron cut a Llama."""

Tensors = dict[str, torch.Tensor]
Load = Callable[[Path, str], Tensors]


def alone(directory: Path, device: str) -> Tensors:
    return weightctl.load(directory, device, "pipelined")


def shared(directory: Path, device: str) -> Tensors:
    return weightctl.load(directory, device, process_group=distributed.group.WORLD)


def sliced(directory: Path, device: str) -> Tensors:
    return weightctl.load(directory, device, process_group=distributed.group.WORLD, plan=PLAN)


def safetensors(directory: Path, device: str) -> Tensors:
    return weightctl.load(directory, device, "safetensors")


def instanttensor(directory: Path, device: str) -> Tensors:
    import instanttensor as library

    with library.safe_open(
        [str(path) for path in shards(directory)],
        framework="pt",
        device=device,
        process_group=distributed.group.WORLD,
        backend=library.BackendPolicy.BUFFERED,
    ) as opened:
        return dict(opened.tensors())


def fastsafetensors(directory: Path, device: str) -> Tensors:
    from fastsafetensors import SafeTensorsFileLoader

    loader = SafeTensorsFileLoader(distributed.group.WORLD, torch.device(device), nogds=True)
    size = distributed.get_world_size()
    paths = [str(path) for path in shards(directory)]
    loader.add_filenames({rank: paths[rank::size] for rank in range(size)})
    opened = loader.copy_files_to_device()
    return {name: opened.get_tensor(name) for name in opened.key_to_rank_lidx}


WAYS: Mapping[str, tuple[str, Load, bool]] = {
    "one": ("one process: pipelined", alone, True),
    "alone": ("each for itself: pipelined", alone, False),
    "safetensors": ("each for itself: safetensors", safetensors, False),
    "shared": ("process_group", shared, False),
    "sliced": ("process_group and plan", sliced, False),
    "instanttensor": ("instanttensor, process_group", instanttensor, False),
    "fastsafetensors": ("fastsafetensors, its process group", fastsafetensors, False),
}
"""Name → what it is, how it loads, and whether it is one process only."""


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def expected(directory: Path, name: str, way: str, rank: int, size: int) -> torch.Tensor:
    """One tensor as the safetensors library reads it, and as torch cuts it."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(directory / index[name], framework="pt") as shard:
        whole: torch.Tensor = shard.get_tensor(name)
    if way != "sliced":
        return whole
    module = name.rpartition(".")[0]
    style = next((style for glob, style in PLAN.items() if Path(module).match(glob)), None)
    return whole if style is None else whole.chunk(size, 1 if style == "rowwise" else 0)[rank]


def main_of_rank(arguments: argparse.Namespace) -> None:
    """Load once by the clock of all ranks, then compare every tensor, and print a line of JSON."""
    rank, size, directory = arguments.rank, arguments.nproc, arguments.directory / "model"
    device = "cpu" if arguments.device == "cpu" else f"cuda:{rank}"
    if device != "cpu":
        torch.cuda.set_device(rank)
    store = distributed.FileStore(arguments.store, size)
    backend = "gloo" if device == "cpu" else "nccl"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(minutes=5))
    load = WAYS[arguments.way][1]
    for library in (arguments.way, "weightctl.operations.load"):
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    together(device)
    free = torch.cuda.mem_get_info()[0] if device != "cpu" else 0
    seconds, tensors = timed(load, directory, device)
    peak = torch.cuda.max_memory_allocated() if device != "cpu" else 0
    gone = free - torch.cuda.mem_get_info()[0] if device != "cpu" else 0
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    different = [
        name
        for name, tensor in tensors.items()
        if not torch.equal(tensor, expected(directory, name, arguments.way, rank, size).to(device))
    ]
    names = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"].keys()
    assert not different, f"other bytes: {different[:3]}"
    assert tensors.keys() == names
    tensors.clear()
    again, tensors = timed(load, directory, device)
    print(json.dumps({"seconds": seconds, "again": again, "bytes": nbytes, "peak": peak, "gone": gone}), flush=True)
    os._exit(0)  # some libraries do not end where a group is left


def timed(load: Load, directory: Path, device: str) -> tuple[float, Tensors]:
    """Seconds until all ranks have what they want."""
    together(device)
    began = time.perf_counter()
    tensors = load(directory, device)
    together(device)
    return time.perf_counter() - began, tensors


def together(device: str) -> None:
    """Wait for all ranks, and for their devices."""
    if device != "cpu":
        torch.cuda.synchronize()
    distributed.all_reduce(torch.zeros(1, device=device))
    if device != "cpu":
        torch.cuda.synchronize()


def run(arguments: argparse.Namespace, way: str) -> dict[str, float] | str:
    """Load once on all GPUs in fresh processes: what the slowest rank says, or why one failed."""
    size = 1 if WAYS[way][2] else arguments.nproc
    with tempfile.TemporaryDirectory() as scratch:
        commands = [
            [
                *(sys.executable, "-m", "tests.benchmarks.load_on_many_gpus", "--directory", str(arguments.directory)),
                *("--nproc", str(size), "--rank", str(rank), "--way", way, "--device", arguments.device),
                *("--store", f"{scratch}/store"),
            ]
            for rank in range(size)
        ]
        processes = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for command in commands
        ]
        outputs = []
        try:
            outputs = [process.communicate(timeout=arguments.timeout) for process in processes]
        except subprocess.TimeoutExpired:
            return f"it had not ended after {arguments.timeout} s"
        finally:
            for process in processes:
                process.kill()
                process.wait()
    if any(process.returncode for process in processes):
        return next(
            errors.strip().splitlines()[-1] for (_, errors), p in zip(outputs, processes, strict=True) if p.returncode
        )
    found = [json.loads(output.splitlines()[-1]) for output, _ in outputs]
    return {key: max(one[key] for one in found) for key in found[0]}


def main() -> None:
    """Make the model, load it in every way by turns, check every byte, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("llama"))
    parser.add_argument("--gib", type=float, default=16)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--timeout", type=int, default=300, help="seconds for one run, start and comparison included")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--cache", default="warm", choices=("warm", "cold"))
    parser.add_argument("--way", action="append", choices=list(WAYS))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.directory = arguments.directory.absolute()
    if arguments.rank is not None:
        (arguments.way,) = arguments.way
        main_of_rank(arguments)
    model = arguments.directory / "model"
    if not (model / "config.json").exists():
        write_llama(model, int(arguments.gib * (1 << 30)))
    nbytes = sum(path.stat().st_size for path in shards(model))
    found: dict[str, list[dict[str, float] | str]] = {way: [] for way in arguments.way or WAYS}
    for number in range(arguments.runs):
        for way in random.sample(list(found), len(found)):
            prepare(model, arguments.cache)
            found[way].append(run(arguments, way))
            print(f"run {number + 1}: {WAYS[way][0]}: {found[way][-1]}", file=sys.stderr, flush=True)
            if arguments.output:
                arguments.output.write_text(json.dumps(found, indent=2))
    print(
        f"{nbytes / 1e9:.2f} GB, {arguments.nproc} processes, {arguments.cache} page cache, torch {torch.__version__}"
    )
    for way, runs in found.items():
        failed = next((one for one in runs if isinstance(one, str)), None)
        print(f"{WAYS[way][0]:36}", failed or line([one for one in runs if isinstance(one, dict)]))


def line(runs: list[dict[str, float]]) -> str:
    seconds = statistics.median(one["seconds"] for one in runs)
    each = ", ".join(f"{one['seconds']:.3f}" for one in runs)
    again = statistics.median(one["again"] for one in runs)
    peak, nbytes = max(one["peak"] for one in runs), runs[0]["bytes"]
    sizes = f"{nbytes / 1e9:.2f} GB a rank, peak {peak / 1e9:.2f} GB"
    return f"{seconds:7.3f} s ({each}), in the same processes again {again:.3f} s; {sizes}"


def prepare(model: Path, cache: str) -> None:
    """Bring the files into the page cache, or out of it."""
    for path in shards(model):
        with path.open("rb", buffering=0) as stream:
            if cache == "warm":
                while stream.read(64 << 20):
                    pass
            else:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
