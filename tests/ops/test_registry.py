"""What holds for every op, whatever it computes. Each op's test file gives its `examples(dtype)` of arguments."""

import copy
import inspect
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils.checkpoint import checkpoint

import pyllama.ops
from pyllama import _C
from pyllama.ops.add_rms_norm import add_rms_norm_
from pyllama.ops.registry import OPS, Op, eager, implementation
from pyllama.ops.rms_norm import rms_norm
from pyllama.ops.swiglu import swiglu


def examples(name: str, dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> list[tuple[Any, ...]]:
    """Each example of arguments; with requires_grad, the tensors of the dtype want a gradient."""
    torch.manual_seed(0)
    given = list(import_module(f"test_{name.rstrip('_')}").examples(dtype))
    if requires_grad:
        given = [
            tuple(a.requires_grad_() if isinstance(a, Tensor) and a.dtype is dtype else a for a in args)
            for args in given
        ]
    return given


every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
every_differentiable = pytest.mark.parametrize(
    "op", [op for op in OPS.values() if op.differentiable], ids=[name for name, op in OPS.items() if op.differentiable]
)
every_in_place = pytest.mark.parametrize(
    "op", [op for op in OPS.values() if op.mutates], ids=[name for name, op in OPS.items() if op.mutates]
)


def name_of(op: Op) -> str:
    return op.function.__name__


def loss(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A scalar whose gradient differs from element to element."""
    results = [x for x in (result if isinstance(result, tuple) else (result,)) if x.is_floating_point()]
    return sum(((x * torch.linspace(0.5, 1.5, x.numel()).view(x.shape).to(x)).sum() for x in results), torch.zeros(()))


def tensors(args: tuple[Any, ...]) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor)]


def gradients(function: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    wanted = [a for a in tensors(args) if a.requires_grad]
    return list(torch.autograd.grad(loss(function(*args)), wanted))


def test_the_ops_are_found() -> None:
    assert set(OPS) >= {"rms_norm", "add_rms_norm_", "paged_attention", "sample"}
    for name, op in OPS.items():
        assert getattr(pyllama.ops, name) is op.function
        assert getattr(torch.ops.pyllama, name).default is op.overload


@every_op
def test_form(op: Op) -> None:
    """One signature in Python and in the schema, at most twelve arguments, a docstring, `_` iff it writes in place."""
    schema, signature = op.overload._schema, inspect.signature(op.function)
    assert [a.name for a in schema.arguments] == list(signature.parameters)
    for argument, parameter in zip(schema.arguments, signature.parameters.values(), strict=True):
        assert argument.has_default_value() == (parameter.default is not inspect.Parameter.empty)
        if argument.has_default_value():
            assert argument.default_value == parameter.default
    assert len(schema.arguments) <= 12
    assert "Raises" in inspect.getdoc(op.function) or "raises" in inspect.getdoc(op.function)
    assert name_of(op).endswith("_") == op.mutates == (len(schema.returns) == 0)


@every_op
def test_opcheck(op: Op) -> None:
    for args in examples(name_of(op)):
        torch.library.opcheck(op.overload, args)
    if op.differentiable:
        for args in examples(name_of(op), requires_grad=True):
            torch.library.opcheck(op.overload, args)


@every_op
def test_compile(op: Op) -> None:
    """fullgraph=True, without gradients: the same results, and the same writes into arguments."""
    torch.compiler.reset()
    compiled = torch.compile(lambda *args: op.function(*args), fullgraph=True, backend="aot_eager")
    for args in examples(name_of(op)):
        others = copy.deepcopy(args)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*args), op.function(*others))
        torch.testing.assert_close(tensors(args), tensors(others))


@every_differentiable
def test_compiled_gradients(op: Op) -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda *args: op.function(*args), fullgraph=True, backend="aot_eager")
    for args in examples(name_of(op), requires_grad=True):
        torch.testing.assert_close(gradients(compiled, args), gradients(op.function, args))


@every_differentiable
def test_gradients(op: Op) -> None:
    """Against finite differences in float64; every input of a floating-point type has one."""
    for args in examples(name_of(op), torch.float64, requires_grad=True):
        assert torch.autograd.gradcheck(op.function, args)


@every_differentiable
def test_gradients_of_some_inputs(op: Op) -> None:
    """Each input alone, and with activation checkpointing, has the gradient it has among all."""
    for args in examples(name_of(op), requires_grad=True):
        wanted = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad]
        together = gradients(op.function, args)
        torch.testing.assert_close(
            gradients(lambda *args: checkpoint(op.function, *args, use_reentrant=False), args), together
        )
        for i, expected in zip(wanted, together, strict=True):
            alone = tuple(a.detach() if isinstance(a, Tensor) and j != i else a for j, a in enumerate(args))
            results = op.function(*alone)
            if not loss(results).requires_grad:
                assert not expected.any()
                continue
            torch.testing.assert_close(torch.autograd.grad(loss(results), alone[i])[0], expected)


@every_differentiable
def test_integer_results_have_no_gradient(op: Op) -> None:
    for args in examples(name_of(op), requires_grad=True):
        results = op.function(*args)
        for result in results if isinstance(results, tuple) else (results,):
            assert result.requires_grad == result.is_floating_point()


@every_differentiable
def test_a_second_derivative_is_refused(op: Op) -> None:
    args = examples(name_of(op), requires_grad=True)[0]
    wanted = next(a for a in tensors(args) if a.requires_grad)
    with pytest.raises(RuntimeError, match=f"{name_of(op)} is differentiable once"):
        torch.autograd.grad(loss(op.function(*args)), wanted, create_graph=True)


@every_in_place
def test_in_place_ops_refuse_gradients(op: Op) -> None:
    floating = [i for i, a in enumerate(examples(name_of(op))[-1]) if isinstance(a, Tensor) and a.is_floating_point()]
    for i in floating:
        args = list(examples(name_of(op))[-1])
        args[i].requires_grad_()
        with pytest.raises(RuntimeError, match=f"{name_of(op)} .*torch.no_grad"):
            op.function(*args)
        before = [a.clone() if isinstance(a, Tensor) else a for a in args]
        with torch.no_grad():
            op.function(*args)
        assert any(isinstance(a, Tensor) and not torch.equal(a, b) for a, b in zip(args, before, strict=True))


@every_op
def test_inference_mode(op: Op) -> None:
    args = examples(name_of(op))[0]
    others = copy.deepcopy(args)
    with torch.inference_mode():
        results = op.function(*args)
    torch.testing.assert_close(results, op.function(*others))
    torch.testing.assert_close(tensors(args), tensors(others))


@every_op
def test_shapes_without_values(op: Op) -> None:
    """On meta tensors, results have the shapes, dtypes and strides of the real ones."""
    for args in examples(name_of(op)):
        fakes = op.function(*(a.to("meta") if isinstance(a, Tensor) else a for a in args))
        results = op.function(*args)
        if op.mutates:
            assert fakes is None
            continue
        pairs = zip(fakes, results, strict=True) if isinstance(results, tuple) else [(fakes, results)]
        for fake, result in pairs:
            assert (fake.shape, fake.dtype, fake.stride()) == (result.shape, result.dtype, result.stride())


@every_op
def test_tensors_on_different_devices_are_refused(op: Op) -> None:
    args = list(examples(name_of(op))[0])
    names = [argument.name for argument in op.overload._schema.arguments]
    for i in [i for i, a in enumerate(args) if isinstance(a, Tensor)][1:]:
        moved = [a.to("meta") if j == i else a for j, a in enumerate(args)]
        with pytest.raises(ValueError, match=f"{name_of(op)}: {names[i]} is on meta, but {names[0]} is on cpu"):
            op.function(*moved)


@every_op
def test_autocast_changes_nothing(op: Op) -> None:
    """Ops compute as they say, called and traced."""
    for args in examples(name_of(op)):
        others = copy.deepcopy(args)
        expected = op.function(*args)
        with torch.autocast("cpu", torch.bfloat16):
            found = op.function(*others)
            fakes = op.function(*(a.to("meta") if isinstance(a, Tensor) else a for a in args))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        torch.testing.assert_close(tensors(others), tensors(args), rtol=0, atol=0)
        pairs = zip(fakes, expected, strict=True) if isinstance(expected, tuple) else [(fakes, expected)]
        assert op.mutates or all(fake.dtype is result.dtype for fake, result in pairs)


@every_differentiable
def test_autocast_changes_no_gradient(op: Op) -> None:
    for args in examples(name_of(op), requires_grad=True):
        expected = gradients(op.function, args)
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients(op.function, args)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_traces_show_ops_and_not_their_bodies() -> None:
    nodes: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nodes.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    compiled = torch.compile(rms_norm, fullgraph=True, backend=aot_autograd(fw_compiler=backend))
    x, weight = torch.randn(2, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    compiled(x, weight, 1e-6).sum().backward()
    assert "pyllama.rms_norm.default" in nodes
    assert "pyllama.rms_norm_backward.default" in nodes
    assert not any("rsqrt" in node or "mean" in node for node in nodes)


@pytest.mark.nightly
def test_inductor() -> None:
    """The whole of torch.compile, over ops that make, and an op that writes."""

    def block(x: Tensor, weight: Tensor) -> Tensor:
        return swiglu(rms_norm(x, weight, 1e-6) * 2)

    def decode(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        x, residual = x + 1, residual * 2
        add_rms_norm_(x, residual, weight, 1e-6)
        return x + residual

    x, weight = torch.randn(4, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    torch.testing.assert_close(
        gradients(torch.compile(block, fullgraph=True), (x, weight)), gradients(block, (x, weight))
    )
    x, weight = x.detach(), weight.detach()
    torch.testing.assert_close(torch.compile(decode, fullgraph=True)(x, x, weight), decode(x, x, weight))


@pytest.fixture
def other_kernels() -> Iterator[None]:
    """Kernels for the CPU that know nothing of torch's operators, as compiled ones do."""

    def doubled(x: Tensor) -> Tensor:
        return torch.from_numpy(2 * x.numpy()[..., ::2])

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
        x.numpy()[:], residual.numpy()[:] = 1.0, 2.0

    library = torch.library.Library("pyllama", "IMPL")
    library.impl("swiglu", doubled, "CPU")
    library.impl("add_rms_norm_", add_rms_norm, "CPU")
    yield
    library._destroy()


def test_implementation(other_kernels: None) -> None:
    assert implementation("swiglu", "cpu") == "emulated"
    assert implementation("swiglu", torch.device("cpu")) == "emulated"
    assert implementation("rms_norm", "cpu") == "eager"
    assert implementation("rms_norm", "cuda:1") == ("cuda" if "rms_norm" in _C.ops else "eager")
    with pytest.raises(KeyError, match="no_such_op"):
        implementation("no_such_op", "cpu")
    x = torch.arange(4.0)
    assert swiglu(x).tolist() == [0.0, 4.0]


def test_gradients_do_not_depend_on_where_the_forward_ran(other_kernels: None) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    out = swiglu(x)
    assert torch.equal(out, 2 * x[:, ::2])
    reference = x.detach().clone().requires_grad_()
    gate, up = reference.chunk(2, dim=-1)
    (torch.nn.functional.silu(gate) * up).sum().backward()
    out.sum().backward()
    torch.testing.assert_close(x.grad, reference.grad)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_autograd_sees_the_writes_of_kernels(mode: Callable[[], Any], other_kernels: None) -> None:
    """A backward that needs the overwritten value raises, instead of using the new one."""
    x, weight = torch.randn(2, 8), torch.randn(8, requires_grad=True)
    out = x * weight  # keeps x
    with mode():
        add_rms_norm_(x, torch.zeros(2, 8), weight, 1e-6)
    assert x.eq(1).all()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_eager_puts_compiled_kernels_aside() -> None:
    before = _C.enabled()
    with eager():
        assert _C.enabled() == ()
        assert {implementation(name, device) for name in OPS for device in ("cpu", "cuda")} == {"eager"}
        with eager():
            pass
        assert _C.enabled() == ()
    assert _C.enabled() == before
    with pytest.raises(ZeroDivisionError), eager():
        1 / 0  # noqa: B018
    assert _C.enabled() == before
