"""The list of all backends."""

from __future__ import annotations

import subprocess
import sys

import pytest

from weightctl.operations.backends import list_backends

ONE_MORE = """
from weightctl.operations.backends import list_backends
from weightctl.volumes import Volume, volumes

@volumes.register("tape")
class TapeVolume(Volume):
    summary = "a robot with tapes"
    requires = {"sys": "all", "no_such_module": "tape"}

row = next(row for row in list_backends() if row.name == "tape")
assert (row.kind, row.available, row.summary) == ("volume", False, "a robot with tapes")
assert row.reason == "no_such_module is not installed: pip install 'weightctl[tape]'"
"""


def test_every_kind_is_listed() -> None:
    rows = list_backends()
    assert {(row.kind, row.name) for row in rows} >= {
        ("source", "huggingface"), ("source", "directory"), ("image target", "layout"), ("volume", "directory"),
        ("strategy", "safetensors"), ("strategy", "transformers"), ("strategy", "torch"), ("strategy", "tensorizer"),
        ("strategy", "pipelined"), ("report", "html"), ("report", "png"),
    }  # fmt: skip
    assert len({(row.kind, row.name) for row in rows}) == len(rows)
    for row in rows:
        assert row.available == (row.reason is None)
        assert row.summary


def test_what_is_missing_says_what_to_install() -> None:
    done = subprocess.run([sys.executable, "-c", ONE_MORE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["source", "volume"])
def test_what_needs_nothing_is_available(kind: str) -> None:
    assert all(row.available for row in list_backends() if row.kind == kind)
