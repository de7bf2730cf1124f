"""The `weightctl` command."""

from weightctl.cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
