"""What torch.distributed says of a group that broke is told in one line."""

from __future__ import annotations

import pytest

from weightctl.errors import WeightctlError
from weightctl.loaders.ranks import translated_group_errors

NCCL = """NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, invalid usage, NCCL version 2.27.5
ncclInvalidUsage: This usually reflects invalid usage of NCCL library.
Last error:
Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 8000"""


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:7231. More."


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (NCCL, "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 8000"),
        (NCCL.partition("Duplicate")[0], NCCL.partition("\n")[0]),
        (GLOO, "Connection closed by peer [127.0.0.1]:7231"),
    ],
)
def test_what_broke_a_group(said: str, told: str) -> None:
    with pytest.raises(WeightctlError) as caught, translated_group_errors():
        raise RuntimeError(said)
    assert caught.value.message == f"the ranks lost each other: {told}"
