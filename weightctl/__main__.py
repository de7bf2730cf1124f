"""The `weightctl` command."""

import sys


def main() -> None:
    """Run it. Ctrl-C is no traceback while it is still being imported either."""
    try:
        from weightctl.cli.main import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
