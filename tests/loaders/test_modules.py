"""Any torch module takes a model's tensors, or says which do not match."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import weightctl
from tests.loaders.samples import DEVICES


class Tied(nn.Module):
    """Two names for one parameter, a buffer, and one that is not saved."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(tokens)))


def saved(module: nn.Module, directory: Path, *leave_out: str, **more: torch.Tensor) -> Path:
    state = {name: tensor.clone() for name, tensor in module.state_dict().items() if name not in leave_out}
    save_file({**state, **more}, directory / "model.safetensors")
    return directory


def meta() -> Tied:
    with torch.device("meta"):
        return Tied()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strategy", ["safetensors", "pipelined"])
@pytest.mark.parametrize("make", [meta, Tied])
@pytest.mark.parametrize("leave_out", [(), ("head.weight",), ("embed.weight",)])
def test_a_module_is_filled(
    tmp_path: Path, make: type[Tied], strategy: str, leave_out: tuple[str, ...], device: str
) -> None:
    original = Tied().eval()
    original.norm.running_mean.fill_(3)
    module = make().eval()
    weightctl.load_into(module, saved(original, tmp_path, *leave_out), device, strategy)
    assert module.head.weight.device.type == (device if make is meta else "cpu")
    module.cpu()
    assert module.head.weight is module.embed.weight
    assert isinstance(module.head.weight, nn.Parameter)
    assert module.head.weight.requires_grad
    assert module.norm.num_batches_tracked.dtype == torch.int64
    tokens = torch.arange(8)
    assert torch.equal(module(tokens), original(tokens))


def test_dtypes(tmp_path: Path) -> None:
    directory = saved(Tied().half(), tmp_path)
    module, empty = Tied(), meta()
    weightctl.load_into(module, directory, "cpu")
    weightctl.load_into(empty, directory, "cpu")
    assert module.embed.weight.dtype == torch.float32
    assert empty.embed.weight.dtype == torch.float16


def test_what_does_not_match_is_listed_and_nothing_is_changed(tmp_path: Path) -> None:
    module = Tied()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    others = {"norm.weight": torch.ones(9), "other": torch.ones(1), "head.weight": torch.ones(8, 4)}
    with pytest.raises(weightctl.WeightctlError) as caught:
        weightctl.load_into(module, saved(Tied(), tmp_path, "norm.bias", **others), "cpu")
    for words in (
        "missing: norm.bias", "unexpected: other", "of another shape: norm.weight",
        "tied in the module but not equal: head.weight",
    ):  # fmt: skip
        assert words in caught.value.message
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_buffer_that_no_file_holds_is_not_left_without_memory(tmp_path: Path) -> None:
    def make() -> nn.Module:
        module = nn.Linear(2, 2)
        module.register_buffer("frequencies", torch.ones(2), persistent=False)
        return module

    directory = saved(make(), tmp_path)
    weightctl.load_into(make(), directory, "cpu")
    with torch.device("meta"):
        module = make()
    with pytest.raises(weightctl.WeightctlError, match="on the meta device and not stored: frequencies"):
        weightctl.load_into(module, directory, "cpu")
