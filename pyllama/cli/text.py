"""`pyllama generate` and `pyllama chat`."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from pyllama.cli.app import Device, DType, IgnoreKey, Source, app, notes, one_line_errors, print_error, write
from pyllama.cli.routing import ExpertLoad, picture, table
from pyllama.files import target_file, write_text
from pyllama.generation import generate as generate_text
from pyllama.generation import stream
from pyllama.loader import load
from pyllama.model import Model
from pyllama.sampling import SamplingParams
from pyllama.text import Chunk, Completion

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
    show_routing: Annotated[
        bool, typer.Option("--show-routing", help="How many tokens each expert of each layer got.")
    ] = False,
    routing_picture: Annotated[
        Path | None, typer.Option(help="Draw the same as a heat map into this SVG file.", metavar="FILE.svg")
    ] = None,
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
    if routing_picture is not None and routing_picture.suffix != ".svg":
        raise typer.BadParameter("--routing-picture writes SVG: the file must end in .svg")
    routing = show_routing or routing_picture is not None
    with one_line_errors():
        if routing_picture is not None:
            target_file(routing_picture)  # what cannot be written is an error now, not after the text
        model = load(source, device, dtype, ignore_config_key or ())
        text = sys.stdin.read() if prompt == "-" else prompt
        given: Any = [{"role": "user", "content": text}] if chat else text
        if n == 1 and not json_:
            completions = [_show(stream(model, given, **options, use_cache=cache, routing=routing))]
        else:
            made = generate_text(model, given, **options, use_cache=cache, routing=routing)
            completions = made if n > 1 else [made]
        if routing_picture is not None:
            write_text(routing_picture, picture(ExpertLoad.of(model.config, completions), source))
        if json_:
            typer.echo(json.dumps(_as_json(model, completions)))
            return
        if n > 1:
            for i, completion in enumerate(completions, start=1):
                write(f"--- {i} of {n} ---\n{completion}\n")
        notes.print(*_speed(completions), f"peak memory: {_peak_memory(model) / 1e9:.2f} GB", sep="\n", style="dim")
        if show_routing:
            notes.print(*table(ExpertLoad.of(model.config, completions), notes.width), sep="\n", soft_wrap=True)


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
    with one_line_errors():
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
                print_error(error)
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": answer})


def _options(**options: Any) -> dict[str, Any]:
    """The options of a generation; a wrong one is a usage error before anything is loaded."""
    try:
        SamplingParams(**options)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return options


def _show(chunks: Iterator[Chunk]) -> Completion:
    """Writes the text as it comes."""
    completion = None
    for chunk in chunks:
        write(chunk.text)
        completion = chunk.completion
    typer.echo()
    assert completion is not None  # the last chunk has it
    return completion


def _answer(chunks: Iterator[Chunk]) -> str:
    """Writes an answer as it comes; Ctrl-C ends it there."""
    text = ""
    try:
        for chunk in chunks:
            write(chunk.text)
            text += chunk.text
            if chunk.completion is not None:
                typer.echo()
                notes.print(*_speed([chunk.completion]), sep="; ", style="dim")
    except KeyboardInterrupt:
        notes.print("\n(stopped)", style="dim")
    return text


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
