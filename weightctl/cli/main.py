"""The application: every command, and the one place where errors are printed."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
import typer.core

import weightctl
from weightctl.cli import (
    advise,
    backends,
    bake,
    bench,
    config,
    prune,
    pull,
    push_volume,
    serialize,
    ui,
    verify,
    volumes,
)
from weightctl.config import misspelt_variables
from weightctl.errors import UsageError, WeightctlError

HELP = {"-h", "--help"}

COMMAND = __name__
"""What a context calls the command line as far as it could be read: not every error of typer's knows."""

Misread: Any = typer.BadParameter.__bases__[0]
"""What typer raises for a command line that it cannot read. Where that class lies changes with its versions."""


class Boundary(typer.core.TyperGroup):
    """Shows help at once, runs a command, and turns an expected error into its message and its exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Answer --help before typer builds its validators: importing their library alone takes 0.15 s."""
        command = self.get_command(ctx, args[0]) if args else None
        ctx.meta[COMMAND] = f"weightctl {args[0]}" if command else "weightctl"
        with errors_shown(ctx):
            if not ctx.resilient_parsing and (not args or args[0] in HELP or (command and HELP & set(args))):
                ui.show((type(ctx)(command, parent=ctx, info_name=args[0]) if command else ctx).get_help())
                raise typer.Exit(0 if args else 2)
            return list(super().parse_args(ctx, args))

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with errors_shown(ctx):
            return super().invoke(ctx)


@contextmanager
def errors_shown(ctx: Any) -> Iterator[None]:
    """End with an expected error's message and exit code. An unexpected one keeps its traceback: it is a bug."""
    try:
        yield
    except Misread as error:
        words = error.format_message().rstrip(".")
        ui.show_error(UsageError(words[0].lower() + words[1:], f"{ctx.meta[COMMAND]} --help"))
        raise typer.Exit(UsageError.exit_code) from error
    except WeightctlError as error:
        ui.show_error(error)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as interrupt:
        hint = str(interrupt) or "what was finished is kept; run the command again to go on"
        ui.show_error(WeightctlError("interrupted", hint))
        raise typer.Exit(130) from None


app = typer.Typer(
    name="weightctl",
    cls=Boundary,
    help="Package model weights once; get them into GPU memory as fast as the hardware allows.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(asked: bool) -> None:
    if asked:
        ui.show(f"weightctl {weightctl.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[  # noqa: ARG001
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=show_version)
    ] = False,
) -> None:
    for variable, meant in misspelt_variables().items():
        ui.Notes().note(f"{variable} is not a setting and changes nothing: is {meant} meant?")


app.command()(pull.pull)
app.command()(serialize.serialize)
app.command()(bake.bake)
app.command()(push_volume.push_volume)
app.command()(volumes.volumes)
app.command()(prune.prune)
app.command()(bench.bench)
app.command()(advise.advise)
app.command()(verify.verify)
app.command()(backends.backends)
app.command()(config.config)


def main() -> None:
    """Run the command line."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # not so if it is closed
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: any name can be printed anywhere
    app()
