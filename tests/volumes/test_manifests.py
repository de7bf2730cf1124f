"""What a version was published as, and what is not believed of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.volumes.directory import problems, publish
from weightctl.errors import IntegrityError
from weightctl.volumes import DirectoryVolume


@pytest.mark.parametrize(
    "manifest",
    ["", "{", "[]", "null", "{}", '{"files": 1}', '{"files": [1]}', '{"files": [{"path": "x"}]}',
     '{"files": [{"path": "../x", "size": 1, "sha256": ""}]}', '{"files": [{"path": "x", "size": "y", "sha256": ""}]}',
     "[" * 100_000, '{"files": [{"path": "x", "size": Infinity, "sha256": ""}]}'],
)  # fmt: skip
def test_a_damaged_manifest(volume: Path, model: Path, manifest: str) -> None:
    published = publish(volume, model)
    (volume / ".weightctl" / "manifests" / "m" / f"{published.version}.json").write_text(manifest)
    with pytest.raises(IntegrityError):
        problems(volume)


def test_only_versions_are_listed(volume: Path, model: Path) -> None:
    published = publish(volume, model)
    manifests = volume / ".weightctl" / "manifests" / "m"
    for name in ("latest", "..", "\033[2J"):
        (manifests / f"{name}.json").write_bytes((manifests / f"{published.version}.json").read_bytes())
        (volume / "m" / name).mkdir(exist_ok=True)
    assert DirectoryVolume(volume).versions("m") == [published.version]
