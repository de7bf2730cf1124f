"""What the strategy `pipelined` does on a GPU: is every byte right, how fast is it, and what would make it faster.

PYTHONPATH=. python tests/benchmarks/pipelined_on_gpu.py --disk /var/tmp/weightctl --memory /dev/shm/weightctl

Makes three models (15.8 GiB in four shards, 1 GiB, 91 MB) on a disk and in memory, and prints a few tables. Every phase
is a process of its own with a time limit; one that fails is reported and the next begins.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import gc
import hashlib
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

MIB = 1 << 20
BEGAN = time.monotonic()
Shapes = dict[str, tuple[int, ...]]


def llama(layers: int) -> list[Shapes]:
    """Four shards, as an 8B model has them."""
    hidden, inner, vocabulary = 4096, 14336, 128256
    layer = {
        **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (hidden,)),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (inner, hidden)),
        **dict.fromkeys(("self_attn.q_proj", "self_attn.o_proj"), (hidden, hidden)),
        **dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (hidden // 4, hidden)),
        "mlp.down_proj": (hidden, inner),
    }
    shards: list[Shapes] = [{} for _ in range(4)]
    for number in range(layers):
        shard = shards[number * 4 // layers]
        shard.update({f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()})
    shards[0]["model.embed_tokens.weight"] = (vocabulary, hidden)
    shards[3].update({"lm_head.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)})
    return shards


def minilm() -> list[Shapes]:
    """91 MB, as all-MiniLM-L6-v2 has them."""
    shapes: Shapes = {"embeddings.word": (30522, 384), "embeddings.position": (512, 384), "embeddings.norm": (384,)}
    for number in range(6):
        for name in ("query", "key", "value", "dense"):
            shapes.update({f"layer.{number}.{name}.weight": (384, 384), f"layer.{number}.{name}.bias": (384,)})
        shapes.update({f"layer.{number}.in.weight": (1536, 384), f"layer.{number}.in.bias": (1536,)})
        shapes.update({f"layer.{number}.out.weight": (384, 1536), f"layer.{number}.out.bias": (384,)})
        shapes.update({f"layer.{number}.norm{n}": (384,) for n in range(4)})
    return [shapes]


MODELS: dict[str, tuple[str, Callable[[], list[Shapes]]]] = {
    "15.8 GiB": ("BF16", lambda: llama(34)),
    "1 GiB": ("BF16", lambda: [{f"layers.{n}.weight": (2048, 2048) for n in range(128)}]),
    "91 MB": ("F32", minilm),
}


def folder(root: str | Path, model: str) -> Path:
    """Where a model lies."""
    return Path(root) / model.replace(" ", "-")


def weights(directory: Path) -> list[Path]:
    """Its files."""
    return sorted(directory.glob("*.safetensors"))


# --- children -------------------------------------------------------------------------------------------------------


def make(job: dict[str, Any]) -> dict[str, Any]:
    """Random bytes, made on the GPU, on the disk and in memory."""
    import torch

    began = time.perf_counter()
    sizes = {"BF16": 2, "F32": 4}
    for model, (dtype, shards) in MODELS.items():
        written: list[tuple[str, Shapes]] = []
        for number, shapes in enumerate(parts := shards(), 1):
            name = "model.safetensors" if len(parts) == 1 else f"model-{number:05}-of-{len(parts):05}.safetensors"
            written.append((name, shapes))
        for root in (job["memory"], job["disk"]):
            folder(root, model).mkdir(parents=True, exist_ok=True)
            index = {"metadata": {}, "weight_map": {key: name for name, shapes in written for key in shapes}}
            if len(written) > 1:
                (folder(root, model) / "model.safetensors.index.json").write_text(json.dumps(index))

        def write(part: tuple[str, Shapes], model: str = model, dtype: str = dtype) -> None:
            name, shapes = part
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            end = 0
            for key, shape in shapes.items():
                nbytes = math.prod(shape) * sizes[dtype]
                header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
                end += nbytes
            encoded = json.dumps(header).encode()
            encoded += b" " * (-len(encoded) % 8)
            with contextlib.ExitStack() as stack:
                roots = (job["memory"], job["disk"])
                streams = [stack.enter_context((folder(root, model) / name).open("wb", buffering=0)) for root in roots]
                for stream in streams:
                    stream.write(len(encoded).to_bytes(8, "little") + encoded)
                for start in range(0, end, 64 * MIB):
                    count = min(64 * MIB, end - start)
                    data = torch.randint(0, 256, (count,), dtype=torch.uint8, device="cuda").cpu().numpy().data
                    for stream in streams:
                        done = 0
                        while done < count:
                            done += stream.write(data[done:])

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(write, written))
    written_at = time.perf_counter()
    for model in MODELS:
        for path in weights(folder(job["disk"], model)):
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    return {"write_s": written_at - began, "fsync_s": time.perf_counter() - written_at}


def fingerprint(tensors: dict[str, Any]) -> str:
    """Of names, dtypes, shapes and (by two sums over each) bytes, computed where the tensors are."""
    import torch

    digest = hashlib.sha256()
    sums = []
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        data = tensor.reshape(-1)
        try:
            words = data.view(torch.int64)
        except RuntimeError:
            words = data.clone().view(torch.int64)
        sums += [words.sum(), words[::3].sum()]
    digest.update(json.dumps(torch.stack(sums).tolist()).encode())
    return digest.hexdigest()[:16]


def reference(directory: Path) -> Iterator[tuple[str, str, list[int], Any]]:
    """Name, dtype, shape and bytes (on the GPU) of every tensor, read in the plainest way."""
    import torch

    for path in weights(directory):
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
            for name, value in header.items():
                if name == "__metadata__":
                    continue
                start, end = value["data_offsets"]
                data = bytearray(end - start)
                stream.seek(8 + length + start)
                view, done = memoryview(data), 0
                while done < len(data):
                    done += stream.readinto(view[done:])
                content = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
                yield name, value["dtype"], value["shape"], content.cuda()


def right(tensors: dict[str, Any], directory: Path) -> str:
    """Compare every byte with the files; `ok` or what is other."""
    import torch

    from weightctl.loaders.safetensors import TORCH_DTYPES

    seen = set()
    for name, dtype, shape, data in reference(directory):
        tensor = tensors[name]
        seen.add(name)
        if tensor.device.type != "cuda" or tensor.dtype != getattr(torch, TORCH_DTYPES[dtype]):
            return f"{name} is {tensor.dtype} on {tensor.device}"
        if list(tensor.shape) != shape or not torch.equal(tensor.reshape(-1).view(torch.uint8), data):
            return f"{name} differs"
    return "ok" if seen == set(tensors) else "other names"


def pipelined(directory: Path) -> dict[str, Any]:
    """As weightctl loads it."""
    from weightctl.loaders.pipelined import PipelinedLoader
    from weightctl.sources.directory import read_directory

    return PipelinedLoader().load(read_directory(directory), "cuda")


def sweep(job: dict[str, Any]) -> dict[str, Any]:
    """Many tunings in one process, in rounds; the device's memory is given back between loads."""
    import torch

    from weightctl.loaders.blocks import plan
    from weightctl.loaders.lanes import CudaLane
    from weightctl.loaders.pipelined import Tuning, load_shards
    from weightctl.loaders.safetensors import own_checkpoint
    from weightctl.sources.directory import read_directory

    directory = Path(job["directory"])
    times: dict[str, list[float]] = {}
    expected = None
    for turn in range(job["rounds"]):
        for config in job["configs"]:
            if time.monotonic() - BEGAN > job["seconds"]:
                break
            readers, block, slabs = config
            torch.cuda.empty_cache()
            with contextlib.suppress(AttributeError):
                torch._C._host_emptyCache()
            torch.cuda.synchronize()
            began = time.perf_counter()
            checkpoint = own_checkpoint(read_directory(directory))
            headers = time.perf_counter()
            if readers:
                tuning = Tuning(readers, int(block * MIB), slabs)
            else:
                tuning = Tuning.of(sum(entry.nbytes for entry in checkpoint.tensors), 128 * MIB)
            shards = plan(checkpoint.tensors, tuning.block_bytes)
            planned = time.perf_counter()
            tensors = load_shards(shards, "cuda", CudaLane, tuning)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            key = " ".join(map(str, config))
            times.setdefault(key, []).append(round(seconds, 5))
            times.setdefault("ms in headers, plan", [])[:] = [1e3 * (headers - began), 1e3 * (planned - headers)]
            if turn == 0:
                found = fingerprint(tensors)
                expected = expected or found
                if found != expected:
                    times[key + " WRONG BYTES"] = [0]
            del tensors
            gc.collect()
    return {"times": times, "print": expected}


def check(job: dict[str, Any]) -> dict[str, Any]:
    """Everything that must hold on CUDA, one line each."""
    import torch

    import weightctl
    from weightctl.loaders import choose_loader
    from weightctl.loaders.blocks import plan
    from weightctl.loaders.lanes import CudaLane
    from weightctl.loaders.pipelined import Tuning, load_shards
    from weightctl.loaders.safetensors import TORCH_DTYPES, own_checkpoint
    from weightctl.sources.directory import read_directory

    results: dict[str, str] = {}
    prints: dict[str, str] = {}
    scratch = Path(job["disk"]) / "odd"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    small, middle = folder(job["memory"], "91 MB"), folder(job["memory"], "1 GiB")

    def odd() -> str:
        bits = {"F4": 4, "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32}
        bits |= dict.fromkeys(("BF16", "F16", "I16", "U16"), 16)
        answers = []
        for number, (first, padding) in enumerate(itertools.product((1, 3, 4097), (0, 1, 5))):
            directory = scratch / str(number)
            directory.mkdir()
            header: dict[str, Any] = {"first": {"dtype": "U8", "shape": [first], "data_offsets": [0, first]}}
            end = first
            for dtype in TORCH_DTYPES:
                if dtype == "F4":
                    continue  # compared below: its shape is another in torch
                for shape in ([], [0, 4], [7], [33, 129], [1_500_001]):
                    nbytes = math.prod(shape) * bits.get(dtype, 8) // 8
                    key = f"{dtype}-{len(shape)}-{nbytes}"
                    header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
                    end += nbytes
            encoded = json.dumps(header).encode() + b" " * padding
            path = directory / "model.safetensors"
            path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + os.urandom(end))
            for cold in (False, True):
                if cold:
                    forget([path])
                answers.append(right(pipelined(directory), directory))
            for block, slabs in ((8192, 2), (12288, 1), (MIB, 3)):
                shards = plan(own_checkpoint(read_directory(directory)).tensors, block)
                answers.append(right(load_shards(shards, "cuda", CudaLane, Tuning(5, block, slabs)), directory))
            shutil.rmtree(directory)
        return "ok" if set(answers) == {"ok"} else str(set(answers))

    def part_and_dtype() -> str:
        whole = weightctl.load(middle, "cuda")
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        some = weightctl.load(middle, "cuda", tensors=["layers.1?.weight", "layers.7.weight"], dtype="float32")
        final = sum(tensor.nbytes for tensor in some.values())
        peak = torch.cuda.max_memory_allocated() - before
        equal = all(torch.equal(tensor.nan_to_num(), whole[name].float().nan_to_num()) for name, tensor in some.items())
        torch.cuda.reset_peak_memory_stats()
        halves = weightctl.load(middle, "cuda", dtype="float16")
        equal &= all(torch.equal(t.nan_to_num(), whole[name].half().nan_to_num()) for name, t in halves.items())
        return f"{'ok' if equal and len(some) == 11 else 'WRONG'}, peak {peak / final:.3f} of the part in float32"

    def automatic() -> str:
        name = choose_loader("auto", read_directory(small), "cuda").name
        return "ok" if name == "pipelined" else name

    def too_large() -> str:
        size = 1 << 40
        header = json.dumps({"huge": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
        (scratch / "huge").mkdir()
        path = scratch / "huge" / "model.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(path, 8 + len(header) + size)
        held = torch.empty(int(torch.cuda.mem_get_info()[0] * 0.99), dtype=torch.uint8, device="cuda")
        messages = []
        for directory in (scratch / "huge", middle):
            try:
                pipelined(directory)
            except weightctl.WeightctlError as error:
                messages.append(error.message)
        del held
        torch.cuda.empty_cache()
        return f"ok: {messages[1]}" if len(messages) == 2 else f"WRONG: {messages}"

    def failure() -> str:
        directory = scratch / "shrinks"
        shutil.copytree(middle, directory)
        path = weights(directory)[0]
        shards = plan(own_checkpoint(read_directory(directory)).tensors, MIB)
        size = path.stat().st_size
        os.truncate(path, size // 2)
        torch.cuda.empty_cache()
        before = (torch.cuda.memory_allocated(), threading.active_count(), len(os.listdir("/proc/self/fd")))
        try:
            load_shards(shards, "cuda", CudaLane, Tuning(8, MIB, 2))
        except weightctl.IntegrityError as error:
            after = (torch.cuda.memory_allocated(), threading.active_count(), len(os.listdir("/proc/self/fd")))
            return ("ok: " if before == after else f"LEFT {before} {after}: ") + error.message[-60:]
        return "WRONG: no error"

    def leaks() -> str:
        def state() -> tuple[int, int, int, int, int]:
            status = Path("/proc/self/status").read_text().splitlines()
            resident = next(int(line.split()[1]) >> 10 for line in status if line.startswith("VmRSS"))
            maps = len(Path("/proc/self/maps").read_text().splitlines())
            threads = len(os.listdir("/proc/self/task"))
            return len(os.listdir("/proc/self/fd")), threads, torch.cuda.memory_allocated(), maps, resident

        for _ in range(10):
            pipelined(small)
        before = state()
        began = time.perf_counter()
        for _ in range(200):
            pipelined(small)
        each = (time.perf_counter() - began) / 200
        after = state()
        same = before[:3] == after[:3] and after[3] < before[3] + 50 and after[4] < before[4] + 50
        word = "ok" if same else "LEAK"
        return f"{word}: fds, threads, device bytes, maps, RSS MiB {before} {after}; {each * 1e3:.1f} ms each"

    def streams() -> str:
        stream = torch.cuda.Stream()
        expected = pipelined(small)["embeddings.word"].nan_to_num().double().sum().item()
        with torch.cuda.stream(stream):
            for _ in range(10):
                old = torch.full((23 * MIB,), 7.0, device="cuda")
                torch.cuda._sleep(50_000_000)
                old.add_(1)
                del old
                found = pipelined(small)["embeddings.word"].nan_to_num().double().sum()
                if found.item() != expected:
                    return "WRONG"
        return "ok"

    def modules() -> str:
        class Module(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = torch.nn.ModuleList(torch.nn.Linear(2048, 2048, bias=False) for _ in range(128))

        with torch.device("meta"):
            module = Module()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        weightctl.load_into(module, middle, "cuda")
        peak = (torch.cuda.max_memory_allocated() - before) / (1 << 30)
        answer = right({name: tensor.detach() for name, tensor in module.state_dict().items()}, middle)
        return f"{answer}, peak {peak:.3f} of the model"

    def whole() -> str:
        answers = {}
        for root, model in itertools.product(("disk", "memory"), MODELS):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            tensors = pipelined(folder(job[root], model))
            nbytes = sum(tensor.nbytes for tensor in tensors.values())
            peak = torch.cuda.max_memory_allocated() / nbytes
            if root == "memory":
                prints[model] = fingerprint(tensors)
                answers[model] = f"{right(tensors, folder(job[root], model))}, peak {peak:.4f} of the model"
            elif fingerprint(tensors) != fingerprint(pipelined(folder(job["memory"], model))):
                return f"disk and memory differ: {model}"
            del tensors
        return "; ".join(f"{model}: {answer}" for model, answer in answers.items())

    for action in (whole, odd, part_and_dtype, automatic, too_large, failure, leaks, streams, modules):
        began = time.perf_counter()
        try:
            answer = action()
        except Exception as error:  # noqa: BLE001 (a report of all that fails)
            answer = f"FAILED {type(error).__name__}: {str(error)[:300]} {traceback.format_exc()[-400:]}"
        gc.collect()
        torch.cuda.empty_cache()
        results[action.__name__] = f"{answer} ({time.perf_counter() - began:.1f} s)"
    shutil.rmtree(scratch, ignore_errors=True)
    return {"results": results, "prints": prints}


def describe(job: dict[str, Any]) -> dict[str, Any]:
    """The machine."""
    import importlib.metadata

    import torch

    versions = {}
    for name in ("torch", "safetensors", "instanttensor", "runai-model-streamer", "fastsafetensors", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "gpu": torch.cuda.get_device_name(),
        "gpu free GiB": round(torch.cuda.mem_get_info()[0] / (1 << 30), 1),
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        **versions,
        "cpus": len(os.sched_getaffinity(0)),
        "numa nodes": len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))),
        "memory GiB": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30,
        "kernel": os.uname().release,
        "huge pages": Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().strip(),
    }


DEFAULT = (0, 0, 0)
"""Readers, MiB a block and slabs: what the loader chooses."""

CHILDREN: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    action.__name__: action for action in (make, sweep, check, describe)
}


# --- the parent -----------------------------------------------------------------------------------------------------


def child(what: str, limit: float = 120, **job: Any) -> dict[str, Any]:
    """Run one of CHILDREN in a process of its own. Raises RuntimeError if it fails."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", what]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parents[2]), *sys.path])}
    try:
        done = subprocess.run(
            command, input=json.dumps(job), capture_output=True, text=True, timeout=limit, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"stopped after {limit:.0f} s") from None
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode}: {done.stderr.strip()[-500:]}")
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcome


def forget(paths: Sequence[Path]) -> None:
    """Drop files from the page cache."""
    for path in paths:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(paths: Sequence[Path]) -> None:
    """Bring files into the page cache."""
    for path in paths:
        with path.open("rb", buffering=0) as stream:
            while stream.read(64 * MIB):
                pass


def show(*columns: object) -> None:
    """One line of a table."""
    print("  ".join(str(column).ljust(26 if not number else 8) for number, column in enumerate(columns)), flush=True)


def rates(times: Sequence[float], nbytes: int) -> tuple[str, ...]:
    """Median, GB/s at the median, and the fastest and slowest."""
    median = statistics.median(times)
    return (
        f"{median:.4f} s",
        f"{nbytes / median / 1e9:.1f} GB/s",
        f"{min(times):.4f}-{max(times):.4f}",
        f"n={len(times)}",
    )


def main() -> None:
    """Run the phases one after the other, as long as there is time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--disk", type=Path, default=Path("/var/tmp/weightctl-bench"))
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm/weightctl-bench"))
    parser.add_argument("--seconds", type=float, default=450, help="begin no phase after this")
    parser.add_argument("--phases", default="make,check,sweep,memory,small")
    parser.add_argument("--keep", action="store_true", help="leave the models for the next run")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        with os.fdopen(os.dup(1), "w") as reply:
            os.dup2(2, 1)
            reply.write("\n" + json.dumps(CHILDREN[arguments.child](json.load(sys.stdin))) + "\n")
        return
    places = {"disk": str(arguments.disk), "memory": str(arguments.memory)}
    sizes: dict[str, int] = {}
    prints: dict[str, str] = {}

    def left() -> float:
        return float(arguments.seconds) - (time.monotonic() - BEGAN)

    def models_of(root: str, model: str) -> list[Path]:
        paths = weights(folder(places[root], model))
        sizes[model] = sum(path.stat().st_size for path in paths)
        return paths

    def phase_make() -> None:
        print(child("describe"))
        if not weights(folder(places["disk"], "91 MB")):
            outcome = child("make", 150, **places)
            print(f"written in {outcome['write_s']:.1f} s, fsync {outcome['fsync_s']:.1f} s")
        print(subprocess.run(["df", "-hT", *places.values()], capture_output=True, text=True, check=False).stdout)

    def phase_check() -> None:
        outcome = child("check", 120, **places)
        prints.update(outcome["prints"])
        for name, answer in outcome["results"].items():
            print(f"{name}: {answer}")

    def swept(root: str, model: str, configs: list[Any], rounds: int, seconds: float) -> None:
        models_of(root, model)
        outcome = child(
            "sweep", seconds + 30, directory=str(folder(places[root], model)), configs=configs, rounds=rounds,
            seconds=seconds,
        )  # fmt: skip
        print(
            f"-- {model} on {root}: readers block_MiB slabs",
            "" if outcome["print"] == prints.get(model) else "BYTES?",
        )
        order = sorted(outcome["times"].items(), key=lambda item: statistics.median(item[1]))
        for name, times in order:
            if "ms in" in name or "WRONG" in name:
                print(name, [round(value, 2) for value in times])
            else:
                show(name, *rates(times, sizes[model]))

    def phase_sweep() -> None:
        configs = [*itertools.product((8, 12, 16), (2, 4, 8), (2,)), (12, 4, 1), (12, 4, 3)]
        swept("disk", "15.8 GiB", [DEFAULT, *configs], 3, 60)

    def phase_memory() -> None:
        swept("memory", "15.8 GiB", [DEFAULT, (8, 4, 2), (16, 4, 2)], 3, 20)

    def phase_small() -> None:
        readers = ((4, 1, 2), (8, 1, 2), (4, 2, 2), (8, 2, 2), (4, 4, 2), (8, 4, 2), (12, 2, 2), (16, 4, 2))
        for model in ("1 GiB", "91 MB"):
            warm(models_of("disk", model))
            swept("disk", model, [DEFAULT, *readers], 7, 15)

    phases = {name.removeprefix("phase_"): action for name, action in locals().items() if name.startswith("phase_")}
    try:
        for name in arguments.phases.split(","):
            print(f"\n== {name} ({time.monotonic() - BEGAN:.0f} s)", flush=True)
            if left() < 0:
                print("skipped: out of time")
                continue
            try:
                phases[name]()
            except Exception as error:  # noqa: BLE001 (one failure does not lose the rest)
                print(f"FAILED: {type(error).__name__}: {str(error)[-600:]}", flush=True)
    finally:
        if not arguments.keep:
            for place in places.values():
                shutil.rmtree(place, ignore_errors=True)
        print(f"\nended after {time.monotonic() - BEGAN:.0f} s")


if __name__ == "__main__":
    main()
