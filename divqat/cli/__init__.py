"""The command line."""

from divqat.cli.main import main

__all__ = ["main"]
