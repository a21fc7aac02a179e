"""Checks a wheel file: what its library links, that it is one library, and its size.

    python tests/wheel/check_file.py dist/wheel/pyllama-0.1.0-....whl

Exits with the first complaint.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from elftools.elf.elffile import ELFFile

MAX_BYTES = 100 * 1024 * 1024  # what package indexes accept
SYSTEM = ("libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "libpthread.so.0", "libdl.so.2", "librt.so.1")
TORCH = {"libtorch.so", "libtorch_cpu.so"}


def needed_libraries(library: Path) -> set[str]:
    with library.open("rb") as file:
        dynamic = ELFFile(file).get_section_by_name(".dynamic")
        return {tag.needed for tag in dynamic.iter_tags("DT_NEEDED")}


def check(wheel: Path) -> None:
    size = wheel.stat().st_size
    if size > MAX_BYTES:
        sys.exit(f"{wheel.name} has {size} bytes, more than {MAX_BYTES}")
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        libraries = [path for path in Path(folder).rglob("*.so*") if path.is_file()]
        if [path.name.split(".")[0] for path in libraries] != ["_C"]:
            sys.exit(f"{wheel.name} holds {libraries}, but should hold one library, pyllama/_C")
        needed = needed_libraries(libraries[0])
        if foreign := {name for name in needed - TORCH if not name.startswith(("ld-linux", *SYSTEM))}:
            sys.exit(f"pyllama/_C needs {sorted(foreign)}, but may need torch's and the system's libraries only")
        if "libtorch.so" not in needed:
            sys.exit("pyllama/_C does not need libtorch.so, so it would not find torch's CUDA functions")
        if not (Path(folder) / "pyllama" / "py.typed").exists():
            sys.exit(f"{wheel.name} lacks py.typed")
    print(f"{wheel.name}: {size / 2**20:.1f} MiB, needs {', '.join(sorted(needed))}")
    subprocess.run([sys.executable, "-m", "auditwheel", "show", wheel], check=True)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        check(Path(argument))
