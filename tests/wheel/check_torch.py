"""Installs a wheel into a fresh environment per version of torch, runs CPU ops and the demo there, and builds there.

    python tests/wheel/check_torch.py dist/wheel/pyllama-0.1.0-....whl 2.10.0 2.13.0 newest

torch comes as a CPU build where pip finds one, else as the CUDA build with its libraries (7 GB). The environments stay
in build/torch-<version>, so that the next time only the wheel is installed.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD_TOOLS = ("scikit-build-core", "pybind11", "cmake", "ninja")


def run(*command: str | Path, **options: object) -> bool:
    return subprocess.run(command, **options).returncode == 0


def environment(version: str) -> Path:
    """The Python of an environment with that torch."""
    folder = ROOT / "build" / f"torch-{version}"
    python = folder / "bin" / "python"
    done = folder / "installed"
    if version == "newest" or not done.exists():
        run(sys.executable, "-m", "venv", folder, check=True)
        install = [python, "-m", "pip", "install", "--quiet", "--upgrade"]
        wanted = "torch" if version == "newest" else f"torch=={version}"
        if version == "newest" or not run(*install, f"{wanted}+cpu", stderr=subprocess.DEVNULL):
            run(*install, wanted, check=True)
        done.touch()
    return python


def check(wheel: Path, version: str) -> bool:
    python = environment(version)
    pip = [python, "-m", "pip", "install", "--quiet"]
    run(*pip, wheel, check=True)
    run(*pip, "--force-reinstall", "--no-deps", wheel, check=True)
    return run(python, ROOT / "tests" / "wheel" / "smoke.py")


if __name__ == "__main__":
    wheel, *versions = sys.argv[1:]
    failed = [version for version in versions if not check(Path(wheel).resolve(), version)]
    sys.exit(f"failed under torch {', '.join(failed)}" if failed else 0)
