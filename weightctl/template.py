"""Dockerfile templates: `{{ name }}` stands for a fact about the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from weightctl.errors import UsageError, translated_os_errors
from weightctl.model import Snapshot

_PLACEHOLDER = re.compile(r"\{\{(.*?)\}\}")


def facts(snapshot: Snapshot, directory: str) -> Mapping[str, str]:
    """What a template can say of the model; what is not known is empty."""
    return {
        "name": snapshot.name,
        "path": directory,
        "repo_id": snapshot.repo_id or "",
        "revision": snapshot.revision or "",
        "commit": snapshot.commit or "",
        "files": str(len(snapshot.files)),
        "bytes": str(snapshot.bytes),
    }


def render(path: Path, known: Mapping[str, str]) -> str:
    """The template with every placeholder filled in. Raises UsageError, with its line, for one that is not known."""
    with translated_os_errors(f"read the template {path}"):
        content = path.read_bytes()
    try:
        lines = content.decode().splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise UsageError(f"the template {path} is not UTF-8 text: {error}") from error

    def value(match: re.Match[str], number: int) -> str:
        name = match[1].strip()
        if name not in known:
            hint = f"known: {', '.join(known)}"
            raise UsageError(f"{path}, line {number}: unknown placeholder {match[0]}", hint)
        if re.search(r"[\r\n]", known[name]):
            raise UsageError(f"{path}, line {number}: {name} holds a line break, which would be an instruction")
        return known[name]

    return "".join(
        _PLACEHOLDER.sub(lambda match, number=number: value(match, number), line)  # type: ignore[misc]
        for number, line in enumerate(lines, 1)
    )
