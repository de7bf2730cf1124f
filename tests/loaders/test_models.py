"""A model is what from_pretrained gives, around the tensors that were loaded, which it does not copy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import weightctl
from tests import tiny_models as models
from weightctl.loaders import loaders
from weightctl.loaders.models import _around_state_dict, _takes_ready_tensors, build_model, converted_dtypes
from weightctl.loaders.pipelined import PipelinedLoader
from weightctl.loaders.safetensors import SafetensorsLoader
from weightctl.model import Snapshot
from weightctl.sources.directory import read_directory

KINDS = [models.llama, models.gpt2, models.mixtral, models.qwen_moe, models.t5, models.bert, models.vit]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, gpu])]


def check_same(ours: Any, theirs: Any) -> None:
    """All that a user can see of two models."""
    assert type(ours) is type(theirs)
    for kind in ("named_parameters", "named_buffers"):
        expected = dict(getattr(theirs, kind)(remove_duplicate=False))
        found = dict(getattr(ours, kind)(remove_duplicate=False))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype, name
            assert found[name].requires_grad == tensor.requires_grad
            assert torch.equal(found[name].cpu(), tensor), name
    assert ties(ours) == ties(theirs)
    assert not ours.training
    assert ours.dtype == theirs.dtype
    assert ours.name_or_path == theirs.name_or_path
    assert ours.config.to_dict() == theirs.config.to_dict()
    if theirs.can_generate():
        assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()


def ties(model: Any) -> list[set[str]]:
    """The names that share memory."""
    names: dict[int, set[str]] = {}
    for name, tensor in model.state_dict().items():
        names.setdefault(tensor.data_ptr(), set()).add(name)
    return list(names.values())


@pytest.mark.parametrize("strategy", ["auto", "pipelined", "transformers"])
@pytest.mark.parametrize("make", KINDS)
def test_every_kind_of_model_is_what_from_pretrained_gives(
    make: Callable[[], Any], strategy: str, tmp_path: Path
) -> None:
    directory = models.saved(make().to(torch.bfloat16), tmp_path)
    ours: Any = weightctl.load_model(directory, "cpu", strategy)
    theirs = type(ours).from_pretrained(directory)
    check_same(ours, theirs)
    assert torch.equal(models.logits(ours), models.logits(theirs))


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_it_is_converted_as_from_pretrained_converts(make: Callable[[], Any], dtype: str, tmp_path: Path) -> None:
    directory = models.saved(make(), tmp_path)
    ours: Any = weightctl.load_model(directory, "cpu", "pipelined", dtype=dtype)
    theirs = type(ours).from_pretrained(directory, dtype=dtype)
    check_same(ours, theirs)
    again = weightctl.load_model(directory, "cpu", dtype=getattr(torch, dtype))
    check_same(again, theirs)
    loaded = weightctl.load(directory, "cpu", "pipelined", dtype=dtype)
    assert {tensor.dtype for tensor in loaded.values()} == {tensor.dtype for tensor in theirs.state_dict().values()}


@pytest.mark.parametrize("change", [{"dtype": "float16"}, {"dtype": None}, {"dtype": "float32"}])
def test_files_in_another_dtype_than_the_config_says(change: dict[str, Any], tmp_path: Path) -> None:
    directory = models.saved(models.qwen_moe().to(torch.bfloat16), tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **change}))
    check_same(
        weightctl.load_model(directory, "cpu", "pipelined"),
        transformers.AutoModelForCausalLM.from_pretrained(directory),
    )


def test_without_a_generation_config(tmp_path: Path) -> None:
    directory = models.saved(models.t5(), tmp_path)
    (directory / "generation_config.json").unlink()
    check_same(weightctl.load_model(directory), transformers.AutoModelForSeq2SeqLM.from_pretrained(directory))


def test_a_base_model_of_another_prefix(tmp_path: Path) -> None:
    """A checkpoint of the model with its head, for the class without it, and names of old."""
    directory = models.saved(models.bert(), tmp_path)
    tensors = load_file(directory / "model.safetensors")
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for name, tensor in tensors.items()}
    old["bert.embeddings.position_ids"] = torch.arange(512)[None]
    save_file(old, directory / "model.safetensors", {"format": "pt"})
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(directory)
    for strategy in ("auto", "pipelined"):
        check_same(weightctl.load_model(directory, "cpu", strategy), theirs)


def test_what_was_loaded_can_be_saved_and_trained(tmp_path: Path) -> None:
    directory = models.saved(models.mixtral(), tmp_path / "model")
    model: Any = weightctl.load_model(directory, "cpu", "pipelined")
    models.saved(model, tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (directory, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    model.train()(models.TOKENS, labels=models.TOKENS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class Recorder(SafetensorsLoader):
    """Remembers what it has brought, and where that lies."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}
        self.bytes: list[int] = []

    def load_part(
        self,
        snapshot: Snapshot,
        device: str,
        names: Collection[str] | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> dict[str, torch.Tensor]:
        found = PipelinedLoader().load_part(snapshot, device, names, dtypes)
        self.places.update((name, tensor.data_ptr()) for name, tensor in found.items())
        self.bytes.append(sum(tensor.nbytes for tensor in found.values()))
        return found


@pytest.mark.parametrize("make", KINDS)
def test_the_parameters_are_the_loaded_tensors(make: Callable[[], Any], tmp_path: Path) -> None:
    loader = Recorder()
    directory = models.saved(make(), tmp_path)
    model: Any = build_model(read_directory(directory), loader, "cpu", torch.bfloat16)
    stored = {name: loader.places[name] for name in load_file(directory / "model.safetensors")}
    there = {parameter.data_ptr() for parameter in model.state_dict().values()}
    copied = {name for name, place in stored.items() if place not in there}
    assert all(".experts." in name for name in copied)


def test_what_is_fused_comes_in_portions(tmp_path: Path) -> None:
    directory = models.saved(models.mixtral(num_hidden_layers=6), tmp_path)
    snapshot, loader = read_directory(directory), Recorder()
    model = build_model(snapshot, loader, "cpu", "auto", portion_bytes=70_000)
    experts = 6 * 4 * 3 * 32 * 64 * 4
    assert sum(loader.bytes[1:]) == experts
    assert len(loader.bytes) == 13
    assert max(loader.bytes[1:]) <= 70_000
    check_same(model, transformers.AutoModelForCausalLM.from_pretrained(directory))


@pytest.mark.parametrize("strategy", ["pipelined", "safetensors"])
def test_portions_list_all_that_does_not_fit(strategy: str, tmp_path: Path) -> None:
    directory = models.saved(models.mixtral(), tmp_path)
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if "layers.0" in name and ".experts." in name and ".w2." in name]:
        del tensors[name]
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:5].clone()
    tensors["model.layers.1.mlp.stranger"] = torch.ones(3)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(weightctl.WeightctlError) as caught:
        build_model(read_directory(directory), loaders.get(strategy)(), "cpu", "auto", portion_bytes=1)
    message = caught.value.message
    assert "missing: model.layers.0.mlp.experts.down_proj;" in message
    assert "unexpected: model.layers.1.mlp.stranger;" in message
    assert message.endswith("of another shape: model.norm.weight")


@pytest.mark.parametrize("make", KINDS)
def test_other_versions_of_transformers_are_asked_plainly(make: Callable[[], Any], tmp_path: Path) -> None:
    assert _takes_ready_tensors()
    directory = models.saved(make().half(), tmp_path)
    snapshot = read_directory(directory)
    ours: Any = _around_state_dict(snapshot, SafetensorsLoader().load(snapshot, "cpu"), "cpu", "auto")
    check_same(ours, type(ours).from_pretrained(directory))


def test_experts_are_converted_where_their_layer_is(tmp_path: Path) -> None:
    snapshot = read_directory(models.saved(models.mixtral(), tmp_path))
    assert converted_dtypes(snapshot, torch.float16).keys() == load_file(tmp_path / "model.safetensors").keys()


def large(make: Callable[..., Any], layers: int) -> Any:
    """Of 8 layers, some 70 MB (Llama), or 220 MB (Mixtral)."""
    return make(hidden_size=512, intermediate_size=2048, num_hidden_layers=layers, vocab_size=8192).to(torch.bfloat16)


FUSED_BYTES = 3 * (16 << 20)
"""Of what transformers fuses: a portion of 16 MiB, and what becomes of it, in two steps."""

MEMORY = """
import sys, pathlib
from weightctl.loaders.models import build_model
from weightctl.loaders.pipelined import PipelinedLoader
from weightctl.sources.directory import read_directory

def resident(kind):
    status = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(kind))

for directory in map(pathlib.Path, sys.argv[1:]):
    before = resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    model = build_model(read_directory(directory), PipelinedLoader(), "cpu", "auto", 16 << 20)
    print(resident("VmHWM") - before)
    del model
"""


def test_the_host_holds_the_model_once(tmp_path: Path) -> None:
    """Measured as the system sees it, in a process that gives memory back when it is freed."""
    kinds = [models.llama, models.mixtral]
    directories = [models.saved(make(), tmp_path / f"small {make.__name__}") for make in kinds]  # for its imports
    sizes = []
    for make in kinds:
        model = large(make, 4)
        directories.append(models.saved(model, tmp_path / make.__name__))
        sizes.append(model.get_memory_footprint())
    outcome = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, directories)],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}, check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    *_, llama, mixtral = map(int, outcome.stdout.split())
    assert 0.9 * sizes[0] <= llama <= sizes[0] * 1.02 + (8 << 20)
    assert 0.9 * sizes[1] <= mixtral <= sizes[1] * 1.02 + FUSED_BYTES + (8 << 20)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("make", [models.llama, models.mixtral])
def test_the_device_holds_the_model_once(make: Callable[..., Any], tmp_path: Path) -> None:
    model = large(make, 8)
    directory, size = models.saved(model, tmp_path, max_shard_size="50MB"), model.get_memory_footprint()
    torch.zeros(1, device="cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours: Any = build_model(read_directory(directory), PipelinedLoader(), "cuda", "auto", portion_bytes=16 << 20)
    fused = FUSED_BYTES if make is models.mixtral else 0
    assert torch.cuda.max_memory_allocated() - before <= size * 1.02 + fused + (4 << 20)
    torch.cuda.empty_cache()
    check_same(ours.cpu(), type(ours).from_pretrained(directory))
