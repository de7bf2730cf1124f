"""The examples that can run here do, and the others are at least what their platforms can read."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(
    ("name", "needs", "says"),
    [
        ("diffusers_model", "diffusers", "and the same picture"),
        ("scikit_learn_model", "skops", "of the flowers are told apart, as before"),
    ],
)
def test_an_example_runs(name: str, needs: str, says: str, tmp_path: Path) -> None:
    assert importlib.util.find_spec(needs), f"the tests need {needs}: pip install {needs}"
    outcome = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.endswith(f"{says}\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.py")), ids=lambda path: path.stem)
def test_every_example_compiles(path: Path) -> None:
    compile(path.read_bytes(), path, "exec")


def test_cerebrium_and_kubernetes_can_read_theirs() -> None:
    settings = tomllib.loads((EXAMPLES / "cerebrium" / "cerebrium.toml").read_text())["cerebrium"]
    assert settings.keys() == {"deployment", "hardware", "scaling", "dependencies"}
    deployment = yaml.safe_load((EXAMPLES / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    mounted = {mount["name"] for container in pod["spec"]["containers"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}
