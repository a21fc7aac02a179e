"""The compiled extension: what this build holds, and switching its kernels on and off (csrc/module.cpp)."""

from collections.abc import Callable, Sequence

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

class HostReader:
    """Reads pieces of files into the CPU's memory, by several threads (csrc/reader.h)."""

    def __init__(self, threads: int, chunk: int = 4 << 20) -> None:
        """chunk: the bytes that a thread reads at a time. Raises ValueError unless both are positive."""

    def read(
        self,
        files: Sequence[tuple[int, str]],
        pieces: Sequence[tuple[int, int, int, int, int, int]],
        progress: Callable[[int], object],
    ) -> None:
        """Returns when every byte is in its place.

        files: a descriptor and a name, for errors, each. pieces: the file's index; the offset there, in bytes; the
        address of the place; rows, which lie one after the other in the file; bytes of a row; bytes from one row's
        place to the next one's. progress: is told the bytes read since last time, by the calling thread.

        Raises OSError, with the file's name, where one cannot be read, or ends too early; what `progress` and
        signal handlers raise. Then no thread is left, and the places hold anything.
        """

class DeviceReader:
    """The same into a GPU's memory; only where `cuda_version` is not None.

    Each thread fills pinned buffers in turn, copied asynchronously on a stream of its own (csrc/reader_cuda.h).
    """

    def __init__(self, device: int, stream: int, threads: int, buffers: int = 2, chunk: int = 2 << 20) -> None:
        """stream: the CUDA stream whose work so far is done before a place is written to. buffers: of each thread.
        chunk: bytes of a buffer."""

    def read(
        self,
        files: Sequence[tuple[int, str]],
        pieces: Sequence[tuple[int, int, int, int, int, int]],
        progress: Callable[[int], object],
    ) -> None:
        """As HostReader's; also raises MemoryError where there is no pinned memory, RuntimeError for CUDA's errors."""
