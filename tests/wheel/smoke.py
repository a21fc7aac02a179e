"""What has to work wherever the wheel is installed: an op, the kernels' registration, the demo on every device."""

import torch

import pyllama
from pyllama import _C

x, weight = torch.randn(3, 5, 64), torch.randn(64)
expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
torch.testing.assert_close(torch.ops.pyllama.rms_norm(x, weight, 1e-5), expected.float())

for op in _C.ops:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pyllama::{op}", "CUDA"), op

devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
models = [pyllama.load("demo", device=device, dtype="float32") for device in devices]
tokens = [pyllama.generate(model, "The", max_new_tokens=16).token_ids for model in models]
assert len(tokens[0]) > 1, tokens
assert tokens.count(tokens[0]) == len(tokens), tokens
build = f"CUDA {_C.cuda_version} for {', '.join(_C.architectures)}" if _C.ops else "without kernels"
print(f"torch {torch.__version__}: pyllama {pyllama.__version__}, {build}, works on {', '.join(devices)}")
