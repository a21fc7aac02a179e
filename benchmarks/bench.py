"""What a benchmark of an op consists of, and the runner that makes a row of a case.

Each `benchmarks/ops/bench_<op>.py` defines `BENCH = Bench(...)`: the cases it takes from a `Scope` (shapes.py), how to
make inputs of given sizes, the work of a call, and the contenders. Everything else is here, once: inputs rotated past
the cache, contenders in turns, the device's limit measured among them, results compared, the row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import limits, ops
from benchmarks.results import Results
from benchmarks.shapes import Scope
from benchmarks.timing import Contender, seconds_per_call, sets_past_cache
from pyllama.ops import implementation

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of the largest expected value


class Case(NamedTuple):
    """One row: which model has these sizes, what they are in words, and the sizes by name."""

    model: str
    what: str
    sizes: Mapping[str, int]


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
    there, *inputs) -> what `call` gets in its place; the time of it does not count.
    """

    path: str
    call: Callable[..., Any]
    prepare: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Bench:
    """The benchmark of one op. All functions but `cases` and `work` take one set of inputs, as `inputs` gives it.

    cases: the rows of a scope; equal sizes become one row. inputs: (dtype, **sizes) -> one set of inputs, on torch's
    default device. work: (dtype, **sizes). pyllama: calls the op and gives its result, or what it wrote in place.
    formula: the same in plain torch, which `torch.compile` gets, and the reference where there is no other; it must
    not write into its inputs. torch: the best that eager torch has; None: the formula. peers: by name, a `Peer` or a
    function of torch's own. reference: what the result must be close to, given inputs in float64; it may be the last
    rows only. checked: False where results may rightly differ (samples).
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
    checked: bool = True


def benches() -> dict[str, Bench]:
    """By name of the file, as there are in benchmarks/ops."""
    names = [module.name for module in iter_modules(ops.__path__) if module.name.startswith("bench_")]
    return {name.removeprefix("bench_"): import_module(f"benchmarks.ops.{name}").BENCH for name in names}


def merged(cases: Iterable[Case]) -> Iterator[Case]:
    """One case for all of equal sizes, which names all their models."""
    same: dict[tuple[tuple[str, int], ...], list[Case]] = {}
    for case in cases:
        same.setdefault(tuple(sorted(case.sizes.items())), []).append(case)
    for group in same.values():
        models = ", ".join(dict.fromkeys(case.model for case in group))
        yield group[0]._replace(model=models)


def measure(bench: Bench, case: Case, dtype: torch.dtype, device: str, results: Results) -> dict[str, Any] | None:
    """Times all contenders on one case and adds the row to the results. None where pyllama's op failed."""
    torch.manual_seed(0)
    work = bench.work(dtype, **case.sizes)
    with torch.device(device):
        first = bench.inputs(dtype, **case.sizes)
        sets = sets_past_cache(sum(t.nbytes for t in _tensors(first)), device)
        inputs = [first, *(bench.inputs(dtype, **case.sizes) for _ in range(sets - 1))]

    functions = {}
    for name, function in _functions(bench, first):
        if not bench.checked or _agrees(bench, name, function, first, dtype):
            functions[name] = function
    contenders: dict[str, Contender] = {
        name: lambda i, function=function: function(*inputs[i]) for name, function in functions.items()
    }
    limit = limit_of(work, sets, dtype, device)
    contenders |= {f"limit {i}": way for i, way in enumerate(limit.ways)}
    seconds = seconds_per_call(contenders, sets, device)
    if "pyllama" not in seconds:
        return None
    row = row_of(bench.op, case, work, limit.amount, seconds)
    results.add(**row, dtype=_name(dtype), implementation=implementation(bench.op, device))
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
        "moved": work.moved,
        "flops": work.flops,
        "sizes": dict(case.sizes),
        "contenders_us": {name: round(time * 1e6, 2) for name, time in others.items()},
    }


def _functions(bench: Bench, inputs: tuple[Any, ...]) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The contenders by name, with those peers that are installed."""
    torch._dynamo.reset()
    yield "pyllama", bench.pyllama
    yield "torch", bench.torch or bench.formula
    yield "compile", torch.compile(bench.formula, dynamic=False)
    for name, peer in bench.peers.items():
        if not isinstance(peer, Peer):
            yield name, peer
            continue
        module, _, attribute = peer.path.partition(":")
        try:
            found = getattr(import_module(module), attribute)
            found = peer.prepare(found, *inputs) if peer.prepare else found
        except ImportError:  # not installed, which the run has said
            continue
        except Exception as error:  # another library's
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            continue
        yield name, lambda *args, found=found, call=peer.call: call(found, *args)


def _agrees(bench: Bench, name: str, function: Callable[..., Any], inputs: tuple[Any, ...], dtype: torch.dtype) -> bool:
    """Whether the result is close to the reference; says so if not, or if there is none."""
    reference = bench.reference or bench.formula
    try:
        result = _tensors(function(*_copied(inputs)))
        expected = _tensors(reference(*_copied(inputs, torch.float64)))
        error = 0.0
        for got, wanted in zip(result, expected, strict=True):
            off = (got[-len(wanted) :].double() - wanted).abs().max() / wanted.abs().max()
            error = max(error, off.item())
    except Exception as error_:  # another library's, or out of memory
        print(f"{name}: {type(error_).__name__}: {str(error_).splitlines()[0] if str(error_) else ''}", flush=True)
        return False
    if not error <= TOLERANCE[dtype]:
        print(f"{name}: its result is off by {error:.1e} of the largest value, so it is left out", flush=True)
        return False
    return True


def missing_peers(bench: Bench) -> list[str]:
    """The names of the peers that are not installed."""
    missing = []
    for name, peer in bench.peers.items():
        if isinstance(peer, Peer):
            try:
                import_module(peer.path.partition(":")[0])
            except Exception:  # a library that cannot be imported here
                missing.append(name)
    return missing


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
