"""Dockerfile templates: known placeholders are filled in, unknown ones are an error with their line."""

from __future__ import annotations

from pathlib import Path

import pytest

from weightctl.errors import UsageError
from weightctl.model import File, Snapshot
from weightctl.template import facts, render

SNAPSHOT = Snapshot("org/name", Path("/m"), (File("a", 3, Path("/m/a")),), "org/name", "main", "c0ffee")


def template(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "Dockerfile"
    path.write_text(text)
    return path


def test_every_fact(tmp_path: Path) -> None:
    known = facts(SNAPSHOT, "/models/org/name")
    text = "\n".join(f"{name}={{{{ {name} }}}}" for name in known)
    assert render(template(tmp_path, text), known).splitlines() == [
        "name=org/name",
        "path=/models/org/name",
        "repo_id=org/name",
        "revision=main",
        "commit=c0ffee",
        "files=1",
        "bytes=3",
    ]


def test_an_unknown_placeholder_and_its_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"line 2: unknown placeholder \{\{ nope \}\}") as caught:
        render(template(tmp_path, "FROM scratch\nLABEL a={{ nope }}\n"), facts(SNAPSHOT, "/m"))
    assert "known: name, path" in str(caught.value.hint)


def test_a_fact_cannot_add_an_instruction(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="line break"):
        render(template(tmp_path, "LABEL a={{ name }}\n"), {"name": "x\nRUN evil"})


def test_what_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="not UTF-8"):
        render(tmp_path / "Dockerfile", {})
    with pytest.raises(Exception, match="cannot read the template"):
        render(tmp_path / "missing", {})


def test_the_template_of_the_house() -> None:
    rendered = render(Path(__file__).parents[1] / "Dockerfile.template", facts(SNAPSHOT, "/models/org/name"))
    assert 'MODEL_NAME="org/name"' in rendered
    assert "{{" not in rendered
