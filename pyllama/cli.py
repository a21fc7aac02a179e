"""The command `pyllama`: generate, chat, convert, inspect, bench, doctor.

Text goes to standard output, everything about it (loading, speed, errors) to standard error.
"""

from __future__ import annotations

import json
import resource
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape

from pyllama import doctor
from pyllama.bench import report
from pyllama.convert import convert as convert_checkpoint
from pyllama.generation import generate as generate_text
from pyllama.generation import stream
from pyllama.inspection import inspect
from pyllama.inspection.report import lines
from pyllama.loader import load
from pyllama.model import Model
from pyllama.sampling import SamplingParams
from pyllama.text import Chunk, Completion

app = typer.Typer(
    help="Run LLaMA and MoE language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
notes = Console(stderr=True, highlight=False)
_CONTROLS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}


def _numbers(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise typer.BadParameter(f"must be positive numbers with commas between, as in 1,4,16; got {text!r}")
    return [int(word) for word in words]


Source = Annotated[str, typer.Argument(help="A folder with a checkpoint, a Hugging Face Hub id, or 'demo'.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... [default: the GPU if there is one]")]
DType = Annotated[str | None, typer.Option(help="float32, bfloat16, float16 [default: what suits the device]")]
IgnoreKey = Annotated[list[str] | None, typer.Option(help="A key of config.json to treat as absent. May be repeated.")]
MaxNewTokens = Annotated[int, typer.Option(help="New tokens at most.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token, higher is more random.")]
TopK = Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Draw from the likeliest tokens of this total probability.")]
MinP = Annotated[float | None, typer.Option(help="Draw from tokens at least this share of the likeliest.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: against tokens of prompt and text.")]
PresencePenalty = Annotated[float, typer.Option(help="Above 0: against tokens of the text.")]
FrequencyPenalty = Annotated[float, typer.Option(help="Above 0: against tokens of the text, by their number.")]
Seed = Annotated[int | None, typer.Option(help="Makes what is drawn repeat.")]
Stop = Annotated[list[str] | None, typer.Option(help="The text ends before this string. May be repeated.")]


@app.command()
def generate(
    source: Source,
    prompt: Annotated[str, typer.Argument(help="The text to continue; '-' reads it from standard input.")],
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's message in a chat.")] = False,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    seed: Seed = None,
    stop: Stop = None,
    stop_token_id: Annotated[
        list[int] | None, typer.Option(help="A token that ends the text. May be repeated.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Do not end at EOS tokens.")] = False,
    logprobs: Annotated[int | None, typer.Option(help="With --json: of each token and the k likeliest.")] = None,
    n: Annotated[int, typer.Option("-n", help="Number of completions.")] = 1,
    cache: Annotated[bool, typer.Option(help="Keep keys and values, or compute all again.")] = True,
    device: Device = None,
    dtype: DType = None,
    ignore_config_key: IgnoreKey = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
) -> None:
    """Continue PROMPT with the model SOURCE."""
    options = _options(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=stop,
        stop_token_ids=stop_token_id,
        ignore_eos=ignore_eos,
        logprobs=logprobs,
        n=n,
    )
    if logprobs is not None and not json_:
        raise typer.BadParameter("--logprobs needs --json: the text alone cannot show them")
    with _one_line_errors():
        model = load(source, device, dtype, ignore_config_key or ())
        text = sys.stdin.read() if prompt == "-" else prompt
        given: Any = [{"role": "user", "content": text}] if chat else text
        if n == 1 and not json_:
            completions = [_show(stream(model, given, **options, use_cache=cache))]
        else:
            made = generate_text(model, given, **options, use_cache=cache)
            completions = made if n > 1 else [made]
        if json_:
            typer.echo(json.dumps(_as_json(model, completions)))
            return
        if n > 1:
            for i, completion in enumerate(completions, start=1):
                _write(f"--- {i} of {n} ---\n{completion}\n")
        notes.print(*_speed(completions), f"peak memory: {_peak_memory(model) / 1e9:.2f} GB", sep="\n", style="dim")


@app.command()
def chat(
    source: Source,
    system: Annotated[str | None, typer.Option(help="A system message that precedes the chat.")] = None,
    max_new_tokens: MaxNewTokens = 1024,
    temperature: Temperature = 0.7,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    device: Device = None,
    dtype: DType = None,
    ignore_config_key: IgnoreKey = None,
) -> None:
    """Talk with the model SOURCE: /reset begins anew, /exit ends; Ctrl-C stops an answer."""
    options = _options(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
    )
    with _one_line_errors():
        model = load(source, device, dtype, ignore_config_key or ())
        if model.tokenizer is None:
            raise ValueError(f"{source} has no tokenizer.json, which a chat needs")
        beginning = [] if system is None else [{"role": "system", "content": system}]
        model.tokenizer.apply_chat_template([*beginning, {"role": "user", "content": "?"}])  # or say why not now
    notes.print("/reset begins anew, /exit ends; Ctrl-C stops an answer", style="dim")
    messages = list(beginning)
    for line in _lines():
        if line == "/exit":
            break
        if line == "/reset":
            messages = list(beginning)
        elif line.startswith("/"):
            notes.print("the commands are /reset and /exit")
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                answer = _answer(stream(model, messages, **options))
            except (ValueError, MemoryError, torch.OutOfMemoryError) as error:
                _print_error(error)
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": answer})


@app.command()
def convert(
    source: Source,
    folder: Annotated[str, typer.Argument(help="The folder to write; it must be empty or not be there.")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 [default: each tensor's own]")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of each file, as in 5GB or 500MB.")] = "5GB",
    ignore_config_key: IgnoreKey = None,
) -> None:
    """Write the checkpoint SOURCE to FOLDER as Hugging Face safetensors."""
    with _one_line_errors():
        convert_checkpoint(source, folder, dtype, max_shard_size, ignore_config_key or ())


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
    with _one_line_errors():
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


@app.command(name="inspect")
def inspect_command(
    source: Annotated[str, typer.Argument(help="A folder, a file of weights, a Hugging Face Hub id, or 'demo'.")],
    ignore_config_key: IgnoreKey = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Say what the checkpoint SOURCE consists of, from its headers: modules, shapes, parameters, bytes.

    It need not be of a model that pyllama runs. Modules of one structure are one line: layers, experts.
    """
    with _one_line_errors():
        inspection = inspect(source, ignore_config_key or ())
        typer.echo(json.dumps(asdict(inspection)) if json_ else "\n".join(lines(inspection)))


def _options(**options: Any) -> dict[str, Any]:
    """The options of a generation; a wrong one is a usage error before anything is loaded."""
    try:
        SamplingParams(**options)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return options


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """What can go wrong with a checkpoint, a prompt or memory ends the program with one line."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: notes.print("[yellow]note:[/]", escape(str(message)))
            yield
    except BrokenPipeError:  # the reader has left: nothing to say
        raise
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        _print_error(error)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        typer.echo()
        raise typer.Exit(130) from error


def _print_error(error: Exception) -> None:
    message = " ".join(str(error).split()) or type(error).__name__
    notes.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)


def _show(chunks: Iterator[Chunk]) -> Completion:
    """Writes the text as it comes."""
    completion = None
    for chunk in chunks:
        _write(chunk.text)
        completion = chunk.completion
    typer.echo()
    assert completion is not None  # the last chunk has it
    return completion


def _answer(chunks: Iterator[Chunk]) -> str:
    """Writes an answer as it comes; Ctrl-C ends it there."""
    text = ""
    try:
        for chunk in chunks:
            _write(chunk.text)
            text += chunk.text
            if chunk.completion is not None:
                typer.echo()
                notes.print(*_speed([chunk.completion]), sep="; ", style="dim")
    except KeyboardInterrupt:
        notes.print("\n(stopped)", style="dim")
    return text


def _write(text: str) -> None:
    """Text of a model must not steer a terminal; a file or a pipe gets it as it is."""
    text = text.translate(_CONTROLS) if sys.stdout.isatty() else text
    typer.echo(text, nl=False, color=True)  # color: or it leaves out escape sequences


def _lines() -> Iterator[str]:
    """What the user types, until the end of input (Ctrl-D)."""
    with suppress(ImportError):  # its presence is what gives `input` editing and history
        import readline  # noqa: F401
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            notes.print("\n(/exit or Ctrl-D ends the chat)", style="dim")


def _speed(completions: Sequence[Completion]) -> tuple[str, str]:
    """What the completions of one prompt say of their speed."""
    first = completions[0]
    prompt = f"prompt: {first.prompt_tokens} tokens, {first.prompt_tokens_per_second:.1f} tokens/s"
    tokens = sum(len(completion.token_ids) for completion in completions)
    generation = f"generation: {tokens} tokens"
    if tokens > len(completions):  # the first token of each belongs to the prompt's time
        seconds = max(completion.generation_seconds for completion in completions)
        generation += f", {(tokens - len(completions)) / seconds:.1f} tokens/s"
    return prompt, generation


def _as_json(model: Model, completions: Sequence[Completion]) -> dict[str, Any]:
    rates = ("prompt_tokens_per_second", "generation_tokens_per_second")
    return {
        "completions": [
            asdict(completion) | {name: getattr(completion, name) for name in rates} for completion in completions
        ],
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "peak_memory_bytes": _peak_memory(model),
    }


def _peak_memory(model: Model) -> int:
    """Bytes: of tensors on a GPU; of the whole process on a CPU."""
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(model.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
