"""Loaded tensors are the file's, a loaded model is from_pretrained's, and what is damaged or hostile is refused."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import weightctl
from tests import tiny_models as models
from tests.hub_server import Hub
from weightctl.config import Config
from weightctl.operations.serialize import serialize
from weightctl.progress import Progress

STRATEGIES = ("safetensors", "transformers", "torch", "tensorizer")


def equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left, right)


def in_every_format(directory: Path) -> None:
    """Beside model.safetensors, the same tensors as a state dict and as a Tensorizer file."""
    serialize(str(directory), directory / "model.tensors", config=Config(), progress=Progress())
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")


@pytest.fixture(scope="module")
def minilm_formats(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("minilm")
    for name in ("model.safetensors", "config.json"):
        shutil.copy(minilm / name, directory / name)
    in_every_format(directory)
    return directory


@pytest.mark.parametrize("strategy", [*STRATEGIES, "auto"])
def test_every_strategy_loads_the_tensors_of_a_real_model(minilm_formats: Path, strategy: str) -> None:
    expected = load_file(minilm_formats / "model.safetensors")
    tensors = weightctl.load(minilm_formats, device="cpu", strategy=strategy)
    assert tensors.keys() == expected.keys()
    assert all(equal(tensors[name], expected[name]) for name in expected)


def test_a_model_of_the_hub_whose_config_has_no_dtype(hub: Hub, minilm: Path) -> None:
    """The cache's files are links to blobs, whose names have no extension."""
    assert "dtype" not in (minilm / "config.json").read_text()
    hub.add("org/name", minilm)
    ours = weightctl.load_model("org/name", device="cpu")
    assert equal(models.logits(ours), models.logits(transformers.BertModel.from_pretrained(minilm).eval()))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_real_model_thinks_as_from_pretrained_does(minilm_formats: Path, strategy: str) -> None:
    ours = weightctl.load_model(minilm_formats, device="cpu", strategy=strategy)
    theirs = transformers.BertModel.from_pretrained(minilm_formats).eval()
    assert type(ours) is transformers.BertModel
    assert not ours.training
    assert equal(models.logits(ours), models.logits(theirs))


@pytest.mark.parametrize("make", [models.llama, models.gpt2, models.mixtral])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_kind_of_model_thinks_as_from_pretrained_does(
    make: Callable[[], Any], strategy: str, tmp_path: Path
) -> None:
    directory = models.saved(make().to(torch.bfloat16), tmp_path / "model")
    in_every_format(directory)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    ours: Any = weightctl.load_model(directory, strategy=strategy)
    assert type(ours) is type(theirs)
    assert equal(models.logits(ours), models.logits(theirs))
    tied = theirs.lm_head.weight is theirs.get_input_embeddings().weight
    assert (ours.lm_head.weight.data_ptr() == ours.get_input_embeddings().weight.data_ptr()) is tied
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert ours.name_or_path == theirs.name_or_path
    expected = {name: tensor.dtype for name, tensor in theirs.named_buffers()}
    assert {name: tensor.dtype for name, tensor in ours.named_buffers()} == expected
    assert ours.generate(models.TOKENS, max_new_tokens=3, do_sample=False).shape == (1, 13)


def test_the_dtype_is_the_one_asked_for(tmp_path: Path) -> None:
    directory = models.saved(models.llama(), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    for strategy in ("safetensors", "transformers"):
        ours = weightctl.load_model(directory, strategy=strategy, dtype="bfloat16")
        assert equal(models.logits(ours), models.logits(theirs))


def test_shards_are_those_of_the_index(tmp_path: Path) -> None:
    directory = models.saved(models.llama(), tmp_path, max_shard_size="20kB")
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    save_file({"stray": torch.ones(3)}, directory / "consolidated.safetensors")
    weight_map = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    assert weightctl.load(directory).keys() == weight_map.keys()
    assert weightctl.load(directory, strategy="transformers").keys() == weight_map.keys()


def test_one_file_is_enough(minilm_formats: Path) -> None:
    assert len(weightctl.load(minilm_formats / "model.tensors")) == 104
    assert len(weightctl.load(minilm_formats / "pytorch_model.bin")) == 104
    model = weightctl.load_model(minilm_formats / "model.tensors")
    assert isinstance(model, transformers.BertModel)


def test_tied_tensors_of_a_state_dict_stay_tied(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    torch.save({"a": weight, "b": weight, "view": weight[:2], "c": weight.clone()}, tmp_path / "model.pt")
    serialize(str(tmp_path), tmp_path / "tied" / "model.tensors", config=Config(), progress=Progress())
    for directory in (tmp_path, tmp_path / "tied"):
        loaded = weightctl.load(directory)
        assert loaded["a"].data_ptr() == loaded["b"].data_ptr() != loaded["c"].data_ptr()
        assert all(equal(loaded[name], weight) for name in "abc")
        assert equal(loaded["view"], weight[:2])


def refused(error: type[weightctl.WeightctlError], *words: str, **arguments: Any) -> None:
    load = arguments.pop("load", weightctl.load)
    with pytest.raises(error) as caught:
        load(**arguments)
    assert type(caught.value) is error
    assert all(word in f"{caught.value.message} {caught.value.hint}" for word in words), caught.value.message


def test_missing_and_strange_tensors_are_listed_never_made_up(tmp_path: Path) -> None:
    directory = models.saved(models.llama(), tmp_path)
    tensors = load_file(directory / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    save_file({**tensors, "model.stranger": norm}, directory / "model.safetensors", {"format": "pt"})
    for strategy in ("safetensors", "transformers"):
        words = ("model.norm.weight", "model.stranger", "missing", "unexpected")
        refused(weightctl.WeightctlError, *words, load=weightctl.load_model, model=directory, strategy=strategy)
    save_file({**tensors, "model.norm.weight": norm[:5]}, directory / "model.safetensors", {"format": "pt"})
    for strategy in ("safetensors", "transformers"):
        words = ("model.norm.weight",)
        refused(weightctl.WeightctlError, *words, load=weightctl.load_model, model=directory, strategy=strategy)


@pytest.mark.parametrize("strategy", ["safetensors", "transformers", "pipelined"])
@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [-8, 8]}},
        {name: {"dtype": "F32", "shape": [4], "data_offsets": [at, at + 16]} for name, at in (("a", 0), ("b", 8))},
    ],
)  # fmt: skip
def test_a_lying_header_is_refused(tmp_path: Path, strategy: str, header: dict[str, Any]) -> None:
    encoded = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(24))
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    refused(weightctl.IntegrityError, "model.safetensors", model=tmp_path, strategy=strategy)
    refused(weightctl.IntegrityError, load=weightctl.load_model, model=tmp_path, strategy=strategy)


class Program:
    """What a hostile pickle holds."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_is_a_program_does_not_run(tmp_path: Path, zipped: bool) -> None:
    content = {"a": torch.ones(2), "b": Program(tmp_path / "it ran")}
    (tmp_path / "model").mkdir()
    torch.save(content, tmp_path / "model" / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    shutil.copy(models.saved(models.llama(), tmp_path / "llama") / "config.json", tmp_path / "model" / "config.json")
    for strategy in ("auto", "torch", "transformers"):
        refused(weightctl.IntegrityError, "could run any program", model=tmp_path / "model", strategy=strategy)
    assert not (tmp_path / "it ran").exists()


def test_code_that_a_model_brings_along_does_not_run(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text("import os; os.mkdir('it ran')")
    for strategy in ("safetensors", "transformers"):
        refused(weightctl.WeightctlError, load=weightctl.load_model, model=tmp_path, strategy=strategy)
    assert not Path("it ran").exists()


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ([torch.ones(1)], "list"),
        ({"a": {"b": torch.ones(1)}}, "'a'"),
        ({1: torch.ones(1)}, "1"),
        (torch.ones(1), "Tensor"),
        ({"a": torch.ones(2).to_sparse()}, "'a' is sparse"),
        ({"a": torch.empty(3, device="meta")}, "without bytes"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: object, word: str) -> None:
    torch.save(content, tmp_path / "model.pt")
    refused(weightctl.UsageError, word, model=tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 100, -9])
@pytest.mark.parametrize("name", ["model.pt", "model.tensors"])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str, keep: int) -> None:
    torch.save({"a": torch.randn(100)}, tmp_path / "model.pt")
    serialize(str(tmp_path), tmp_path / "whole" / "model.tensors", config=Config(), progress=Progress())
    whole = (tmp_path / "model.pt" if name == "model.pt" else tmp_path / "whole" / name).read_bytes()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / name).write_bytes(whole[:keep])
    refused(weightctl.IntegrityError, name, model=tmp_path / "cut")


def test_a_record_that_is_shorter_than_the_pickle_says_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.randn(100), "b": torch.randn(100), "empty": torch.ones(0)}, tmp_path / "model.pth")
    assert weightctl.load(tmp_path).keys() == {"a", "b", "empty"}
    with zipfile.ZipFile(tmp_path / "model.pth") as whole:
        records = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(tmp_path / "model.pth", "w") as cut:
        for name, data in records.items():
            cut.writestr(name, data[:396] if name.endswith("/data/0") else data)
    refused(weightctl.IntegrityError, "model.pth", "records", model=tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_is_called_so(tmp_path: Path, name: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 90868376\n"
    (tmp_path / name).write_text(pointer)
    refused(weightctl.IntegrityError, name, "Git LFS pointer", "git lfs pull", model=tmp_path)


def test_a_legacy_file_loads(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "model.bin", _use_new_zipfile_serialization=False)
    assert equal(weightctl.load(tmp_path)["a"], torch.ones(3))


def test_odd_tensors_load(tmp_path: Path) -> None:
    """A bool before a float leaves the float unaligned; an empty one has no bytes; a scalar no dimensions."""
    header = {
        "flag": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]},
        "ünï cödé": {"dtype": "F32", "shape": [], "data_offsets": [3, 7]},
        "empty": {"dtype": "BF16", "shape": [0, 4], "data_offsets": [7, 7]},
    }
    encoded = json.dumps(header).encode()
    data = b"\1\0\1" + b"\0\0\x80\x3f"
    (tmp_path / "a model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    serialize(str(tmp_path), tmp_path / "out" / "model.tensors", config=Config(), progress=Progress())
    for directory in (tmp_path, tmp_path / "out"):
        tensors = weightctl.load(directory)
        assert tensors["flag"].tolist() == [True, False, True]
        assert tensors["ünï cödé"].shape == ()
        assert tensors["ünï cödé"].item() == 1.0
        assert tensors["empty"].shape == (0, 4)
        assert tensors["empty"].dtype == torch.bfloat16


def test_what_cannot_be_is_said(tmp_path: Path, crepe: Path) -> None:
    refused(weightctl.UsageError, "does not exist", model="./nowhere")
    (tmp_path / "README.md").write_text("nothing")
    refused(weightctl.UsageError, "no weights", model=tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    refused(weightctl.UsageError, "pipelined", "tensorizer", model=tmp_path, strategy="fastest")
    refused(weightctl.UsageError, "no torch weights", model=tmp_path, strategy="torch")
    refused(weightctl.UsageError, "config.json", model=tmp_path, load=weightctl.load_model)
    with pytest.raises(weightctl.UsageError, match=r"^device is 'toaster'"):
        weightctl.load(tmp_path, "toaster")
    refused(weightctl.UsageError, "--include", "tiny.pth", model=crepe)
    if not torch.cuda.is_available():
        refused(weightctl.UsageError, "cuda", "cpu", model=tmp_path, device="cuda")
    refused(weightctl.UsageError, "None", model=None)
    refused(weightctl.UsageError, "'b*'", model=tmp_path, tensors="b*")


def test_one_glob_need_not_be_in_a_list(tmp_path: Path) -> None:
    save_file({"one": torch.ones(2), "two": torch.ones(3)}, tmp_path / "model.safetensors")
    save_file({"three": torch.ones(4)}, tmp_path / "other.safetensors")
    assert weightctl.load(tmp_path, torch.device("cpu"), include="model*", tensors="tw*").keys() == {"two"}


def test_a_real_state_dict_loads(crepe: Path) -> None:
    expected = torch.load(crepe / "tiny.pth", weights_only=True)
    tensors = weightctl.load(crepe, include=["tiny.pth"])
    assert tensors.keys() == expected.keys()
    assert all(equal(tensors[name], expected[name]) for name in expected)
