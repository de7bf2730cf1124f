"""The application: every command, and the one place where errors are printed."""

from __future__ import annotations

from typing import Annotated, Any

import typer
import typer.core

import weightctl
from weightctl.cli import backends, bake, config, pull, push_volume, ui
from weightctl.errors import WeightctlError


class Boundary(typer.core.TyperGroup):
    """Runs a command and turns an expected error into its message and its exit code."""

    def invoke(self, ctx: Any) -> Any:
        """An unexpected exception keeps its traceback: it is a bug."""
        try:
            return super().invoke(ctx)
        except WeightctlError as error:
            ui.show_error(error)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt:
            ui.show_error(WeightctlError("interrupted", "what was finished is kept; run the command again to go on"))
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


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        ui.show(f"weightctl {weightctl.__version__}")
        raise typer.Exit


app.command()(pull.pull)
app.command()(bake.bake)
app.command()(push_volume.push_volume)
app.command()(backends.backends)
app.command()(config.config)


def main() -> None:
    """Run the command line."""
    app()
