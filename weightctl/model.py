"""The frozen values that everything passes around: Reference, File, Snapshot."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import re
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from weightctl.config import expanded
from weightctl.errors import IntegrityError, UsageError

WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".tensors", ".h5", ".msgpack", ".npz", ".model"}
)
"""File name endings under which weights are shipped."""

WEIGHT_BYTES = 1 << 20
"""A file with one of the endings counts as a weight file from this size on; any file does from sixteen times it."""

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Reference:
    """Where a model is: what the user wrote as MODEL, taken apart."""

    source: Literal["huggingface", "directory", "volume"]
    location: str
    """The repo_id, the directory, or the volume's directory."""
    name: str | None = None
    """The model's name inside a volume."""
    revision: str | None = None
    """The Hub's branch, tag or commit, or the volume's version."""

    @classmethod
    def parse(cls, text: str, revision: str | None = None) -> Reference:
        """Take MODEL apart. `revision`, if given, is the `--revision` flag. Raises UsageError for what is no MODEL."""
        reference = cls._parse(text)
        asked = revision or reference.revision or ""
        if reference.source == "huggingface" and ".." in asked:  # git has no such names, and a URL leads elsewhere
            raise UsageError(f"not a revision: {asked!r}", "give a branch, tag or commit")
        if revision is None:
            return reference
        if reference.source == "directory":
            raise UsageError(
                f"a directory has no revisions: {text!r} with revision {revision!r}", "leave out --revision"
            )
        if reference.revision not in (None, revision):
            raise UsageError(f"two revisions are asked for: {text!r} and {revision!r}", "give one of them")
        return dataclasses.replace(reference, revision=revision)

    @classmethod
    def _parse(cls, text: str) -> Reference:
        if "\0" in text:
            raise UsageError(f"not a model: {text!r} holds a NUL byte")
        if text.startswith("volume:"):
            directory, _, rest = text.removeprefix("volume:").partition("#")
            name, _, version = rest.partition("@")
            if not directory or not name:
                raise UsageError(f"not a model in a volume: {text!r}", "write volume:DIR#NAME[@VERSION]")
            return cls("volume", str(expanded(directory)), check_name(name), version or None)
        if text.startswith("file://"):
            path = urllib.parse.unquote(text.removeprefix("file://"))
            if not path.startswith("/"):
                raise UsageError(f"not a file URL with an absolute path: {text!r}", "write file:///DIR")
            return cls("directory", path)
        if text.startswith(("/", "./", "../", "~/")) or text in (".", "..", "~"):
            return cls("directory", str(expanded(text)))
        repo_id, _, revision = text.removeprefix("hf://").partition("@")
        if not _REPO_ID.fullmatch(repo_id):
            hint = "write org/name[@revision], hf://org/name, ./dir, /dir, file:///dir or volume:DIR#name[@version]"
            if text and Path(text).exists():
                hint = f"a directory is written as a path: ./{text}"
            raise UsageError(f"not a model: {text!r}", hint)
        return cls("huggingface", repo_id, None, revision or None)

    def __str__(self) -> str:
        suffix = f"@{self.revision}" if self.revision else ""
        if self.source == "volume":
            return f"volume:{self.location}#{self.name}{suffix}"
        return self.location + suffix


def check_name(name: str) -> str:
    """Return `name` if it can be a model's name (`name` or `org/name`); raise UsageError otherwise."""
    if not _REPO_ID.fullmatch(name) or name.split("/")[-1] == "latest" or "/latest/" in f"/{name}/":
        raise UsageError(
            f"not a model name: {name!r}",
            "use name or org/name: letters, digits, '.', '_', '-', beginning with a letter or digit, and not 'latest'",
        )
    return name


def check_path(path: str) -> str:
    """Return `path` if it is a relative POSIX path that stays inside its model; raise IntegrityError otherwise."""
    parts = path.split("/")
    if not path or "\0" in path or path.startswith("/") or any(part in ("", ".", "..") for part in parts):
        raise IntegrityError(f"a file of the model has the path {path!r}, which leads outside of it or nowhere")
    return path


@dataclass(frozen=True)
class File:
    """One file of a model."""

    path: str
    """Relative to the model, POSIX."""
    size: int
    """Bytes."""
    source: Path
    """Where its bytes lie here: a regular file, links resolved."""
    sha256: str | None = None
    """What its bytes hash to, as its source or a reading of it says (64 hex digits); None while nobody has said."""
    git_id: str | None = None
    """Its git blob id (40 hex digits), which is what the Hub gives of a small file."""

    @property
    def has_digest(self) -> bool:
        """Whether anybody said what its bytes hash to."""
        return bool(self.sha256 or self.git_id)

    @property
    def is_weight(self) -> bool:
        """Whether it holds weights (and so is worth a layer of its own)."""
        named = PurePosixPath(self.path).suffix.lower() in WEIGHT_SUFFIXES
        return self.size >= (WEIGHT_BYTES if named else 16 * WEIGHT_BYTES)


@dataclass(frozen=True)
class Snapshot:
    """A model at one moment: an ordered, immutable list of its files."""

    name: str
    """`org/name`, or the directory's own name."""
    root: Path
    """The directory that holds the files under their own paths."""
    files: tuple[File, ...]
    """Ordered by path."""
    repo_id: str | None = None
    revision: str | None = None
    """What was asked for."""
    commit: str | None = None
    """What it resolved to."""

    def __post_init__(self) -> None:
        paths = [check_path(file.path) for file in self.files]
        if paths != sorted(set(paths)):
            object.__setattr__(self, "files", tuple(sorted(self.files, key=lambda file: file.path)))
            if len(set(paths)) != len(paths):
                double = next(path for path in paths if paths.count(path) > 1)
                raise IntegrityError(f"the model lists {double!r} twice")

    @property
    def bytes(self) -> int:
        """The size of all files together."""
        return sum(file.size for file in self.files)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over every file's path, size and SHA-256: equal for equal models, wherever they came from.

        Raises ValueError while a file's hash is unknown.
        """
        if any(file.sha256 is None for file in self.files):
            raise ValueError("a snapshot has a digest only when every file is hashed")
        lines = [json.dumps([file.path, file.size, file.sha256]) for file in self.files]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def file(self, path: str) -> File | None:
        """The file at `path`, or None."""
        return next((file for file in self.files if file.path == path), None)

    def replace_files(self, files: Sequence[File]) -> Snapshot:
        """The same model with these files."""
        return dataclasses.replace(self, files=tuple(files))


def matches(path: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether `path` is wanted: in one of `include` (if any) and in none of `exclude`.

    Patterns are shell globs over the whole path, as huggingface_hub reads them: `*` also matches `/`, and a
    pattern that ends in `/` means everything below it.
    """

    def any_match(patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(path, glob + "*" if glob.endswith("/") else glob) for glob in patterns)

    return (not include or any_match(include)) and not any_match(exclude)
