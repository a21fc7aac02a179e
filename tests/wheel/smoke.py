"""What has to work wherever the wheel is installed: the import, an op, the registered kernels, the demo."""

import torch

import pyllama
from pyllama import _C

x, weight = torch.randn(3, 5, 64), torch.randn(64)
expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
torch.testing.assert_close(torch.ops.pyllama.rms_norm(x, weight, 1e-5), expected.float())

for op in _C.ops:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pyllama::{op}", "CUDA"), op

completion = pyllama.generate(pyllama.load("demo", device="cpu"), "The", max_new_tokens=8)
assert completion.text, completion
print(f"torch {torch.__version__}: pyllama {pyllama.__version__}, CUDA {_C.cuda_version}, {_C.architectures}: works")
