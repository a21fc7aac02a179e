"""The ops: `pyllama.ops.<op>` is `torch.ops.pyllama.<op>` with a signature and a docstring.

Every module here but `registry`, `checks` and `product` is one op, named as its file (less a trailing `_`).
Importing the package registers them all and enables the compiled CUDA kernels, without initialising CUDA.
"""

from importlib import import_module
from pkgutil import iter_modules

from pyllama import _C
from pyllama.ops.registry import OPS, eager, implementation

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
globals().update({name: op.function for name, op in OPS.items()})  # over the modules of the same name

if _C.cuda_version is not None:
    _C.enable("CUDA")

__all__ = ["eager", "implementation", *OPS]
