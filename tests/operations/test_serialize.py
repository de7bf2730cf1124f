"""A serialized file holds the model's bytes, has its name only when it is right, and takes little memory to make."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import weightctl
from tests import tiny_models as models
from tests.command import start_halting
from tests.command import weightctl as command
from tests.disk import as_ordinary_user, open_to_all, read_only_directory, small_disk
from weightctl.config import Config
from weightctl.errors import IntegrityError, UsageError, WeightctlError
from weightctl.operations import serialize as operation
from weightctl.operations.serialize import SerializeResult, plan_serialize
from weightctl.progress import Progress


def serialize(model: Path, output: Path, **options: object) -> SerializeResult:
    return operation.serialize(str(model), output, **options, config=Config(), progress=Progress())  # type: ignore[arg-type]


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in right
    )


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_real_model_as_a_user_does_it(minilm: Path, tmp_path: Path) -> None:
    outcome = command("serialize", minilm, "--output", "a b/ünï.tensors", "--json", cwd=tmp_path)
    assert outcome.code == 0, outcome.stderr
    result = outcome.result
    assert list(result) == ["path", "format", "tensors", "bytes", "verified", "seconds"]
    output = tmp_path / "a b" / "ünï.tensors"
    assert (result["path"], result["format"], result["tensors"]) == (str(output), "tensorizer", 104)
    assert result["bytes"] == output.stat().st_size
    assert result["verified"] is True
    assert names_in(output.parent) == [output.name]
    assert same(weightctl.load(output), load_file(minilm / "model.safetensors"))
    damaged = bytearray(output.read_bytes())
    damaged[-1000] ^= 1
    output.write_bytes(damaged)
    assert command("verify", output).code == 3


def test_a_dry_run_touches_nothing(minilm: Path, tmp_path: Path) -> None:
    outcome = command("serialize", minilm, "--output", tmp_path / "model.tensors", "--dry-run", "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.result["bytes"] == 90_856_960
    assert names_in(tmp_path) == []
    plan = plan_serialize(str(minilm), tmp_path / "m.tensors", dtype="bfloat16", config=Config(), progress=Progress())
    assert plan.bytes == (90_856_960 - 512 * 8) // 2 + 512 * 8


def test_a_real_state_dict(crepe: Path, tmp_path: Path) -> None:
    serialize(crepe, tmp_path / "crepe.tensors", include=["full.pth"])
    expected = torch.load(crepe / "full.pth", weights_only=True)
    assert same(weightctl.load(tmp_path / "crepe.tensors"), expected)


def test_shards_and_stray_duplicates(tmp_path: Path) -> None:
    directory = models.saved(models.llama(), tmp_path / "model", max_shard_size="20kB")
    whole = weightctl.load(directory)
    shutil.copy(next(directory.glob("model-*")), directory / "consolidated.safetensors")
    assert serialize(directory, tmp_path / "model.tensors").tensors == len(whole)
    assert same(weightctl.load(tmp_path / "model.tensors"), whole)


def test_what_is_conjugate_only_by_a_flag(tmp_path: Path) -> None:
    one, other = torch.tensor([1 + 2j]), torch.tensor([3 + 4j])
    torch.save({"a": one.conj(), "b": other.conj().imag}, tmp_path / "model.pt")
    serialize(tmp_path, tmp_path / "out" / "model.tensors")
    found = weightctl.load(tmp_path / "out")
    assert (found["a"].item(), found["b"].item()) == (1 - 2j, -4)


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    weight = torch.randn(1000, 1000)
    (tmp_path / "model").mkdir()
    torch.save({"a": weight, "b": weight, "c": weight}, tmp_path / "model" / "model.pt")
    result = serialize(tmp_path / "model", tmp_path / "model.tensors", dtype="float16")
    assert result.bytes < 2.5e6
    tensors = weightctl.load(tmp_path / "model.tensors")
    assert tensors["a"].data_ptr() == tensors["b"].data_ptr() == tensors["c"].data_ptr()
    assert torch.equal(tensors["a"], weight.half())


def test_five_thousand_tensors(tmp_path: Path) -> None:
    """More than the library's own index has room for."""
    tensors = {f"model.layers.{i}.mlp.experts.{i}.gate_proj.weight": torch.full((2,), float(i)) for i in range(5_000)}
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    serialize(tmp_path / "model", tmp_path / "model.tensors")
    assert same(weightctl.load(tmp_path / "model.tensors"), tensors)


DTYPES = (
    *("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64", "complex64"),
    *("float8_e4m3fn", "float8_e5m2"),
)


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
def test_every_dtype(tmp_path: Path, dtype: str | None) -> None:
    tensors = {name: torch.arange(16).to(getattr(torch, name)) for name in DTYPES}
    tensors["rotary.inv_freq"] = torch.rand(4)
    tensors["nan"] = torch.tensor([float("nan"), float("inf"), -0.0])
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    serialize(tmp_path / "model", tmp_path / "model.tensors", dtype=dtype)
    loaded = weightctl.load(tmp_path / "model.tensors")
    for name, tensor in tensors.items():
        converted = dtype and name in ("float16", "bfloat16", "float32", "float64", "nan")
        expected = tensor.to(getattr(torch, str(dtype))) if converted else tensor
        assert loaded[name].dtype == expected.dtype, name
        assert loaded[name].reshape(-1).view(torch.uint8).tolist() == expected.reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_dtype_is_where_from_pretrained_puts_it(tmp_path: Path, dtype: str) -> None:
    """T5 keeps some of its layers in float32 where float16 is asked for."""
    torch.manual_seed(0)
    config = transformers.T5Config(d_model=32, d_ff=64, d_kv=8, num_layers=1, num_heads=4, vocab_size=64)
    directory = models.saved(transformers.T5ForConditionalGeneration(config), tmp_path / "model")
    serialize(directory, directory / "model.tensors", dtype=dtype)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(directory, dtype=getattr(torch, dtype))
    loaded = weightctl.load(directory / "model.tensors")
    expected = {name: tensor for name, tensor in theirs.state_dict().items() if name in loaded}
    assert same(loaded, expected)
    assert ({tensor.dtype for tensor in loaded.values()} == {getattr(torch, dtype)}) is (dtype == "bfloat16")


def test_a_quantized_model_keeps_its_dtypes(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(UsageError, match="quantized"):
        serialize(tmp_path, tmp_path / "out.tensors", dtype="float16")
    assert serialize(tmp_path, tmp_path / "out.tensors").tensors == 1


MEASURE = """
import sys, torch, tensorizer
from pathlib import Path
from weightctl.config import Config
from weightctl.operations.serialize import serialize
from weightctl.progress import Progress
def resident(kind):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(kind)) * 1024
for dtype in (None, "bfloat16"):
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    serialize(sys.argv[1], Path(sys.argv[2]), dtype=dtype, config=Config(), progress=Progress())
    print(resident("VmHWM") - before)
"""


def test_memory_stays_far_below_the_model(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    tensors = {f"layer{i}": torch.empty(16 << 20, dtype=torch.uint8).random_().view(torch.float16) for i in range(40)}
    total = sum(tensor.nbytes for tensor in tensors.values())
    save_file(tensors, model / "model.safetensors")
    tensors.clear()
    command = [sys.executable, "-c", MEASURE, str(model), str(tmp_path / "model.tensors")]
    peaks = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()
    assert [int(peak) < 0.75 * total for peak in peaks] == [True, True], peaks


def small_model(directory: Path, size: int = 1000) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.rand(size), "b": torch.rand(3)}, directory / "model.safetensors")
    return directory


def test_an_empty_model_and_one_of_no_bytes(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    assert command("serialize", tmp_path / "nothing", "--output", tmp_path / "x.tensors").code == 2
    (tmp_path / "none").mkdir()
    save_file({}, tmp_path / "none" / "model.safetensors")
    with pytest.raises(UsageError, match="none holds no tensors"):
        serialize(tmp_path / "none", tmp_path / "x.tensors")
    (tmp_path / "zero").mkdir()
    save_file({"zero": torch.empty(0, dtype=torch.bfloat16)}, tmp_path / "zero" / "model.safetensors")
    serialize(tmp_path / "zero", tmp_path / "zero.tensors")
    assert same(weightctl.load(tmp_path / "zero.tensors"), {"zero": torch.empty(0, dtype=torch.bfloat16)})


def test_a_lying_header_writes_nothing(tmp_path: Path) -> None:
    encoded = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(16))
    assert command("serialize", tmp_path / "model", "--output", tmp_path / "x.tensors").code == 3
    assert names_in(tmp_path) == ["model"]


def test_where_it_must_not_write(tmp_path: Path) -> None:
    model = small_model(tmp_path / "model")
    with pytest.raises(UsageError, match="is a directory"):
        serialize(model, model)
    with pytest.raises(UsageError, match="file of the model itself"):
        serialize(model, model / "model.safetensors")
    with pytest.raises(UsageError, match="unknown format 'zip'"):
        serialize(model, tmp_path / "x", format="zip")
    with pytest.raises(UsageError, match="cannot convert to 'int8'"):
        serialize(model, tmp_path / "x", dtype="int8")
    with pytest.raises(WeightctlError, match="cannot write"):
        serialize(model, model / "model.safetensors" / "x")
    assert names_in(model) == ["model.safetensors"]


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    model = small_model(tmp_path / "model", 1 << 20)
    with small_disk(tmp_path / "disk", 3 << 20) as disk:
        with pytest.raises(WeightctlError, match="not enough room"):
            serialize(model, disk / "model.tensors")
        assert names_in(disk) == []


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(tmp_path: Path) -> None:
    model = small_model(tmp_path / "model", 1 << 20)
    (tmp_path / "model.tensors").write_bytes(b"as it was")
    code = f"""
from pathlib import Path
from weightctl.config import Config
from weightctl.operations.serialize import serialize
from weightctl.progress import Progress
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    serialize({str(model)!r}, Path({str(tmp_path / "model.tensors")!r}), config=Config(), progress=Progress())
except Exception as error:
    print(type(error).__name__, error)
"""
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert outcome.stdout.startswith("WeightctlError cannot write"), outcome
    assert names_in(tmp_path) == ["model", "model.tensors"]
    assert (tmp_path / "model.tensors").read_bytes() == b"as it was"


def test_a_read_only_directory(tmp_path: Path) -> None:
    model = small_model(tmp_path / "model")
    open_to_all(tmp_path)
    (model / "model.safetensors").chmod(0o644)
    with read_only_directory() as directory:

        def refused() -> None:
            with pytest.raises(WeightctlError, match="Permission denied"):
                serialize(model, directory / "model.tensors")

        as_ordinary_user(refused)
        assert names_in(directory) == []


WRITING = "weightctl.loaders.tensorizer._reserve_index"
"""What is called once the output has been begun."""


def test_a_killed_run_leaves_no_file_and_the_next_cleans_up(tmp_path: Path) -> None:
    model = small_model(tmp_path / "model", 1 << 20)
    output = tmp_path / "out" / "model.tensors"
    process = start_halting(signal.SIGSTOP, WRITING, 1, "serialize", model, "--output", output)
    staging = output.parent / ".model.tensors.weightctl-tmp"
    assert list(staging.iterdir())
    with pytest.raises(WeightctlError, match="another process is writing"):
        serialize(model, output)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not output.exists()
    assert list(staging.iterdir())
    serialize(model, output)
    assert names_in(output.parent) == ["model.tensors"]


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    model = small_model(tmp_path / "model", 1 << 20)
    output = tmp_path / "out" / "model.tensors"
    process = start_halting(signal.SIGINT, WRITING, 1, "serialize", model, "--output", output)
    process.communicate()
    assert process.returncode == 130
    assert names_in(output.parent) == []


def test_what_changes_while_it_is_read_is_found(tmp_path: Path) -> None:
    """The bytes that come back are compared with a second reading of the model."""
    model = small_model(tmp_path / "model")

    class Meddler(Progress):
        def task(self, description: str, total: int):  # type: ignore[no-untyped-def]
            if description.startswith("comparing"):
                staged = next((tmp_path / ".x.tensors.weightctl-tmp").iterdir())
                with staged.open("r+b") as stream:
                    stream.seek(-100, os.SEEK_END)
                    stream.write(b"\0")
            return super().task(description, total)

    with pytest.raises(IntegrityError, match="differs"):
        operation.serialize(str(model), tmp_path / "x.tensors", config=Config(), progress=Meddler())
    assert names_in(tmp_path) == ["model"]
