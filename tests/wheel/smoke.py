"""What has to work wherever the wheel is installed: an op, the kernels' registration, the demo on every device."""

import torch

import pyllama
from pyllama import _C
from pyllama.inspection import inspect
from pyllama.inspection.page import render
from pyllama.ops.product import product

x, weight = torch.randn(3, 5, 64), torch.randn(64)
expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
torch.testing.assert_close(torch.ops.pyllama.rms_norm(x, weight, 1e-5), expected.float())


def gated(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return gate * gate.sigmoid() * up


def normalised(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


# Gradients, as they are, in autocast and compiled: the registration of ops uses parts of torch that are not public.
for op_of, formula, inputs in (
    (torch.ops.pyllama.swiglu, gated, (x,)),
    (lambda x, weight: torch.ops.pyllama.rms_norm(x, weight, 1e-5), normalised, (x, weight)),
):
    wide = [tensor.double().requires_grad_() for tensor in inputs]
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    expected = torch.autograd.grad(formula(*wide).square().sum(), wide)
    for function in (op_of, torch.compile(op_of, fullgraph=True, backend="aot_eager")):
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found = torch.autograd.grad(function(*leaves).square().sum(), leaves)
            torch.testing.assert_close(found, tuple(grad.float() for grad in expected), rtol=1e-4, atol=1e-4)

# Large products on the CPU go to oneDNN by a way that is not public either.
row, matrix, bias = torch.randn(1, 2048), torch.randn(1024, 2048), torch.randn(1024)
with torch.inference_mode():
    found = product(row, matrix, bias)
torch.testing.assert_close(found, torch.nn.functional.linear(row, matrix, bias), rtol=1e-4, atol=1e-4)

y, total = x.clone(), x.clone()
version = total._version
with torch.no_grad():
    torch.ops.pyllama.add_rms_norm_(y, total, weight, 1e-5)
torch.testing.assert_close(y, normalised(2 * x, weight))
assert total._version > version  # autograd learns of the write

for op in _C.ops:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pyllama::{op}", "CUDA"), op

assert "</html>" in render(inspect("demo"))  # whose template lies beside the code

devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
models = [pyllama.load("demo", device=device, dtype="float32") for device in devices]
tokens = [pyllama.generate(model, "The", max_new_tokens=16).token_ids for model in models]
assert len(tokens[0]) > 1, tokens
assert tokens.count(tokens[0]) == len(tokens), tokens
build = f"CUDA {_C.cuda_version} for {', '.join(_C.architectures)}" if _C.ops else "without kernels"
print(f"torch {torch.__version__}: pyllama {pyllama.__version__}, {build}, works on {', '.join(devices)}")
