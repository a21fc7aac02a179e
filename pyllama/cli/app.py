"""The command `pyllama`: what its commands share.

Text goes to standard output, everything about it (loading, speed, errors) to standard error.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape

app = typer.Typer(
    help="Run LLaMA and MoE language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
notes = Console(stderr=True, highlight=False)
_CONTROLS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}

Source = Annotated[str, typer.Argument(help="A folder with a checkpoint, a Hugging Face Hub id, or 'demo'.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...", show_default="the GPU if there is one")]
DType = Annotated[str | None, typer.Option(help="float32, bfloat16, float16", show_default="what suits the device")]
IgnoreKey = Annotated[list[str] | None, typer.Option(help="A key of config.json to treat as absent. May be repeated.")]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What can go wrong with a checkpoint, a prompt or memory ends the program with one line."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: notes.print("[yellow]note:[/]", escape(str(message)))
            yield
    except BrokenPipeError:  # the reader has left: nothing to say
        raise
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print_error(error)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        typer.echo()
        raise typer.Exit(130) from error


def print_error(error: Exception) -> None:
    message = " ".join(str(error).split()) or type(error).__name__
    notes.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)


def write(text: str) -> None:
    """Text of a model must not steer a terminal; a file or a pipe gets it as it is."""
    text = text.translate(_CONTROLS) if sys.stdout.isatty() else text
    typer.echo(text, nl=False, color=True)  # color: or it leaves out escape sequences
