"""How an op enters torch's dispatcher: one decorator for schema, checks, eager body, fake and autograd.

    @op("(Tensor x, Tensor weight, float eps) -> Tensor", x="... D", weight="D")
    def rms_norm(x, weight, eps): ...

defines `torch.ops.pyllama.rms_norm` and replaces the function by a call of it. The body is the op's implementation on
every device (`CompositeExplicitAutograd`) until a compiled kernel is registered for that device's dispatch key.

Gradients come from a second op, `pyllama::rms_norm_backward`, whose body runs the eager body again under autograd,
wherever the forward ran, unless `op` is given a backward written by hand. It is an op of its own so that tracers see
one node and never a body that reads values.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from pyllama import _C
from pyllama.ops.checks import argument_check

P = ParamSpec("P")
R = TypeVar("R")

_library = torch.library.Library("pyllama", "FRAGMENT")


@dataclass(frozen=True)
class Op:
    """What is known of a registered op."""

    function: Callable[..., Any]  # what `pyllama.ops.<name>` is
    overload: torch._ops.OpOverload  # what it calls
    differentiable: bool  # it has a backward

    @property
    def mutates(self) -> bool:
        return self.overload._schema.is_mutable


OPS: dict[str, Op] = {}  # by name, filled when pyllama.ops imports its modules


def op(
    schema: str,
    *,
    fake: Callable[..., Any] | None = None,
    backward: Callable[..., list[Tensor]] | None = None,
    differentiable: bool = True,
    **shapes: str,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register the decorated function as the eager body of the op of its name.

    schema: arguments and results, as in torch.library.Library.define. shapes: the specification of each tensor
    argument (checks.py). fake: makes empty results, needed where the body reads tensors' values; otherwise the body
    itself runs on fake tensors. backward: (*arguments, grads, wanted) -> gradients, as _register_backward says, where
    recomputation does more than is needed. Ops that write into arguments end in `_`, return nothing and have no
    gradient; differentiable=False is for results that are indices.
    """

    def register(body: Callable[P, R]) -> Callable[P, R]:
        name = body.__name__
        _library.define(name + schema)
        body = _without_autocast(body)
        overload = getattr(torch.ops.pyllama, name).default
        check = argument_check(name, [argument.name for argument in overload._schema.arguments], shapes)

        def checked(implementation: Callable[..., Any]) -> Callable[..., Any]:
            def kernel(*args: Any) -> Any:
                check(args)
                return implementation(*args)

            return kernel

        _library.impl(name, checked(body), "CompositeExplicitAutograd")
        torch.library.register_fake(overload, checked(fake or body), lib=_library)
        mutates = overload._schema.is_mutable
        if mutates:
            _refuse_gradients(overload, "it writes in place: use torch.no_grad() or torch.inference_mode()")
            _count_versions(overload)
        elif differentiable:
            _register_backward(overload, body, schema, backward)

        @functools.wraps(body)
        def function(*args: P.args, **kwargs: P.kwargs) -> R:
            return overload(*args, **kwargs)

        OPS[name] = Op(function, overload, differentiable and not mutates)
        return function

    return register


def nothing(*args: object) -> None:
    """The fake of an op that returns nothing."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """What eager bodies compute in: float32, or x's own type where that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), but at no cost where nothing is to be done."""
    return x if x.dtype is dtype else x.to(dtype)


def implementation(name: str, device: torch.device | str) -> str:
    """Which implementation serves the op on the device: "cuda", "emulated" (a CUDA kernel on the CPU) or "eager".

    Raises KeyError for an unknown op.
    """
    kind, op_name = torch.device(device).type, OPS[name].overload.name()
    kernels = {"cuda": "cuda", "cpu": "emulated"}
    compiled = kind in kernels and torch._C._dispatch_has_kernel_for_dispatch_key(op_name, kind.upper())
    return kernels[kind] if compiled else "eager"


@contextmanager
def eager() -> Iterator[None]:
    """Inside, every op runs its eager body; compiled kernels are back afterwards. It holds for the whole process."""
    keys = _C.enabled()
    for key in keys:
        _C.disable(key)
    try:
        yield
    finally:
        for key in keys:
            _C.enable(key)


def _without_autocast(body: Callable[P, R]) -> Callable[P, R]:
    """The body with autocast off: what an op computes in is its own affair, as it is a compiled kernel's."""

    @functools.wraps(body)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch._C._is_any_autocast_enabled():
            kind = args[0].device.type  # type: ignore[attr-defined]  # a tensor, as every op's first argument
            if torch.amp.is_autocast_available(kind):
                with torch.autocast(kind, enabled=False):
                    return body(*args, **kwargs)
        return body(*args, **kwargs)

    return run


def _refuse_gradients(overload: torch._ops.OpOverload, way_out: str) -> None:
    """An autograd kernel that raises where a gradient would be due, and else steps aside."""

    def autograd(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            raise RuntimeError(f"{overload._schema.name} has no gradient, since {way_out}")
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    _library.impl(overload._schema.name.split("::")[1], autograd, "Autograd", with_keyset=True)


def _count_versions(overload: torch._ops.OpOverload) -> None:
    """Tells autograd of writes, so that a backward that needs the old value raises instead of using the new one."""
    written = [i for i, a in enumerate(overload._schema.arguments) if a.alias_info and a.alias_info.is_write]

    def count(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        increment_version([args[i] for i in written if not args[i].is_inference()])
        return overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    _library.impl(overload._schema.name.split("::")[1], count, "ADInplaceOrView", with_keyset=True)


def _register_backward(
    overload: torch._ops.OpOverload,
    body: Callable[..., Any],
    schema: str,
    by_hand: Callable[..., list[Tensor]] | None,
) -> None:
    """Defines `<op>_backward(<the op's arguments>, Tensor[] grads, int[] wanted) -> Tensor[]` and ties it to the op.

    grads: gradients of the floating-point results; wanted: which arguments' gradients to return, contiguous and in
    memory of their own.
    """
    name = body.__name__ + "_backward"
    arguments = re.sub(r"=[^,)]*", "", schema[schema.index("(") + 1 : schema.rindex(") ->")])
    _library.define(f"{name}({arguments}, Tensor[] grads, int[] wanted) -> Tensor[]")
    backward_op = getattr(torch.ops.pyllama, name).default

    def recompute(*args: Any) -> list[Tensor]:
        *inputs, grads, wanted = args
        with _autograd_alive(), torch.enable_grad():
            for i in wanted:
                inputs[i] = inputs[i].detach().requires_grad_()
            leaves = [inputs[i] for i in wanted]
            outputs = _floating(body(*inputs))
            due = [i for i, output in enumerate(outputs) if output.requires_grad]
            found = torch.autograd.grad(
                [outputs[i] for i in due], leaves, [grads[i] for i in due], allow_unused=True, materialize_grads=True
            )
        return [_own(grad, grads) for grad in found]

    def empty(*args: Any) -> list[Tensor]:
        return [torch.empty_like(args[i], memory_format=torch.contiguous_format) for i in args[-1]]

    _library.impl(name, _without_autocast(by_hand or recompute), "CompositeExplicitAutograd")
    torch.library.register_fake(backward_op, empty, lib=_library)
    _refuse_gradients(backward_op, f"{body.__name__} is differentiable once")

    tensors = [i for i, a in enumerate(overload._schema.arguments) if "Tensor" in str(a.type)]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(inputs[i] for i in tensors))
        ctx.others = [None if i in tensors else value for i, value in enumerate(inputs)]
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.floating = [tensor.is_floating_point() for tensor in outputs]
        ctx.mark_non_differentiable(*(t for t in outputs if not t.is_floating_point()))

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = list(ctx.others)
        for i, tensor in zip(tensors, ctx.saved_tensors, strict=True):
            inputs[i] = tensor
        # The dispatcher leaves out trailing arguments that equal their defaults.
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        given = [grad for grad, floating in zip(grads, ctx.floating, strict=True) if floating]
        found = dict(zip(wanted, backward_op(*inputs, given, wanted), strict=True))
        return tuple(found.get(i) for i in range(len(ctx.needs_input_grad)))

    torch.library.register_autograd(overload, backward, setup_context=setup_context, lib=_library)


def _floating(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    tensors = result if isinstance(result, tuple) else (result,)
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def _own(grad: Tensor, given: Sequence[Tensor]) -> Tensor:
    """The gradient in memory of its own: an op's result may not share memory with its arguments."""
    grad = grad.contiguous()
    shared = any(grad.untyped_storage()._cdata == other.untyped_storage()._cdata for other in given)
    return grad.clone() if shared else grad


with torch._C._AutoDispatchBelowAutograd():
    _below_autograd = torch._C._dispatch_tls_local_exclude_set()
_AUTOGRAD_KEYS = _below_autograd - torch._C._dispatch_tls_local_exclude_set()


def _autograd_alive() -> Any:
    """A guard under which autograd records again, inside a kernel that runs below it."""
    included = torch._C._dispatch_tls_local_include_set()
    return torch._C._ForceDispatchKeyGuard(included, torch._C._dispatch_tls_local_exclude_set() - _AUTOGRAD_KEYS)
