"""`pyllama convert`, `inspect`, `fit`, `bench` and `doctor`: what works on checkpoints, and what measures."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pyllama import doctor
from pyllama.bench import report
from pyllama.cli.app import Device, DType, IgnoreKey, Source, app, notes, one_line_errors
from pyllama.convert import convert as convert_checkpoint
from pyllama.files import target_file
from pyllama.inspection import fit_report, inspect
from pyllama.inspection.fit import fit
from pyllama.inspection.page import write_page
from pyllama.inspection.report import lines


def _numbers(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise typer.BadParameter(f"must be positive numbers with commas between, as in 1,4,16; got {text!r}")
    return [int(word) for word in words]


@app.command()
def convert(
    source: Source,
    folder: Annotated[str, typer.Argument(help="The folder to write; it must be empty or not be there.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16", show_default="each tensor's own")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of each file, as in 5GB or 500MB.")] = "5GB",
    ignore_config_key: IgnoreKey = None,
) -> None:
    """Write the checkpoint SOURCE to FOLDER as Hugging Face safetensors."""
    with one_line_errors():
        convert_checkpoint(source, folder, dtype, max_shard_size, ignore_config_key or ())


@app.command(name="inspect")
def inspect_command(
    source: Annotated[str, typer.Argument(help="A folder, a file of weights, a Hugging Face Hub id, or 'demo'.")],
    ignore_config_key: IgnoreKey = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    html: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Also write pictures of it: a page that needs no other file, nor a network."),
    ] = None,
) -> None:
    """Say what the checkpoint SOURCE consists of, from its headers: modules, shapes, parameters, bytes.

    It need not be of a model that pyllama runs. Modules of one structure are one line: layers, experts.
    """
    with one_line_errors():
        if html is not None:
            target_file(html)  # before anything is read
        inspection = inspect(source, ignore_config_key or ())
        if html is not None:
            write_page(inspection, html)
        typer.echo(json.dumps(asdict(inspection)) if json_ else "\n".join(lines(inspection)))


@app.command(name="fit")
def fit_command(
    source: Annotated[str, typer.Argument(help="As for inspect; also a folder with a config.json alone, or a shape.")],
    memory: Annotated[str | None, typer.Option(help="As in 80GB or 24GiB", show_default="what is free here")] = None,
    device: Annotated[
        str | None, typer.Option(help="cuda or cpu", show_default="cuda with --memory, or if it is here")
    ] = None,
    dtype: DType = None,
    batch: Annotated[
        Any, typer.Option(parser=_numbers, metavar="N,N,...", help="Numbers of sequences.")
    ] = "1,2,4,8,16,32,64",
    context: Annotated[
        Any,
        typer.Option(parser=_numbers, metavar="N,N,...", help="Tokens; without it powers of two up to the model's."),
    ] = None,
    reserve: Annotated[
        str | None,
        typer.Option(help="Left alone", show_default="1GiB of a GPU's --memory, for CUDA itself; else nothing"),
    ] = None,
    ignore_config_key: IgnoreKey = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Say whether the model SOURCE fits a device, and with what context and batch, from its headers.

    Exits with 1 where it cannot generate anything.
    """
    with one_line_errors():
        found = fit(source, memory, device, dtype, context, batch, reserve, ignore_config_key or ())
        typer.echo(json.dumps(asdict(found)) if json_ else "\n".join(fit_report.lines(found)))
        if not found.fits:
            raise typer.Exit(1)


@app.command(name="bench")
def bench_command(
    source: Annotated[str, typer.Argument(help="As elsewhere; with --random-weights also a shape's name.")],
    batch: Annotated[Any, typer.Option(parser=_numbers, metavar="N,N,...", help="Numbers of sequences.")] = "1,4,16",
    context: Annotated[
        Any,
        typer.Option(parser=_numbers, metavar="N,N,...", help="Of prompts; without it 128,2048, where they fit."),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="For each sequence.")] = 64,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Of a shape, or of a folder's config.json: nothing is read.")
    ] = False,
    layers: Annotated[int | None, typer.Option(min=1, help="With --random-weights: the first layers only.")] = None,
    compare: Annotated[bool, typer.Option(help="With transformers, where it is installed.")] = True,
    rounds: Annotated[int, typer.Option(min=1, help="Whose median counts.")] = 3,
    device: Device = None,
    dtype: DType = None,
    ignore_config_key: IgnoreKey = None,
    json_: Annotated[str | None, typer.Option("--json", help="Also write one JSON object: to a file, or '-'.")] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Write trace.json and kernels.md of some steps here, without --compare.")
    ] = None,
) -> None:
    """Measure how fast the model SOURCE generates, beside what the device can do and transformers.

    A table in Markdown goes to standard output, row by row; with --json - it is on standard error.
    """
    with one_line_errors():
        report.run(
            notes,
            json_,
            profile,
            source=source,
            batches=batch,
            contexts=context,
            new_tokens=new_tokens,
            device=device,
            dtype=dtype,
            random_weights=random_weights,
            layers=layers,
            compare=compare and profile is None,
            rounds=rounds,
            ignore_config_keys=ignore_config_key or (),
        )


@app.command(name="doctor")
def doctor_command(
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Say what is installed, built and found, and which implementation each op has on each device."""
    report = doctor.examine()
    if json_:
        typer.echo(json.dumps(asdict(report)))
        return
    doctor.show(report, Console(highlight=False))
