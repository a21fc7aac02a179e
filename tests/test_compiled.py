"""The kernels as the compiler left them: no spills, registers, shared memory, and instructions as in one table.

A new kernel needs a row of TABLE. nvcc's choices are read from the built library, which takes no GPU.
"""

import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import files
from typing import NamedTuple

import pytest

from pyllama import _C

pytestmark = pytest.mark.skipif(not _C.ops, reason="built without nvcc")


class Row(NamedTuple):
    """What kernels may use at most, and the instructions that they consist of, as `instruction` has them.

    Registers and shared memory decide how many blocks run on a multiprocessor at once (it has 65536 registers), and
    so how many loads are in flight while others wait. `registers` is what nvcc 13.0 takes and some 10% more at most, in
    eights as they are allocated, and never so much that a block less would fit. `shared` is the static part, in bytes.
    """

    kernel: str  # a pattern of names: "<file>::<kernel><<arguments>>", without file if a header has it
    registers: int
    shared: int
    instructions: str


# 16 bytes per thread and copy, tensor cores that sum in float32. 4 bytes: lengths and pages; up to 16: sums of parts.
ATTENTION = "LDGSTS.128 LDSM.4 HMMA.16816.F32 LDG.32 LDG.128 STG.64 STG.128 ATOMG BAR"
ATTENTION_PART = "LDGSTS.128 LDSM.4 HMMA.16816.F32 LDG.32 STG.64 STG.128 BAR"  # another kernel merges

SKINNY = "LDG.128 HMMA.16816.F32 BAR"  # the weight goes from memory into registers

GROUPED = "LDGSTS.128 LDSM.4 HMMA.16816.F32 LDG.32 STG.128 BAR"

# A kernel's row is the first that matches.
TABLE = [
    # <type, vectors that a thread keeps of a row, add>; rows of one or two are a warp's at most
    Row(r"norm_rows<\w+, 8, true>", 96, 128, "LDG.128 STG.128 BAR"),
    Row(r"norm_rows<\w+, 4, true>", 80, 128, "LDG.128 STG.128 BAR"),
    Row(r"norm_rows<\w+, [12], true>", 64, 0, "LDG.128 STG.128"),
    Row(r"norm_rows<\w+, 8, false>", 64, 128, "LDG.128 STG.128 BAR"),
    Row(r"norm_rows<\w+, 4, false>", 56, 128, "LDG.128 STG.128 BAR"),
    Row(r"norm_rows<\w+, [12], false>", 48, 0, "LDG.128 STG.128"),
    # <type, interleaved>; 4 bytes: positions and the like, 8: cosines of two pairs
    Row(r"rope::kernel<float, false>", 48, 0, "LDG.32 LDG.128 STG.128"),
    Row(r"rope::kernel<float, true>", 48, 0, "LDG.32 LDG.64 LDG.128 STG.128"),
    Row(r"rope::kernel<.*>", 64, 0, "LDG.32 LDG.128 STG.128"),
    Row(r"rope_store<float, false>", 64, 0, "LDG.32 LDG.128 STG.128"),
    Row(r"rope_store<float, true>", 64, 0, "LDG.32 LDG.64 LDG.128 STG.128"),
    Row(r"rope_store<.*>", 80, 0, "LDG.32 LDG.128 STG.128"),
    Row(r"swiglu::kernel<.*>", 32, 0, "LDG.128 STG.128"),
    Row(r"embedding::embedding_kernel<.*>", 16, 0, "LDG.64 LDG.128 STG.128"),  # 8 bytes: token ids
    Row(r"advance::advance_kernel", 24, 0, "LDG.32 STG.32"),
    # <type, experts of a lane>; at most 8 to 32 warps of 128 threads
    Row(r"topk_gate::topk_gate_kernel<float, (1|2|4)>", 48, 0, "LDG.32 STG.32"),
    Row(r"topk_gate::topk_gate_kernel<.*, (1|2|4)>", 48, 0, "LDG.16 LDG.32 STG.32"),
    Row(r"topk_gate::topk_gate_kernel<float, 8>", 64, 0, "LDG.32 STG.32"),
    Row(r"topk_gate::topk_gate_kernel<.*, 8>", 64, 0, "LDG.16 LDG.32 STG.32"),
    Row(r"topk_gate::topk_gate_kernel<float, 16>", 112, 0, "LDG.32 STG.32"),
    Row(r"topk_gate::topk_gate_kernel<.*, 16>", 112, 0, "LDG.16 LDG.32 STG.32"),
    # <type, blocks of 8 tokens, ..>; two blocks of 256 threads fit, with 64 KB of the weight on their way in each
    Row(r"skinny::kernel<float, .*>", 80, 0, "LDG.32 STG.32"),
    Row(r"skinny::kernel<.*>", 128, 0, f"{SKINNY} LDG.16 STG.16 STG.128"),
    Row(r"norm_gate::norm_gate_kernel<float, .*>", 128, 1024, "LDG.32 STG.32 ATOMG BAR"),
    Row(r"norm_gate::norm_gate_kernel<.*>", 128, 1024, f"{SKINNY} LDG.32 STG.32 STG.128 ATOMG"),
    Row(r"norm_argmax::norm_argmax_kernel<float, .*>", 80, 2048, "LDG.32 STG.32 STG.64 ATOMG BAR"),
    Row(r"norm_argmax::norm_argmax_kernel<.*>", 128, 2048, f"{SKINNY} STG.64 STG.128 ATOMG"),
    Row(r"experts_swiglu::experts_swiglu_plain", 80, 0, "LDG.32 STG.32"),
    Row(r"experts_swiglu::experts_swiglu_kernel<.*>", 128, 1024, f"{SKINNY} LDG.32 STG.16"),
    Row(r"experts_add::experts_add_plain", 64, 1024, "LDG.32 STG.32 BAR"),
    Row(r"experts_add::experts_add_kernel<.*>", 128, 1024, f"{SKINNY} LDG.16 LDG.32 STG.16"),
    Row(r"moe_dispatch::count_kernel", 16, 2048, "LDG.32 STG.32 ATOMS BAR"),
    Row(r"moe_dispatch::moe_dispatch_kernel", 40, 32896, "LDG.32 STG.32 ATOMS BAR"),
    Row(r"moe_combine::moe_combine_kernel<.*>", 40, 0, "LDG.32 LDG.128 STG.128"),
    # <tile, gated>; two blocks of 256 threads fit
    Row(r"grouped_tensor<.*, 128, .*>", 128, 3072, GROUPED),  # and 96 KB that are not static: 99 KB, as GPUs have
    Row(r"grouped_tensor<.*, 64, .*>", 128, 3072, GROUPED),
    Row(r"grouped_tensor<.*, 16, .*>", 96, 3072, GROUPED),
    Row(r"grouped_plain<.*>", 40, 6144, "LDG.32 STG.32 BAR"),
    Row(r"mla_rope_store::mla_rope_store_kernel<float, .*>", 56, 0, "LDG.32 LDG.128 STG.32 STG.128"),
    Row(r"mla_rope_store::mla_rope_store_kernel<.*>", 56, 0, "LDG.16 LDG.32 LDG.128 STG.16 STG.128"),
    Row(r"mla_paged_attention::mla_kernel<.*>", 255, 0, ATTENTION_PART),
    Row(r"mla_paged_attention::merge_kernel<.*>", 56, 0, "LDG.32 LDG.128 STG.64"),
    Row(r"plain<mla_paged_attention::Latents<float>, 576>", 96, 3072, "LDG.32 STG.32"),
    Row(r"prefill<Prefill<\w+, 32, 32>, .*>", 168, 1024, ATTENTION),
    Row(r"prefill<Prefill<\w+, 64, 64>, .*>", 240, 1024, ATTENTION),
    Row(r"prefill<Prefill<\w+, 96, 96>, .*>", 255, 1024, ATTENTION),
    Row(r"prefill<Prefill<\w+, 128, 128>, .*>", 255, 1024, ATTENTION),
    Row(r"prefill<Prefill<\w+, 192, 128>, .*>", 168, 1024, ATTENTION),
    Row(r"prefill<Prefill<\w+, 192, 192>, .*>", 224, 1024, ATTENTION),
    Row(r"prefill<Prefill<\w+, 256, 256>, .*>", 255, 1024, ATTENTION),
    Row(r"decode<Decode<\w+, 32, 32>, .*>", 96, 1024, ATTENTION),
    Row(r"decode<Decode<\w+, 64, 64>, .*>", 128, 1024, ATTENTION),
    Row(r"decode<Decode<\w+, 96, 96>, .*>", 144, 1024, ATTENTION),
    Row(r"decode<Decode<\w+, 128, 128>, .*>", 184, 1024, ATTENTION),
    Row(r"decode<Decode<\w+, 192, 192>, .*>", 192, 1024, ATTENTION),
    Row(r"decode<Decode<\w+, 256, 256>, .*>", 232, 1024, ATTENTION),
    Row(r"plain<(Contiguous|Paged)<float>, 256>", 64, 2048, "LDG.32 STG.32"),  # one warp: no barrier
    Row(r"sample::slices<float>", 40, 0, "LDG.8 LDG.32 LDG.64 LDG.128 STG.32 STG.64"),
    Row(r"sample::slices<.*>", 40, 0, "LDG.8 LDG.16 LDG.32 LDG.64 LDG.128 STG.32 STG.64"),
    # F64: top_p of a sum that has more bits than float32.
    Row(r"sample::finish<float>", 64, 35104, "LDG.8 LDG.32 LDG.64 LDG.128 STG.64 ATOMS BAR F64"),
    Row(r"sample::finish<.*>", 64, 35104, "LDG.8 LDG.16 LDG.32 LDG.64 LDG.128 STG.64 ATOMS BAR F64"),
]
FORBIDDEN = {
    "LDL": "loads from local memory",
    "STL": "stores to local memory",
    "ATOMIC.FLOAT": "adds floating-point numbers in no fixed order",
}


class Kernel(NamedTuple):
    name: str
    architecture: str
    registers: int
    stack: int
    local: int
    shared: int
    instructions: Counter[str]  # how many of each word of `instruction`
    early: int  # loads of 16 bytes before the last wait for the kernels ahead

    def __str__(self) -> str:
        return f"{self.name} on {self.architecture}"


def instruction(opcode: str) -> str | None:
    """The table's word for an opcode of machine code; None for those that every kernel may have.

    Accesses to global memory with their bits per thread (LDG load, STG store, LDGSTS copy to shared memory; LD and ST
    where the compiler does not know that it is global memory), LDSM.4 (ldmatrix of four), tensor cores with shape and
    sum, barriers, atomics, F64 (any double-precision arithmetic), and what FORBIDDEN lists.
    """
    kind, *rest = opcode.split(".")
    if kind in ("LDG", "STG", "LDGSTS", "LD", "ST"):
        widths = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
        return f"{kind}.{next((widths[part] for part in rest if part in widths), 32)}"
    if kind == "LDSM":
        return f"LDSM.{rest[-1]}"
    if kind.endswith("MMA"):
        return ".".join([kind, *rest[:2]])
    if kind in ("ATOM", "ATOMG", "ATOMS", "RED", "REDG"):
        without_result = {"RED": "ATOMG", "REDG": "ATOMG"}
        return "ATOMIC.FLOAT" if any(re.match(r"B?F\d", part) for part in rest) else without_result.get(kind, kind)
    if re.fullmatch(r"D(ADD|MUL|FMA|SETP|MNMX)", kind) or "F64" in rest:
        return "F64"
    return kind if kind in ("BAR", "LDL", "STL") else None


def dump(option: str) -> Iterator[tuple[tuple[int, str, str], str]]:
    """Lines of cuobjdump about kernels, each with its kernel: (object file in the library, architecture, name)."""
    program = next(file.locate() for file in files("nvidia-cuda-cuobjdump") or () if file.name == "cuobjdump")
    with subprocess.Popen([program, option, _C.__file__], stdout=subprocess.PIPE, text=True) as process:
        element, architecture, name = 0, "", ""
        for line in process.stdout:
            if line.startswith("Fatbin"):
                element, name = element + 1, ""
            elif line.startswith("arch = "):
                architecture = line.split()[-1]
            elif match := re.match(r"\s*Function\s*:?\s*(\w+)", line):
                name = match[1]
            elif name:
                yield (element, architecture, name), line
    assert process.returncode == 0, f"cuobjdump {option}: exit status {process.returncode}"


def source_names(names: list[str]) -> list[str]:
    """`names` as written in the source; the file stands for its unnamed namespace, as in swiglu::kernel<float>."""
    text = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    result = []
    for name, readable in zip(names, text.split("\n"), strict=True):
        file = re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_", name)
        result.append(readable.replace("(anonymous namespace)", file[1]) if file else readable)
    return result


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    """Each kernel of the library once per architecture, and per file that a header's kernel is compiled in."""
    usage, code = {}, {}
    for key, line in dump("-res-usage"):
        if "REG:" in line:
            usage[key] = {what: int(count) for what, count in re.findall(r"(\w+):(\d+)", line)}
    for key, line in dump("-sass"):
        if match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            code.setdefault(key, []).append(match[1])
    assert usage
    assert usage.keys() == code.keys()
    result = []
    for key, name in zip(usage, source_names([name for _, _, name in usage]), strict=True):
        used, architecture = usage[key], key[1]
        # From sm_90 on, the count includes 1024 bytes that the system keeps for itself.
        own = 1024 if int(re.search(r"\d+", architecture)[0]) >= 90 else 0
        words = Counter(word for opcode in code[key] if (word := instruction(opcode)))
        waits = [i for i, opcode in enumerate(code[key]) if opcode.startswith("ACQBULK")]
        early = [instruction(opcode) for opcode in code[key][: waits[-1]]].count("LDG.128") if waits else 0
        shared = max(used["SHARED"] - own, 0)
        result.append(Kernel(name, architecture, used["REG"], used["STACK"], used["LOCAL"], shared, words, early))
    return result


def row_of(kernel: Kernel) -> Row | None:
    return next((row for row in TABLE if re.fullmatch(row.kernel, kernel.name)), None)


@pytest.fixture(scope="module")
def rows(kernels: list[Kernel]) -> list[tuple[Kernel, Row]]:
    return [(kernel, row) for kernel in kernels if (row := row_of(kernel))]


def expect_none(complaints: Iterable[str]) -> None:
    text = "\n".join(complaints)
    assert not text, text  # whole, where pytest would shorten a list


def test_every_kernel_has_a_row_and_every_row_a_kernel(kernels: list[Kernel]) -> None:
    assert {kernel.architecture for kernel in kernels} == {name for name in _C.architectures if name.startswith("sm_")}
    expect_none(
        f"{kernel} has no row: {kernel.registers} registers, {kernel.shared} bytes of shared memory, "
        + " ".join(sorted(kernel.instructions))
        for kernel in kernels
        if not row_of(kernel)
    )
    used = {row_of(kernel) for kernel in kernels}
    expect_none(f"row {row.kernel} has no kernel" for row in TABLE if row not in used)


def test_no_local_memory(kernels: list[Kernel]) -> None:
    expect_none(
        f"{kernel}: {kernel.stack} bytes of stack, {kernel.local} bytes of local memory"
        for kernel in kernels
        if kernel.stack or kernel.local
    )


def test_no_forbidden_instruction(kernels: list[Kernel]) -> None:
    expect_none(
        f"{kernel} {reason}: {kernel.instructions[word]} {word}"
        for kernel in kernels
        for word, reason in FORBIDDEN.items()
        if word in kernel.instructions
    )


def test_weights_are_on_their_way_before_the_wait(kernels: list[Kernel]) -> None:
    """All that a thread of a product of few tokens has room for: 256 bytes, of a block's two on a multiprocessor."""
    skinny = [
        k for k in kernels if re.match(r"(skinny::kernel|\w+::(norm_gate|norm_argmax|experts_\w+)_kernel)<__", k.name)
    ]
    overlapping = [k for k in skinny if k.architecture == "sm_90a"]
    assert overlapping
    expect_none(f"{kernel}: {kernel.early} loads of 16 bytes, not 16" for kernel in overlapping if kernel.early != 16)


def test_registers(rows: list[tuple[Kernel, Row]]) -> None:
    expect_none(
        f"{kernel}: {kernel.registers} registers, but at most {row.registers}"
        for kernel, row in rows
        if kernel.registers > row.registers
    )


def test_shared_memory(rows: list[tuple[Kernel, Row]]) -> None:
    expect_none(
        f"{kernel}: {kernel.shared} bytes of shared memory, but at most {row.shared}"
        for kernel, row in rows
        if kernel.shared > row.shared
    )


def test_instructions(rows: list[tuple[Kernel, Row]]) -> None:
    complaints = []
    for kernel, row in rows:
        wanted = set(row.instructions.split())
        complaints += [f"{kernel}: no {word}" for word in sorted(wanted - kernel.instructions.keys())]
        more = sorted(kernel.instructions.keys() - wanted - FORBIDDEN.keys())
        complaints += [f"{kernel}: {kernel.instructions[word]} {word}, not in its row" for word in more]
    expect_none(complaints)
