"""The backend registry: how every kind of backend is registered, named, found and listed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import ClassVar, Generic, TypeVar

from weightctl.errors import NotInstalledError, UsageError


class Backend:
    """What every backend of every kind has: a name, a line about itself, and the packages it needs."""

    name: ClassVar[str]
    summary: ClassVar[str]
    requires: ClassVar[Mapping[str, str]] = {}
    """Top-level module → the extra of weightctl that installs it."""

    @classmethod
    def unavailable(cls) -> str | None:
        """Why this backend cannot run here and what to install, or None if it can. Imports nothing."""
        for module, extra in cls.requires.items():
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed: pip install 'weightctl[{extra}]'"
        return None

    @classmethod
    def require(cls) -> None:
        """Raise `NotInstalledError` if a package that this backend needs is missing."""
        for module, extra in cls.requires.items():
            if importlib.util.find_spec(module) is None:
                raise NotInstalledError(cls.name, module, extra)


B = TypeVar("B", bound=Backend)


class Registry(Generic[B]):
    """The backends of one kind, by name."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._backends: dict[str, type[B]] = {}

    def register(self, name: str) -> Callable[[type[B]], type[B]]:
        """Class decorator: make the backend known as `name`. A name that is taken raises ValueError."""

        def add(backend: type[B]) -> type[B]:
            if name in self._backends:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            backend.name = name
            self._backends[name] = backend
            return backend

        return add

    def get(self, name: str) -> type[B]:
        """The backend called `name`. Raises UsageError, listing the known ones, if there is none."""
        try:
            return self._backends[name]
        except KeyError:
            raise UsageError(f"unknown {self.kind} {name!r}", f"known: {', '.join(self.names())}") from None

    def names(self) -> tuple[str, ...]:
        """Every registered name, in the order of registration."""
        return tuple(self._backends)
