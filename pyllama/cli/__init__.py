"""The command `pyllama`: generate, chat, convert, inspect, fit, bench, doctor."""

from pyllama.cli import text, tools  # noqa: F401  # each adds its commands
from pyllama.cli.app import app

__all__ = ["app"]
