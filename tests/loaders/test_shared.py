"""Many processes load one model: each ends with its own bytes, none reads what another has read, and none hangs."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import itertools
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.distributed import ProcessGroup

import weightctl
from tests.loaders.crew import Crew, crew
from tests.loaders.samples import Shapes, bytes_in_tensors, entries, models, write
from weightctl.errors import IntegrityError, UsageError, WeightctlError
from weightctl.loaders import windows
from weightctl.loaders.ranks import Ranks
from weightctl.loaders.relay import Relay
from weightctl.loaders.slices import Plan, cuts
from weightctl.loaders.stored import as_bytes
from weightctl.loaders.windows import Asked
from weightctl.sources.directory import read_directory

Found = dict[str, tuple[str, tuple[int, ...], str]]
"""Name → dtype, shape, and what the bytes hash to."""

SMALL = {"PART_BYTES": 4096, "STAGE_BYTES": 2048}
"""So that small models have many windows."""

gpus = torch.cuda.device_count()
gpu = [pytest.mark.gpu, pytest.mark.skipif(gpus < 2, reason="there are no two CUDA devices")]


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=gpu)])
def ranks(request: pytest.FixtureRequest) -> Iterator[Crew]:
    with crew(min(4, gpus) if request.param == "cuda" else 4, request.param) as started:
        yield started


def found(tensors: Mapping[str, torch.Tensor]) -> Found:
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    return {
        name: (
            str(tensor.dtype),
            tuple(tensor.shape),
            hashlib.sha256(as_bytes(tensor).cpu().numpy().tobytes()).hexdigest(),
        )
        for name, tensor in tensors.items()
    }


def load(
    group: ProcessGroup, device: str, directory: Path | str, sizes: Mapping[str, int], options: dict[str, Any]
) -> Found:
    """In a rank: what `weightctl.load` gives, with these sizes of windows."""
    usual = {name: getattr(windows, name) for name in sizes}
    try:
        for name, size in sizes.items():
            setattr(windows, name, size)
        return found(weightctl.load(directory, device, process_group=group, **options))
    finally:
        for name, size in usual.items():
            setattr(windows, name, size)


def expected(tensors: Mapping[str, torch.Tensor], plan: Mapping[str, int], rank: int, size: int) -> Found:
    """What a rank is to have, as torch cuts it."""
    cut = {}
    for name, tensor in tensors.items():
        dimension = next((dimension for glob, dimension in plan.items() if fnmatch.fnmatchcase(name, glob)), None)
        if dimension is not None:
            # Not as bools, since a copy makes those 0 or 1.
            whole = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
            chunks = whole.chunk(size, dimension)
            part = chunks[rank] if rank < len(chunks) else whole.narrow(dimension, 0, 0)
            tensor = part.contiguous().view(tensor.dtype)
        cut[name] = tensor
    return found(cut)


def check(
    ranks: Crew, size: int, directory: Path, plan: Mapping[str, int] | None = None, sizes: Mapping[str, int] = SMALL
) -> None:
    if size > ranks.size:
        return
    tensors = weightctl.load(directory, "cpu", "safetensors")
    answers = ranks.do(size, load, directory, sizes, {"plan": plan} if plan else {})
    assert answers == [expected(tensors, plan or {}, rank, size) for rank in range(size)]


@settings(max_examples=25, deadline=None)
@given(
    shards=models(1000),
    size=st.integers(1, 4),
    dimensions=st.lists(st.integers(0, 3), max_size=40),
    part=st.sampled_from([2048, 8192, 1 << 26]),
    stage=st.sampled_from([1, 100, 1 << 25]),
)
def test_every_rank_has_its_bytes(
    ranks: Crew, shards: list[tuple[Shapes, int]], size: int, dimensions: list[int], part: int, stage: int
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        first = itertools.accumulate((len(shapes) for shapes, _ in shards), initial=0)
        for number, ((shapes, padding), start) in enumerate(zip(shards, first, strict=False)):
            write(Path(directory) / f"{number}.safetensors", shapes, padding, start)
        shapes = [shape for some, _ in shards for shape in some]
        plan = {
            f"t{number}": dimension
            for number, ((_, shape), dimension) in enumerate(zip(shapes, dimensions, strict=False))
            if dimension < len(shape)
        }
        check(ranks, size, Path(directory), plan, {"PART_BYTES": part, "STAGE_BYTES": stage})


@pytest.mark.parametrize("size", [2, 3])
def test_a_real_model(ranks: Crew, minilm: Path, size: int) -> None:
    plan = {"*.attention.self.*": 0, "*.intermediate.dense.*": 0, "*.output.dense.weight": 1, "*word_embeddings*": 0}
    check(ranks, size, minilm, sizes={})
    check(ranks, size, minilm, plan, sizes={})
    check(ranks, size, minilm, plan, {"PART_BYTES": 1 << 20, "STAGE_BYTES": 1 << 18})


def test_many_shards(ranks: Crew, tmp_path: Path) -> None:
    for number in range(150):
        write(tmp_path / f"{number:04}.safetensors", [("F32", (number % 7, 3))], number % 8, number)
    check(ranks, 2, tmp_path)


def test_a_part_of_a_model_converted_and_cut(ranks: Crew, tmp_path: Path) -> None:
    tensors = {f"layers.{n}.{part}.weight": torch.randn(50, 30) for n in range(4) for part in ("up", "down", "norm")}
    save_file(tensors, tmp_path / "model.safetensors")
    options = {
        "tensors": ["layers.1.*", "layers.3.*"],
        "dtype": "float16",
        "plan": {"*.up": "colwise", "*.down": "rowwise"},
    }
    wanted = {name: tensor.half() for name, tensor in tensors.items() if name[7] in "13"}
    for size in range(1, ranks.size + 1):
        answers = ranks.do(size, load, tmp_path, SMALL, options)
        assert answers == [expected(wanted, {"*.up.*": 0, "*.down.*": 1}, rank, size) for rank in range(size)]


def load_amid_other_modes(group: ProcessGroup, device: str, directory: Path, options: dict[str, Any]) -> Found:
    with torch.inference_mode(), torch.device("meta"):
        tensors = weightctl.load(directory, device, process_group=group, **options)
    assert not any(tensor.is_inference() for tensor in tensors.values())
    return found(tensors)


@pytest.mark.parametrize("plan", [{}, {"t0": 0, "t1": 1}])
def test_torchs_modes_change_nothing(ranks: Crew, tmp_path: Path, plan: Mapping[str, int]) -> None:
    write(tmp_path / "model.safetensors", [("F32", (300, 50)), ("BF16", (20, 333)), ("F32", (4000,))])
    tensors = weightctl.load(tmp_path, "cpu", "safetensors")
    answers = ranks.do(2, load_amid_other_modes, tmp_path, {"plan": plan} if plan else {})
    assert answers == [expected(tensors, plan, rank, 2) for rank in range(2)]


def on_host(group: ProcessGroup, device: str, directory: Path, options: dict[str, Any], host: str) -> Found:
    os.environ["NCCL_HOSTID"] = host
    try:
        return load(group, device, directory, SMALL, options)
    finally:
        del os.environ["NCCL_HOSTID"]


@pytest.mark.parametrize("hosts", ["aabb", "aba", "abc"])
def test_hosts_of_their_own(ranks: Crew, tmp_path: Path, hosts: str) -> None:
    if ranks.device == "cuda":
        pytest.skip("NCCL takes its ranks to be where they are")
    tensors = {f"{n}.{part}": torch.randn(31, 17 + n) for n in range(5) for part in "abc"}
    save_file(tensors, tmp_path / "model.safetensors")
    size, plan = len(hosts), {"*.b": 0, "*.c": 1}
    for options in ({}, {"plan": plan}):
        answers = ranks.do(size, on_host, tmp_path, options, each=[(host,) for host in hosts])
        assert answers == [expected(tensors, options.get("plan", {}), rank, size) for rank in range(size)]


def test_what_cannot_be_shared(ranks: Crew, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="a plan is for the ranks of a process group"):
        weightctl.load(tmp_path, "cpu", plan={"a": 0})
    for error in ranks.do(2, load, tmp_path, {}, {"strategy": "safetensors"}):
        assert isinstance(error, UsageError)
        assert "safetensors does not load for a process group" in error.message
    for error in ranks.do(2, load, tmp_path, {}, {"plan": {"b": 0}}):
        assert isinstance(error, UsageError)


def one_fails(answers: list[Any], rank: int, kind: type[WeightctlError], message: str) -> None:
    """All end with that error: the rank itself, and the others because of it."""
    assert [type(answer) for answer in answers] == [kind] * len(answers)
    assert message in answers[rank].message
    for other, answer in enumerate(answers):
        assert answer.message.startswith(f"rank {rank} could not load the model: ") is (other != rank)
        assert message in answer.message
        assert answer.hint == answers[rank].hint


def load_as(group: ProcessGroup, device: str, directory: Path, options: dict[str, Any]) -> Found:
    return load(group, device, directory, SMALL, options)


def test_a_rank_without_the_model(ranks: Crew, tmp_path: Path) -> None:
    save_file({"a": torch.ones(99, 99)}, tmp_path / "model.safetensors")
    nowhere = tmp_path / "nowhere"
    answers = ranks.do(2, load_as, each=[(tmp_path, {}), (nowhere, {})])
    one_fails(answers, 1, type(answers[1]), str(nowhere))
    check(ranks, 2, tmp_path)


def test_a_rank_with_a_damaged_model(ranks: Crew, tmp_path: Path) -> None:
    for name in ("right", "cut"):
        (tmp_path / name).mkdir()
        save_file({"a": torch.ones(99, 99)}, tmp_path / name / "model.safetensors")
    cut = tmp_path / "cut" / "model.safetensors"
    os.truncate(cut, cut.stat().st_size - 1)
    answers = ranks.do(2, load_as, each=[(tmp_path / "cut", {}), (tmp_path / "right", {})])
    one_fails(answers, 0, IntegrityError, str(cut))


def test_ranks_with_different_models(ranks: Crew, tmp_path: Path) -> None:
    for name, shape in (("one", (9, 4)), ("two", (4, 9))):
        (tmp_path / name).mkdir()
        save_file({"a": torch.ones(*shape)}, tmp_path / name / "model.safetensors")
    for error in ranks.do(2, load_as, each=[(tmp_path / "one", {}), (tmp_path / "two", {})]):
        assert isinstance(error, IntegrityError)
        assert "the files of rank 1 are not those of rank 0" in error.message


@pytest.mark.parametrize("options", [{"plan": {"a": 0}}, {"tensors": ["a"]}, {"dtype": "float16"}])
def test_ranks_that_ask_for_different_things(ranks: Crew, tmp_path: Path, options: dict[str, Any]) -> None:
    save_file({"a": torch.ones(9, 4), "b": torch.ones(3)}, tmp_path / "model.safetensors")
    for error in ranks.do(2, load_as, tmp_path, each=[({},), (options,)]):
        assert isinstance(error, UsageError)
        assert "rank 1 for other tensors, dtypes or parts than rank 0" in error.message


def prepared(
    group: ProcessGroup, device: str, directory: Path, plan: Plan, hosts: Sequence[str], source: Path | None = None
) -> tuple[Ranks, Relay]:
    """In a rank: what is to bring a model from the files, or from `source`, where the ranks are on these hosts."""
    members = Ranks(group, device)
    there = entries([file for file in read_directory(directory).files if file.path.endswith(".safetensors")])
    if source:
        there = [dataclasses.replace(e, file=dataclasses.replace(e.file, source=source)) for e in there]
    asked = Asked(tuple(there), device, {}, cuts(there, plan, members.size))
    usual, windows.PART_BYTES, windows.STAGE_BYTES = (windows.PART_BYTES, windows.STAGE_BYTES), 8192, 8192
    try:
        return members, members.agree(lambda: Relay(asked, members.team(hosts)))[0]
    finally:
        windows.PART_BYTES, windows.STAGE_BYTES = usual


def bring(group: ProcessGroup, device: str, directory: Path, plan: Plan, source: Path | None) -> None:
    members, relay = prepared(group, device, directory, plan, ["host"] * group.size(), source)
    members.agree(relay.run)


@pytest.mark.parametrize("plan", [{}, {"t*": 1}, {"t*": 0}])
def test_a_rank_that_cannot_read_on(ranks: Crew, tmp_path: Path, plan: Plan) -> None:
    """The kernel gives EIO for reading a process's memory where it has none."""
    for number in range(3):
        write(tmp_path / f"{number}.safetensors", [("F32", (300, 50)), ("BF16", (20, 333))], first=2 * number)
    for size in (1, 2, ranks.size):
        sources = [(None,)] * (size - 1) + [(Path("/proc/self/mem"),)]
        one_fails(ranks.do(size, bring, tmp_path, plan, each=sources), size - 1, WeightctlError, "Input/output error")
    assert ranks.do(2, bring, tmp_path, plan, each=[(None,), (None,)]) == [None, None]


def load_in_little_memory(group: ProcessGroup, device: str, directory: Path, little: bool) -> Found:
    usual = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    if little:
        resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20), usual[1]))
    before = bytes_in_tensors()
    try:
        return load(group, device, directory, {}, {})
    except WeightctlError:
        assert bytes_in_tensors() <= before  # though the error is still there
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_AS, usual)


def test_a_rank_without_the_memory(ranks: Crew, tmp_path: Path) -> None:
    if ranks.device == "cuda":
        pytest.skip("this limits the host's memory")
    file = write(tmp_path / "model.safetensors", [("U8", (0,))])
    header = b'{"t":{"dtype":"U8","shape":[1073741824],"data_offsets":[0,1073741824]}}'
    file.source.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(file.source, 8 + len(header) + (1 << 30))
    answers = ranks.do(2, load_in_little_memory, tmp_path, each=[(True,), (False,)])
    one_fails(answers, 0, WeightctlError, "the model does not fit on cpu: 1073741824 bytes are needed")


def leftovers(group: ProcessGroup, device: str, directory: Path) -> tuple[int, int]:
    def load_once() -> None:
        load(group, device, directory, SMALL, {"plan": {"t0": 0, "t1": 1}})

    load_once()
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        load_once()
    return threading.active_count() - threads, len(os.listdir("/proc/self/fd")) - files


def test_many_loads_leave_nothing(ranks: Crew, tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", [("F32", (300, 50)), ("BF16", (20, 333)), ("F32", (4000,))])
    assert max(map(max, ranks.do(2, leftovers, tmp_path))) <= 0


def devices_in_use(group: ProcessGroup, device: str, directory: Path) -> list[int]:
    load(group, device, directory, SMALL, {"plan": {"t0": 0, "t1": 1}})
    return [number for number in range(gpus) if torch._C._cuda_hasPrimaryContext(number)]


def test_a_rank_leaves_the_others_devices_alone(ranks: Crew, tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", [("F32", (300, 50)), ("BF16", (20, 333)), ("F32", (4000,))])
    own = [[rank] if ranks.device == "cuda" else [] for rank in range(2)]
    assert ranks.do(2, devices_in_use, tmp_path) == own


def bring_or_die(group: ProcessGroup, device: str, directory: Path, hosts: str) -> None:
    members, relay = prepared(group, device, directory, {"t0": 1}, hosts)
    if members.rank == members.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    members.agree(relay.run)


def test_a_rank_that_is_killed_ends_the_others(tmp_path: Path) -> None:
    """They live on, so that nobody's connections close by themselves, and the group's timeout is no help."""
    write(tmp_path / "model.safetensors", [("F32", (300, 50)), ("BF16", (20, 333)), ("F32", (4000,))])
    with crew(3, timeout=3600) as ranks:
        for hosts in ("baa", "aa"):
            answers = ranks.do(len(hosts), bring_or_die, tmp_path, hosts)
            assert len(answers) == len(hosts) - 1
            for error in answers:
                assert isinstance(error, WeightctlError)
                assert error.message.startswith("the ranks lost each other: ")


def built(group: ProcessGroup, device: str, directory: Path) -> Found:
    """In a rank: the parameters of the model, and what it says."""
    from tests import tiny_models  # which takes seconds, in every rank of every test

    model = weightctl.load_model(directory, device, process_group=group)
    return found({**dict(model.named_parameters()), "logits": tiny_models.logits(model)})


def test_every_rank_gets_the_model(ranks: Crew, tmp_path: Path) -> None:
    import transformers

    from tests import tiny_models

    right = tiny_models.saved(tiny_models.mixtral().to(torch.bfloat16), tmp_path / "right")
    answers = ranks.do(2, built, right)
    model = transformers.AutoModelForCausalLM.from_pretrained(right).to(ranks.device)
    assert answers == [found({**dict(model.named_parameters()), "logits": tiny_models.logits(model)})] * 2
    wrong = shutil.copytree(right, tmp_path / "wrong")
    for config, message in (
        ("{", "not valid JSON"),
        ((right / "config.json").read_text().replace('hidden_layers": 2', 'hidden_layers": 3'), "missing: "),
    ):
        (wrong / "config.json").write_text(config)
        answers = ranks.do(2, built, each=[(right,), (wrong,)])
        one_fails(answers, 1, type(answers[1]), message)
    assert ranks.do(2, built, right)[0]["logits"] == found({"logits": tiny_models.logits(model)})["logits"]


def filled(group: ProcessGroup, device: str, directory: Path, names: Sequence[str]) -> Found:
    """In a rank: a module with these parameters, which a model has filled."""
    module = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.zeros(99, 99, device="meta")) for name in names})
    weightctl.load_into(module, directory, device, process_group=group)
    return found(module.state_dict())


def test_every_rank_fills_its_module(ranks: Crew, tmp_path: Path) -> None:
    tensors = {"a": torch.randn(99, 99), "b": torch.randn(99, 99)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert ranks.do(2, filled, tmp_path, ["a", "b"]) == [found(tensors)] * 2
    answers = ranks.do(2, filled, tmp_path, each=[(["a"],), (["a", "b"],)])
    one_fails(answers, 0, WeightctlError, "unexpected: b")


def test_the_example_under_torchrun(minilm: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "many_gpus.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, example, minilm, "--cpu"], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert sorted(re.findall(r"rank (\d): 90\.9 MB on cpu, 45\.5 MB cut", done.stdout)) == ["0", "1"], done.stdout
