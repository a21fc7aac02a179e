"""What a benchmark of an op consists of, and the runner that makes a row of a case.

Each `benchmarks/ops/bench_<op>.py` and `benchmarks/layers/bench_<layer>.py` defines `BENCH = Bench(...)`: the cases it
takes from a `Scope` (shapes.py), how to make inputs of given sizes, the work of a call, and the contenders. Everything
else is here, once: inputs rotated past the cache, contenders in turns, the device's limit measured among them, results
compared, the row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import layers, limits, ops
from benchmarks.results import Results
from benchmarks.shapes import Scope
from benchmarks.timing import Contender, reason, say, seconds_per_call, sets_past_cache
from pyllama.ops import implementation
from pyllama.ops.registry import OPS

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of the largest expected value


class Case(NamedTuple):
    """One row: which model has these sizes, what they are in words, and the sizes (and options, if any) by name."""

    model: str
    what: str
    sizes: Mapping[str, float]


class Work(NamedTuple):
    """What one call cannot do without, and the limit that holds it up: "read", "copy" or "product" (limits.py).

    The first two are of bytes moved, the last of FLOP.
    """

    moved: int  # bytes read and written
    flops: int
    limit: str


@dataclass(frozen=True)
class Peer:
    """Another library's kernel.

    path: "module:attribute". call: (what is there, *inputs) -> result. prepare: for kernels that plan ahead: (what is
    there, *inputs) -> what `call` gets in its place, or None where the kernel is not for such inputs; its time does
    not count.
    """

    path: str
    call: Callable[..., Any]
    prepare: Callable[..., Any] | None = None

    def find(self) -> Any:
        """What is at the path. Raises ImportError where it is not installed, or cannot be imported here."""
        module, _, attribute = self.path.partition(":")
        try:
            return getattr(import_module(module), attribute)
        except Exception as error:  # such as a library that looks for a GPU when it is imported
            raise ImportError(self.path) from error


@dataclass(frozen=True)
class Bench:
    """The benchmark of an op, or of a layer made of ops.

    All functions but `cases` and `work` take one set of inputs, as `inputs` gives it.

    cases: the rows of a scope; equal sizes become one row. inputs: (dtype, **sizes) -> one set of inputs, on torch's
    default device. work: (dtype, **sizes). pyllama: calls the op and gives its result, or what it wrote in place.
    formula: the same in plain torch, which `torch.compile` gets; it must not write into its inputs. torch: the best
    that eager torch has; None: the formula. peers: by name, a `Peer` or a function of torch's own. reference: what the
    result must be close to, in float64; it may be the last rows only; None: the formula on inputs in float64.
    right: where results may rightly differ (samples), instead of a reference: (result, *inputs) -> whether each part of
    the result is right, bool. made_of: a layer's ops; none: `op` alone. gradients: the places of those inputs whose
    gradients training needs (backward.py). called: contenders that read values on the host, which no CUDA graph can.
    """

    op: str
    cases: Callable[[Scope], Iterable[Case]]
    inputs: Callable[..., tuple[Any, ...]]
    work: Callable[..., Work]
    pyllama: Callable[..., Any]
    formula: Callable[..., Any]
    torch: Callable[..., Any] | None = None
    peers: Mapping[str, Peer | Callable[..., Any]] = field(default_factory=dict)
    reference: Callable[..., Any] | None = None
    right: Callable[..., Tensor] | None = None
    made_of: tuple[str, ...] = ()
    gradients: tuple[int, ...] = ()
    called: tuple[str, ...] = ()

    @property
    def ops(self) -> tuple[str, ...]:
        return self.made_of or (self.op,)

    @property
    def mutates(self) -> bool:
        return any(OPS[op].mutates for op in self.ops)

    def implementation(self, device: str) -> str:
        """Of all its ops; "eager" unless they have the same."""
        found = {implementation(op, device) for op in self.ops}
        return found.pop() if len(found) == 1 else "eager"


def benches() -> dict[str, Bench]:
    """By name of the file, as there are in benchmarks/ops and benchmarks/layers."""
    names = [
        (f"{package.__name__}.{module.name}", module.name.removeprefix("bench_"))
        for package in (ops, layers)
        for module in iter_modules(package.__path__)
        if module.name.startswith("bench_")
    ]
    return {name: import_module(module).BENCH for module, name in names}


def merged(cases: Iterable[Case]) -> Iterator[Case]:
    """One case for all of equal sizes, which names all their models."""
    same: dict[tuple[tuple[str, float], ...], list[Case]] = {}
    for case in cases:
        same.setdefault(tuple(sorted(case.sizes.items())), []).append(case)
    for group in same.values():
        models = ", ".join(dict.fromkeys(case.model for case in group))
        yield group[0]._replace(model=models)


def measure(bench: Bench, case: Case, dtype: torch.dtype, device: str, results: Results) -> dict[str, Any]:
    """Times all contenders on one case, adds the row to the results and gives it. Raises where pyllama's op fails."""
    torch.manual_seed(0)
    work = bench.work(dtype, **case.sizes)
    with torch.device(device):
        first = bench.inputs(dtype, **case.sizes)
        held = sum(t.nbytes for t in _tensors(first))
        sets = sets_past_cache(min(work.moved, held), device, held)
        inputs = [first, *(bench.inputs(dtype, **case.sizes) for _ in range(sets - 1))]

    limit = limit_of(work, sets, dtype, device)
    contenders: dict[str, Contender] = {f"limit {i}": way for i, way in enumerate(limit.ways)}
    for name, function in _agreeing(bench, first, dtype):
        contenders[name] = lambda i, function=function: function(*inputs[i])
    seconds = seconds_per_call(contenders, sets, device, bench.called)
    if "pyllama" not in seconds:
        raise RuntimeError("pyllama's op failed")
    row = row_of(bench.op, case, work, limit.amount, seconds)
    results.add(**row, dtype=_name(dtype), implementation=bench.implementation(device))
    return results.rows[-1]


def limit_of(work: Work, sets: int, dtype: torch.dtype, device: str) -> limits.Limit:
    if work.limit == "product":
        return limits.product(dtype, device)
    return {"read": limits.read, "copy": limits.copy}[work.limit](work.moved, sets, device)


def row_of(op: str, case: Case, work: Work, limit_amount: int, seconds: Mapping[str, float]) -> dict[str, Any]:
    """The row of measured times: `limit ...` of the limit's ways, and the contenders', pyllama's among them.

    of_limit is pyllama's share of the limit; x_torch, x_compile and x_peer how many times as long the other takes.
    """
    ours = seconds["pyllama"]
    amount, scale, unit = (
        (work.flops, 1e12, "TFLOP/s") if work.limit == "product" else (work.moved, 1e9, "GB/s")
    )  # fmt: skip
    limit = limit_amount / min(time for name, time in seconds.items() if name.startswith("limit"))
    others = {name: time for name, time in seconds.items() if name != "pyllama" and not name.startswith("limit")}
    peer = min((name for name in others if name not in ("torch", "compile")), key=others.__getitem__, default=None)

    def times(name: str | None) -> float | None:
        return round(others[name] / ours, 2) if name in others else None

    return {
        "op": op,
        "model": case.model,
        "case": case.what,
        "us": round(ours * 1e6, 2),
        "rate": _digits(amount / ours / scale),
        "unit": unit,
        "limit": work.limit,
        "of_limit": round(amount / ours / limit, 3),
        "x_torch": times("torch"),
        "x_compile": times("compile"),
        "peer": peer,
        "x_peer": times(peer),
        "limit_rate": _digits(limit / scale),
        "work": {"moved": work.moved, "flops": work.flops},
        "sizes": dict(case.sizes),
        "contenders_us": {name: round(time * 1e6, 2) for name, time in others.items()},
    }


def check_of(bench: Bench, inputs: tuple[Any, ...], dtype: torch.dtype) -> Callable[[Any], None]:
    """A function that raises ValueError for a result that is not right on these inputs."""
    if (right := bench.right) is not None:

        def judge(result: Any) -> None:
            found = right(result, *inputs)
            if not found.all():
                raise ValueError(f"its result is wrong in {int((~found).sum())} of {found.numel()} places")

        return judge

    reference = bench.reference or (lambda *args: bench.formula(*_copied(args, torch.float64)))
    expected = _tensors(reference(*inputs))

    def compare(result: Any) -> None:
        if not (off := _error(_tensors(result), expected)) <= TOLERANCE[dtype]:
            raise ValueError(f"its result is off by {off:.1e} of the largest value")

    return compare


def _agreeing(bench: Bench, inputs: tuple[Any, ...], dtype: torch.dtype) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The contenders by name, with those peers that are installed, whose results are right.

    Of the others a line says why they are left out, which may be another library's fault or too little memory.
    """
    check = check_of(bench, inputs, dtype)
    for name, find in _contenders(bench, inputs).items():
        try:
            if (function := find()) is None:
                continue
            check(function(*(_copied(inputs) if bench.mutates else inputs)))
        except Exception as error:
            say(f"{name}: {reason(error)}")
            continue
        yield name, function


def _contenders(bench: Bench, inputs: tuple[Any, ...]) -> dict[str, Callable[[], Callable[..., Any] | None]]:
    """By name, functions that find the function to be measured, or None."""

    def installed(peer: Peer) -> Callable[..., Any] | None:
        try:
            found = peer.find()
        except ImportError:  # which the run has said
            return None
        if peer.prepare:
            found = peer.prepare(found, *inputs)
        return None if found is None else lambda *args: peer.call(found, *args)

    torch._dynamo.reset()
    return {
        "pyllama": lambda: bench.pyllama,
        "torch": lambda: bench.torch or bench.formula,
        "compile": lambda: torch.compile(bench.formula, dynamic=False),
    } | {
        name: lambda peer=peer: installed(peer) if isinstance(peer, Peer) else peer
        for name, peer in bench.peers.items()
    }


def _error(result: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, as a share of the largest expected value; of the last rows where only they are."""
    errors = []
    for got, wanted in zip(result, expected, strict=True):
        last = got[-len(wanted) :].double()
        if last.shape != wanted.shape:
            raise ValueError(f"its result has shape {list(got.shape)}, but {list(wanted.shape)} is expected at its end")
        errors.append(((last - wanted).abs().max() / wanted.abs().max()).item())
    return max(errors)


def missing_peers(bench: Bench) -> list[str]:
    """The names of the peers that are not installed."""
    missing = []
    for name, peer in bench.peers.items():
        if isinstance(peer, Peer):
            try:
                peer.find()
            except ImportError:
                missing.append(name)
    return missing


def short(models: str) -> str:
    """The first of several models, and how many more."""
    first, *more = models.split(", ")
    return f"{first} +{len(more)}" if more else first


def _copied(inputs: tuple[Any, ...], dtype: torch.dtype | None = None) -> list[Any]:
    """The inputs in memory of their own, floating-point ones in the data type."""

    def copied(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(dtype) if dtype and x.is_floating_point() else x.clone()

    return [copied(x) for x in inputs]


def _tensors(x: Any) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else [t for t in x if isinstance(t, Tensor)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digits(value: float) -> float:
    """Rounded to three digits, without decimals from 100 on."""
    return float(f"{value:.3g}") if value < 100 else round(value)
