"""Backends register once, are found by name, and say what they need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import pytest

from weightctl.errors import NotInstalledError, UsageError
from weightctl.registry import Backend, Registry


@pytest.fixture
def registry() -> Registry[Backend]:
    """Two backends, one of which can never be installed."""
    made: Registry[Backend] = Registry("engine")

    @made.register("steam")
    class Steam(Backend):
        summary = "boils water"
        requires: ClassVar[Mapping[str, str]] = {"a_module_that_is_nowhere": "steam"}

    @made.register("muscle")
    class Muscle(Backend):
        summary = "pushes"
        requires: ClassVar[Mapping[str, str]] = {"json": "muscle"}

    return made


def test_names_come_in_the_order_of_registration(registry: Registry[Backend]) -> None:
    assert registry.names() == ("steam", "muscle")


def test_a_backend_is_found_by_its_name_and_knows_it(registry: Registry[Backend]) -> None:
    assert registry.get("muscle").name == "muscle"


def test_an_unknown_name_lists_the_known_ones(registry: Registry[Backend]) -> None:
    with pytest.raises(UsageError, match="unknown engine 'warp'") as caught:
        registry.get("warp")
    assert caught.value.hint == "known: steam, muscle"


def test_a_name_cannot_be_taken_twice(registry: Registry[Backend]) -> None:
    with pytest.raises(ValueError, match="'steam' is registered twice"):
        registry.register("steam")(Backend)


def test_a_backend_says_whether_it_can_run_here(registry: Registry[Backend]) -> None:
    assert registry.get("muscle").unavailable() is None
    registry.get("muscle").require()
    assert "pip install 'weightctl[steam]'" in str(registry.get("steam").unavailable())
    with pytest.raises(NotInstalledError) as caught:
        registry.get("steam").require()
    assert caught.value.exit_code == 2
    assert "a_module_that_is_nowhere" in caught.value.message
    assert caught.value.hint == "pip install 'weightctl[steam]'"
