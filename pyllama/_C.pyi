"""The compiled extension: what this build holds, and switching its kernels on and off (csrc/module.cpp)."""

version: str
cuda_version: str | None
"""Major and minor version of the CUDA toolkit, e.g. "13.0"; None: built without nvcc, hence without kernels."""
architectures: tuple[str, ...]
"""What the kernels were compiled for: machine code ("sm_80", "sm_90a") and PTX ("compute_80")."""
ops: tuple[str, ...]
"""Names of the ops that have a compiled kernel."""

def supports(major: int, minor: int) -> bool:
    """Whether the build's kernels run on GPUs of this compute capability."""

def enable(key: str) -> None:
    """Register the kernels with torch for the tensors of a dispatch key, "CUDA"; again is nothing.

    ("CPU": where kernels were compiled for the CPU.) Raises ValueError where the build has none for the key.
    The ops' schemas must be defined by then.
    """

def disable(key: str) -> None:
    """Remove what `enable` registered, so that the eager bodies serve the key's tensors; again is nothing."""

def enabled() -> tuple[str, ...]:
    """The dispatch keys that are enabled."""
