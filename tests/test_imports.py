"""Imports run one way, heavy libraries wait until they are needed, and only the command line draws."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import weightctl

HOUSE = Path(weightctl.__file__).parent
HEAVY = ("torch", "transformers", "tensorizer", "docker", "huggingface_hub")
KINDS = ("sources", "images", "volumes", "loaders", "benchmark")
RANK = {"cli": 0, "operations": 1, **dict.fromkeys(KINDS, 2)}
"""Who may import whom: a smaller rank a greater one. A single file has rank 3."""

FRONT = ("weightctl", "weightctl.__main__")
"""The package's front: its API and its command, which name what lies in every part of the house."""


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(HOUSE.rglob("*.py")):
        parts = ("weightctl", *path.relative_to(HOUSE).with_suffix("").parts)
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = dict(modules())


def imports(path: Path, *, everywhere: bool) -> Iterator[str]:
    """What a module imports: everywhere in it, or only when it is imported itself."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            later = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for_types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            if everywhere or not (later or for_types):
                yield child
                yield from walk(child)

    for node in walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else str(node.module)


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (HOUSE / parts[1]).is_dir() else "single files"


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    if module in FRONT:
        return
    here = room(module)
    for imported in imports(MODULES[module], everywhere=True):
        if not imported.startswith("weightctl"):
            continue
        there = room(imported)
        allowed = here == there or RANK.get(here, 3) < RANK.get(there, 3)
        if (here, there) == ("benchmark", "loaders") or (here == "cli" and imported == "weightctl"):
            allowed = True
        assert allowed, f"{module} imports {imported}"


@pytest.mark.parametrize("module", MODULES)
def test_only_the_command_line_draws(module: str) -> None:
    if room(module) != "cli":
        roots = {name.split(".")[0] for name in imports(MODULES[module], everywhere=True)}
        assert not roots & {"typer", "rich", "click"}


@pytest.mark.parametrize("module", MODULES)
def test_heavy_libraries_are_imported_inside_the_function_that_needs_them(module: str) -> None:
    roots = {name.split(".")[0] for name in imports(MODULES[module], everywhere=False)}
    assert not roots & set(HEAVY)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_opens_with_a_sentence(module: str) -> None:
    text = ast.get_docstring(ast.parse(MODULES[module].read_text()))
    assert text
    assert text.split("\n\n")[0].endswith(".")


def loaded_by(program: str) -> set[str]:
    """The top-level packages that a fresh process has loaded after `program`."""
    program += "\nimport sys; print('\\n' + ' '.join(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


COMMAND = """
import contextlib, sys
sys.argv = ["weightctl", *{arguments!r}]
from weightctl.__main__ import main
with contextlib.suppress(SystemExit):
    main()
"""


@pytest.mark.parametrize("arguments", [["--help"], ["bake", "--help"], ["pull", "--help"], ["--version"], ["config"]])
def test_a_light_command_loads_no_heavy_library(arguments: list[str]) -> None:
    assert not loaded_by(COMMAND.format(arguments=arguments)) & set(HEAVY)


def test_the_package_itself_is_light() -> None:
    assert not loaded_by("import weightctl") & {*HEAVY, "typer", "rich"}


FIRST = """
import sys
for door in sys.argv[1:]:
    for module in [name for name in sys.modules if name.partition(".")[0] == "weightctl"]:
        del sys.modules[module]
    __import__(door)
"""


def test_every_module_can_be_imported_first() -> None:
    """A cycle shows only to whoever comes in by the wrong door."""
    doors = [module for module in MODULES if module != "weightctl.__main__"]
    done = subprocess.run([sys.executable, "-c", FIRST, *doors], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
