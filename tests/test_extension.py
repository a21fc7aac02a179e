"""pyllama._C: what the build says of itself, kernels on and off, and what the library links."""

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import pyllama
from pyllama import _C

needs_kernels = pytest.mark.skipif(not _C.ops, reason="built without nvcc")


def has_kernel(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"pyllama::{op}", key)


@pytest.fixture
def enabled() -> Iterator[None]:
    """The CUDA kernels are enabled before the test and after it."""
    _C.enable("CUDA")
    yield
    _C.enable("CUDA")


def test_facts() -> None:
    assert _C.version == version("pyllama") == pyllama.__version__
    assert (_C.cuda_version is None) == (_C.ops == ()) == (_C.architectures == ())
    if _C.cuda_version is not None:
        assert re.fullmatch(r"\d+\.\d+", _C.cuda_version)
        assert all(re.fullmatch(r"(sm|compute)_\d+[af]?", name) for name in _C.architectures)
        assert list(_C.ops) == sorted(set(_C.ops))
        assert "rms_norm" in _C.ops


@needs_kernels
def test_every_kernel_belongs_to_an_op() -> None:
    for op in _C.ops:
        assert hasattr(torch.ops.pyllama, op), op


def test_supports_follows_the_architectures() -> None:
    assert not _C.supports(3, 5)
    for name in _C.architectures:
        number = int(re.search(r"\d+", name).group())
        assert _C.supports(number // 10, number % 10)
    ptx = [int(name[8:]) for name in _C.architectures if name.startswith("compute_")]
    assert _C.supports(99, 0) == bool(ptx)  # a GPU that nobody has built runs PTX only
    if "sm_80" in _C.architectures:
        assert _C.supports(8, 9)
        assert not _C.supports(7, 5)
    if "sm_90a" in _C.architectures and not ptx:
        assert not _C.supports(9, 1)
        assert not _C.supports(10, 0)


@needs_kernels
def test_kernels_are_registered_from_the_import_on() -> None:
    assert _C.enabled() == ("CUDA",)
    assert all(has_kernel(op, "CUDA") for op in _C.ops)
    assert not any(has_kernel(op, "CPU") for op in _C.ops)


@needs_kernels
@pytest.mark.usefixtures("enabled")
def test_disable_and_enable() -> None:
    _C.disable("CUDA")
    assert _C.enabled() == ()
    assert not any(has_kernel(op, "CUDA") for op in _C.ops)
    _C.disable("CUDA")  # again is nothing
    for _ in range(3):
        _C.enable("CUDA")
        assert _C.enabled() == ("CUDA",)
    assert all(has_kernel(op, "CUDA") for op in _C.ops)
    _C.disable("CUDA")  # once undoes them all
    assert not any(has_kernel(op, "CUDA") for op in _C.ops)


@needs_kernels
@pytest.mark.usefixtures("enabled")
def test_eager_switches_kernels_off_and_on_again() -> None:
    with pyllama.eager():
        assert not any(has_kernel(op, "CUDA") for op in _C.ops)
    assert all(has_kernel(op, "CUDA") for op in _C.ops)


@pytest.mark.parametrize("key", ["CPU", "XPU", "cuda", "", "AutogradCUDA"])
def test_a_key_without_kernels_raises(key: str) -> None:
    with pytest.raises(ValueError, match=f"no kernels for dispatch key {key}"):
        _C.enable(key)
    assert key not in _C.enabled()


@needs_kernels
def test_cpu_tensors_do_not_meet_cuda_kernels() -> None:
    x, weight = torch.randn(2, 7), torch.randn(7)  # 7: the kernel would refuse it
    assert torch.ops.pyllama.rms_norm(x, weight, 1e-5).shape == x.shape


def test_importing_does_not_initialise_cuda(tmp_path: Path) -> None:
    code = "import torch, pyllama; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_links_torch_and_the_system_only() -> None:
    elffile = pytest.importorskip("elftools.elf.elffile")
    with open(_C.__file__, "rb") as file:
        elf = elffile.ELFFile(file)
        needed = {tag.needed for tag in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")}
        undefined = {
            symbol.name: symbol["st_info"]["bind"]
            for symbol in elf.get_section_by_name(".dynsym").iter_symbols()
            if symbol["st_shndx"] == "SHN_UNDEF"
        }
    assert "libtorch.so" in needed  # in CUDA builds it brings libtorch_cuda.so
    system = r"ld-linux.*|lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s)\.so\.\d+"
    assert not [name for name in needed - {"libtorch.so", "libtorch_cpu.so"} if not re.fullmatch(system, name)]
    assert not [name for name in undefined if re.match(r"cuda[A-Z]|cu[A-Z]", name)]  # cudart is inside, the driver not
    assert not [name for name in undefined if re.match(r"_ZNK?(2at|3c10|5torch)", name)]  # the stable ABI is C
    if _C.ops:
        assert undefined["aoti_torch_get_current_cuda_stream"] == "STB_WEAK"  # torch's CPU builds lack it
