"""The CUDA driver: what is said where there is none or it refuses, and which device is meant."""

from __future__ import annotations

import ctypes

import pytest
import torch

from weightctl.errors import WeightctlError
from weightctl.loaders import choose_device, cuda
from weightctl.loaders.cuda import Driver


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "LIBRARY", "libcuda-of-nobody.so.1")
    with pytest.raises(WeightctlError, match=r"cannot load libcuda-of-nobody\.so\.1") as caught:
        Driver()
    assert caught.value.hint == "take the strategy safetensors"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_what_the_driver_refuses() -> None:
    torch.zeros(1, device="cuda")
    source = ctypes.create_string_buffer(4096)
    with pytest.raises(WeightctlError, match="CUDA error 1"):
        Driver().copy(0, ctypes.addressof(source), 4096, torch.cuda.current_stream().cuda_stream)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_present_device_is_taken() -> None:
    """Libraries differ in which one they take `cuda` for."""
    last = torch.cuda.device_count() - 1
    with torch.cuda.device(last):
        assert choose_device("cuda") == choose_device("auto") == f"cuda:{last}"
