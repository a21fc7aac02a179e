"""The layout's rules: one stem everywhere, who may import whom, what kernels and the package may not contain."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pyllama"
MAX_LINES = 400

# Each part imports parts of earlier lines only, and itself. The extension, _C, is below all of them.
ORDER = [
    {"ops"},
    {"config", "batch"},
    {"cache"},
    {"layers", "integrations"},
    {"files", "progress"},
    {"torch_file"},
    {"checkpoint"},
    {"weights"},
    {"transfer"},
    {"architectures"},
    {"save"},
    {"balance"},
    {"model"},
    {"template"},
    {"tokenizer"},
    {"loader"},
    {"convert"},
    {"graphs"},
    {"sampling"},
    {"text"},
    {"context"},
    {"step"},
    {"generation"},
    {"doctor"},
    {"bench"},
    {"inspection"},
    {"cli"},
]
PARTS = set().union(*ORDER)
# Narrower than the order: plain data, and what reads files, know nothing of ops and models.
ONLY = {
    "config": set(),
    "batch": set(),
    "cache": {"config"},
    "integrations": {"ops"},
    "files": set(),
    "torch_file": {"files"},
    "checkpoint": {"files", "torch_file"},
    "weights": {"files", "checkpoint"},
    "transfer": {"files", "checkpoint", "weights"},
    "architectures": {"config", "files", "weights"},
    "progress": set(),
    "save": {"config", "files", "progress", "checkpoint", "weights", "architectures"},
    "template": set(),
    "graphs": set(),
    "tokenizer": {"files", "architectures", "template"},  # of the second its reader of JSON files
}
OPS = sorted(
    path.stem
    for path in (PACKAGE / "ops").glob("*.py")
    if path.stem not in ("__init__", "registry", "checks", "product")
)
KERNELS = sorted(path.stem.removesuffix("_sm90") for path in (ROOT / "csrc").glob("*.cu"))


def python_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def internal_imports(path: Path) -> Iterator[str]:
    """The parts of pyllama that a file imports, but for type checkers' sake only."""
    tree = ast.parse(path.read_text())
    for block in ast.walk(tree):
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
            block.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import; name the file in full"
            module = node.module or ""
            if module == "pyllama":
                yield from (alias.name for alias in node.names)
            elif module.startswith("pyllama."):
                yield module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("pyllama."))


@pytest.mark.parametrize("path", python_files(PACKAGE), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_order(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        return
    importer = part(path)
    assert importer in PARTS, f"pyllama/{importer} has no place in the import order"
    above = set().union(*ORDER[: [importer in line for line in ORDER].index(True)])
    allowed = ONLY.get(importer, above) | {importer, "_C"}
    assert set(internal_imports(path)) <= allowed


@pytest.mark.parametrize("part", ["config", "architectures"])
def test_plain_data_needs_no_torch(part: str) -> None:
    for path in python_files(PACKAGE):
        if path.relative_to(PACKAGE).parts[0].removesuffix(".py") == part:
            assert not re.search(r"^\s*(import|from) torch", path.read_text(), re.MULTILINE), path


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_test(op: str) -> None:
    assert (ROOT / "tests" / "ops" / f"test_{op}.py").exists()


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_has_its_twins(kernel: str) -> None:
    assert kernel in OPS
    assert (ROOT / "tests" / "ops" / f"test_{kernel}.py").exists()
    assert (ROOT / "benchmarks" / "ops" / f"bench_{kernel}.py").exists()


def test_files_are_short() -> None:
    sources = [
        path for folder in ("pyllama", "tests", "benchmarks", "examples") for path in python_files(ROOT / folder)
    ]
    sources += [path for folder in ("csrc", "tests/emulator") for path in (ROOT / folder).rglob("*.[chu]*")]
    long = {
        str(path.relative_to(ROOT)): lines for path in sources if (lines := path.read_text().count("\n")) > MAX_LINES
    }
    assert not long, "split by concept"
    assert not [path for path in sources if "utils" in path.stem]


def test_the_package_reads_no_environment_variables() -> None:
    for path in [*python_files(PACKAGE), *(ROOT / "csrc").rglob("*.*")]:
        assert not re.search(r"\b(environ|getenv)\b", path.read_text()), path


@pytest.mark.parametrize("kernel", sorted((ROOT / "csrc").glob("*.cu")), ids=lambda path: path.stem)
def test_kernels_are_plain(kernel: Path) -> None:
    text = kernel.read_text()
    for word in (r"\basm\b", r"#\s*if", "<<<", r"__CUDACC__"):
        assert not re.search(word, text), f"{word} belongs in csrc/common"
    assert text.rstrip().splitlines()[-1].startswith("PYLLAMA_KERNEL(")


def test_operators_use_the_stable_abi_only() -> None:
    for path in (ROOT / "csrc").rglob("*.*"):
        for header in re.findall(r"#include <((?:torch|ATen|c10)/[^>]+)>", path.read_text()):
            assert header.startswith(("torch/csrc/stable/", "torch/headeronly/")), f"{path}: {header}"
