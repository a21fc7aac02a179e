"""The benchmarks: that the command runs and says what it should, counts of work, judged results. No speeds."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated import EMULATOR

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # last: what is installed as pyllama comes first

from benchmarks import bench as framework  # noqa: E402
from benchmarks.backward import backward_of  # noqa: E402
from benchmarks.bench import Bench, Case, Peer, Work, benches, merged, row_of  # noqa: E402
from benchmarks.ops.bench_attention import causal_flops  # noqa: E402
from benchmarks.ops.bench_experts_swiglu import choice, distinct  # noqa: E402
from benchmarks.ops.bench_rms_norm import BENCH as RMS_NORM  # noqa: E402
from benchmarks.ops.bench_sample import BENCH as SAMPLE  # noqa: E402
from benchmarks.ops.bench_sample import OPTIONS, Options, kept  # noqa: E402
from benchmarks.results import Results, table  # noqa: E402
from benchmarks.shapes import SCOPES  # noqa: E402
from benchmarks.timing import CPU_CACHE_BYTES, CPU_INPUT_BYTES, sets_past_cache  # noqa: E402
from pyllama.ops.registry import OPS  # noqa: E402

SMALL = SCOPES["cpu", True]


def test_the_command_writes_a_row_for_each_case(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--op", "rms_norm", "--json", str(file)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    limits, rows = [], []
    for line in file.read_text().splitlines():
        row = json.loads(line)
        (limits if row["op"] == "limit" else rows).append(row)
    assert [row["limit"] for row in limits] == ["read", "copy", "product"]
    cuda = torch.cuda.is_available()
    expected = list(merged(RMS_NORM.cases(SCOPES["cuda" if cuda else "cpu", True])))
    assert [(row["model"], row["case"], row["sizes"]) for row in rows] == expected
    assert ("CPU FIGURES" in run.stdout) is not cuda
    for row in rows:
        assert row["implementation"] == ("cuda" if cuda else "eager")
        assert {"device", "torch", "commit", "time", "dtype", "peer", "x_peer"} <= row.keys()
        assert min(row[name] for name in ("us", "rate", "of_limit", "x_torch", "x_compile", "limit_rate")) > 0
        assert {"torch", "compile"} <= row["contenders_us"].keys()
        assert row["case"] in run.stdout


def test_unknown_ops_are_named() -> None:
    command = [sys.executable, "-m", "benchmarks", "--op", "rms_nrom"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "no op rms_nrom; there are" in run.stderr
    assert "rms_norm" in run.stderr


@pytest.mark.parametrize(
    ("op", "sizes", "expected"),
    [
        # x read and written, weight read: 24 + 24 + 8 numbers of 2 bytes
        ("rms_norm", {"rows": 3, "D": 8}, Work(moved=112, flops=96, limit="copy")),
        # queries and result 4 * 2 * 8 numbers each, keys and values 4 * 1 * 8; queries see 1 + 2 + 3 + 4 keys
        ("attention", {"T": 4, "H": 2, "G": 1, "K": 8, "V": 8}, Work(384, 4 * 2 * 8 * 10, "product")),
        # queries 4 * 2 * 8 numbers, keys 4 * 2 * 8, values and result 4 * 2 * 4
        ("attention", {"T": 4, "H": 2, "G": 2, "K": 8, "V": 4}, Work(384, 2 * 2 * (8 + 4) * 10, "product")),
        # keys and values: 2 sequences of 64 tokens with 2 heads of 8
        (
            "paged_attention",
            {"B": 2, "n": 1, "m": 64, "H": 4, "G": 2, "K": 8},
            Work(moved=2 * 2 * 64 * 2 * 8 * 2, flops=2 * 4 * 4 * 8 * 64, limit="read"),
        ),
        (
            "paged_attention",
            {"B": 1, "n": 64, "m": 64, "H": 4, "G": 2, "K": 8},
            Work(moved=2 * 64 * (2 + 4) * 8 * 2, flops=4 * 4 * 8 * 64 * 65 // 2, limit="product"),
        ),
        # 2 tokens of 4 numbers in and out, a norm of 4, a router of 8 x 4, at most 2 experts of 3 * 4 * 16, one more
        (
            "moe",
            {"T": 2, "D": 4, "F": 16, "E": 8, "N": 1, "shared": 16},
            Work(moved=2 * (16 + 4 + 32 + 2 * 192 + 192), flops=2 * 2 * (32 + 192 + 192), limit="read"),
        ),
        # latents of 8 + 4 of 16 numbers, 2 heads of 8 (8 + 4 in keys): weights 16, 16 * 12, 16 * 24, 8 * 32, 16 * 16
        (
            "mla",
            {"B": 3, "n": 1, "m": 64, "D": 16, "H": 2, "K": 12, "V": 8, "R": 4, "rank": 8, "q_rank": 0},
            Work(
                moved=2 * (16 + 1088 + 2 * 3 * 16 + 3 * 64 * 12),
                flops=2 * 3 * 1088 + 3 * 2 * 2 * (12 + 8) * 64,
                limit="read",
            ),
        ),
        # a weight of 8 x 4, a norm of 4, tokens of 4, results of 8
        ("norm_linear", {"T": 2, "D": 4, "F": 8}, Work(2 * (32 + 4 + 2 * 12), 2 * 2 * 32, "read")),
        # and of a vocabulary of 8 one number a token
        ("norm_argmax", {"T": 2, "D": 4, "V": 8}, Work(2 * (32 + 4 + 2 * 4) + 2 * 8, 2 * 2 * 32, "read")),
        # gate and up of 8 x 4 each
        ("norm_swiglu", {"T": 2, "D": 4, "F": 8}, Work(2 * (64 + 4 + 2 * 12), 2 * 2 * 64, "read")),
        # the residual stream of 8 is read and written
        ("linear_add", {"T": 2, "D": 4, "F": 8}, Work(2 * (32 + 2 * 20), 2 * 2 * 32, "read")),
        # a router of 8 x 4, tokens before and after the norm; weights and indices of 3 experts
        ("norm_gate", {"T": 2, "D": 4, "E": 8, "N": 3}, Work(2 * (32 + 4 + 2 * 8) + 2 * 24, 2 * 2 * 32, "read")),
        # all 3 experts once: gate and up, 2 * 8 x 4; tokens of 4, 3 results of 8 and indices each
        (
            "experts_swiglu",
            {"T": 2, "N": 3, "E": 3, "D": 4, "F": 8},
            Work(2 * (3 * 64 + 2 * (4 + 24)) + 2 * 12, 2 * 6 * 64, "read"),
        ),
        # down, 4 x 8; the residual stream is read and written
        (
            "experts_add",
            {"T": 2, "N": 3, "E": 3, "D": 4, "F": 8},
            Work(2 * (3 * 32 + 2 * (24 + 8)) + 2 * 24, 2 * 6 * 32, "read"),
        ),
        # logits of 2 sequences
        ("sample", {"B": 2, "V": 8, "spread": 4, "top_k": 3}, Work(moved=32, flops=64, limit="read")),
    ],
)
def test_work_is_counted_right(op: str, sizes: dict[str, int], expected: Work) -> None:
    assert benches()[op].work(torch.bfloat16, **sizes) == expected


def test_work_counts_the_experts_that_are_drawn() -> None:
    for T, N, E in (1, 8, 128), (16, 8, 128), (16, 2, 4):
        experts = choice(T, N, E)
        assert experts.shape == (T, N)
        assert all(len(set(of_token)) == N for of_token in experts.tolist())
        assert distinct(T, N, E) == len(experts.unique())
        assert torch.equal(experts, choice(T, N, E)), "as many bytes in every set of inputs"
    assert distinct(1, 8, 128) == 8
    assert 64 < distinct(16, 8, 128) < 128


def test_sets_of_inputs_are_past_the_cache_by_what_a_call_touches() -> None:
    assert sets_past_cache(CPU_CACHE_BYTES // 4, "cpu") == 5
    assert sets_past_cache(CPU_CACHE_BYTES // 4, "cpu", held=CPU_CACHE_BYTES) == 5, "experts that no token chose"
    assert sets_past_cache(2 * CPU_CACHE_BYTES, "cpu") == 1
    assert sets_past_cache(1, "cpu") == 16
    assert sets_past_cache(1, "cpu", held=CPU_INPUT_BYTES // 3) == 3, "as memory allows"
    assert sets_past_cache(1, "cpu", held=2 * CPU_INPUT_BYTES) == 1


ROUTERS = {
    "softmax": {"sigmoid": False, "sum_1": False, "groups": 1, "top": 1},
    "softmax-sum-1": {"sigmoid": False, "sum_1": True, "groups": 1, "top": 1},
    "sigmoid-groups": {"sigmoid": True, "sum_1": True, "groups": 8, "top": 4},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_routers_are_judged_by_their_experts_and_weights(router: dict[str, int], dtype: torch.dtype) -> None:
    bench = benches()["norm_gate"]
    inputs = bench.inputs(dtype, T=16, D=1024, E=64, N=6, **router)
    check = framework.check_of(bench, inputs, dtype)
    for function in (bench.pyllama, bench.torch or bench.formula, bench.formula):
        check(function(*inputs))
    normed, weights, experts = bench.formula(*inputs)
    for wrong in (
        (inputs[1], weights, experts),
        (normed, weights * 1.5, experts),
        (normed, weights, experts.roll(1, 0)),
    ):
        with pytest.raises(ValueError, match="its result is wrong in"):
            check(wrong)


EXPERTS = {"T": 5, "N": 2, "E": 4, "D": 64, "F": 32}
FEW = {  # sizes that are quick in emulation
    "norm_linear": {"T": 4, "D": 64, "F": 32},
    "norm_argmax": {"T": 4, "D": 64, "V": 40},
    "norm_swiglu": {"T": 9, "D": 64, "F": 32},
    "linear_add": {"T": 4, "D": 64, "F": 32},
    "norm_gate": {"T": 3, "D": 64, "E": 16, "N": 2, **ROUTERS["sigmoid-groups"], "top": 2},
    "experts_swiglu": EXPERTS,
    "experts_add": EXPERTS,
    "moe": {"T": 3, "D": 64, "F": 32, "E": 8, "N": 2, "shared": 32, **ROUTERS["softmax"]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "sizes"), FEW.items(), ids=FEW)
def test_kernels_of_few_tokens_take_what_benchmarks_give_them(
    request: pytest.FixtureRequest, name: str, sizes: dict[str, int], dtype: torch.dtype
) -> None:
    emulator = request.config.stash[EMULATOR]
    if emulator is None:
        pytest.skip("no emulated kernels")
    bench = benches()[name]
    with torch.no_grad():
        inputs = bench.inputs(dtype, **sizes)
        check = framework.check_of(bench, inputs, dtype)
        with emulator.enabled(0):
            assert bench.implementation("cpu") != "eager"
            result = bench.pyllama(*framework._copied(inputs))
        check(result)


def test_queries_at_the_end_see_the_keys_before_them() -> None:
    assert causal_flops(3, 5, H=1, K=1, V=1) == 4 * (3 + 4 + 5)


@pytest.mark.parametrize("name", sorted(benches()))
class TestEachBenchmark:
    def test_cases_fit_work_in_every_scope(self, name: str) -> None:
        bench = benches()[name]
        assert bench.op.rstrip("_") == name
        for scope in SCOPES.values():
            cases = list(merged(bench.cases(scope)))
            assert cases
            assert len({(case.model, case.what) for case in cases}) == len(cases), "rows could not be told apart"
            for case in cases:
                work = bench.work(torch.bfloat16, **case.sizes)
                assert work.moved > 0
                assert work.flops > 0 or (work.flops == 0 and work.limit != "product")  # a mere move
                assert work.limit in ("read", "copy", "product")

    def test_contenders_compute_the_same(self, name: str) -> None:
        bench = benches()[name]
        case = next(iter(merged(bench.cases(SMALL))))
        inputs = bench.inputs(torch.float32, **case.sizes)
        for one in (bench, backward_of(bench)) if bench.gradients else (bench,):
            check = framework.check_of(one, inputs, torch.float32)
            with torch.no_grad():
                for function in (one.pyllama, one.torch or one.formula, one.formula):
                    check(function(*framework._copied(inputs)))


def test_what_training_needs_has_a_backward() -> None:
    """All of issue 5's list; moe_dispatch gives indices alone."""
    ops = {"attention", "rms_norm", "rope", "swiglu", "topk_gate", "moe_combine", "grouped_linear", "grouped_swiglu"}
    assert {name for name, bench in benches().items() if bench.gradients} == ops | {"moe"}
    for name in ops:
        assert OPS[name].differentiable


MOE = {"T": 33, "D": 64, "F": 32, "E": 16, "N": 4, "shared": 0, "sigmoid": False, "sum_1": True, "groups": 1, "top": 1}
MLA = {"B": 1, "n": 70, "m": 70, "D": 64, "H": 4, "K": 24, "V": 16, "R": 8, "rank": 32, "q_rank": 0}
LAYERS = {  # the layer's name, its sizes, whether transformers has such a layer
    "moe": ("moe", MOE, True),
    "moe-shared": ("moe", MOE | {"shared": 64, "sum_1": False}, True),
    "moe-shared-sum-1": ("moe", MOE | {"shared": 64}, False),
    "moe-few": ("moe", MOE | {"T": 5, "shared": 64, "sum_1": False}, True),
    "moe-few-groups": ("moe", MOE | {"T": 16, "shared": 32, "sigmoid": True, "groups": 4, "top": 2}, True),
    "moe-groups": ("moe", MOE | {"shared": 32, "sigmoid": True, "groups": 4, "top": 2}, True),
    "mla-prefill": ("mla", MLA, True),
    "mla-prefill-q-rank": ("mla", MLA | {"q_rank": 48}, True),
    "mla-decode": ("mla", MLA | {"B": 3, "n": 1}, False),
    "mla-decode-q-rank": ("mla", MLA | {"B": 3, "n": 1, "m": 64, "q_rank": 48}, False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "sizes", "known"), LAYERS.values(), ids=LAYERS)
def test_layers_agree_with_those_of_transformers(
    name: str, sizes: dict[str, int], known: bool, dtype: torch.dtype
) -> None:
    bench = benches()[name]
    peer = bench.peers["transformers"]
    assert isinstance(peer, Peer)
    assert peer.prepare is not None
    with torch.no_grad():
        inputs = bench.inputs(dtype, **sizes)
        check = framework.check_of(bench, inputs, dtype)
        for function in (bench.pyllama, bench.torch or bench.formula, bench.formula):
            check(function(*framework._copied(inputs)))
        with pytest.raises(ValueError, match="its result is off by"):  # the residual stream alone
            check(inputs[1])
        layer = peer.prepare(peer.find(), *inputs)
        assert (layer is not None) == known
        if known:
            check(peer.call(layer, *inputs))


def test_a_layer_is_as_its_ops_are(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = benches()["moe"]
    kernels = {"topk_gate": "cuda", "moe_combine": "eager"}
    monkeypatch.setattr(framework, "implementation", lambda op, device: kernels.get(op, "cuda"))
    assert bench.implementation("cuda") == "eager"
    kernels["moe_combine"] = "cuda"
    assert bench.implementation("cuda") == "cuda"
    assert bench.mutates
    assert not RMS_NORM.mutates


def test_backward_rows_stand_beside_the_forward() -> None:
    scope = replace(SMALL, tokens=(3,))
    bench = benches()["swiglu"]
    backward = backward_of(bench)
    case = next(iter(backward.cases(scope)))
    results = Results(None)
    for one in (bench, backward):
        framework.measure(one, case, torch.float32, "cpu", results)
    forward, both = results.rows
    assert (forward["op"], both["op"]) == ("swiglu", "swiglu backward")
    assert both["work"] == {"moved": 2 * forward["work"]["moved"], "flops": 3 * forward["work"]["flops"]}
    assert {"torch", "compile"} <= both["contenders_us"].keys()
    x = torch.randn(3, 8)
    (grad,) = backward.pyllama(x)
    leaf = x.clone().requires_grad_()
    bench.formula(leaf).square().sum().div(2).backward()
    torch.testing.assert_close(grad, leaf.grad)
    assert not x.requires_grad


def test_equal_sizes_are_one_case() -> None:
    cases = [Case("a", "2 x 3", {"x": 2, "y": 3}), Case("b", "other", {"x": 9}), Case("c", "2 x 3", {"y": 3, "x": 2})]
    assert list(merged(cases)) == [Case("a, c", "2 x 3", {"x": 2, "y": 3}), Case("b", "other", {"x": 9})]


def test_a_row_says_rate_share_and_ratios() -> None:
    seconds = {"pyllama": 2e-6, "torch": 5e-6, "compile": 3e-6, "near": 1.9e-6, "far": 9e-6}
    limits = {"limit 0": 4e-6, "limit 1": 1e-6}
    work = Work(moved=4_000_000, flops=6_000_000, limit="copy")
    row = row_of("op", Case("model", "case", {"D": 1}), work, 4_000_000, seconds | limits)
    expected = {"us": 2.0, "rate": 2000, "unit": "GB/s", "of_limit": 0.5, "x_torch": 2.5, "x_compile": 1.5}
    assert row.items() >= (expected | {"peer": "near", "x_peer": 0.95, "limit_rate": 4000}).items()
    assert row["contenders_us"] == {"torch": 5.0, "compile": 3.0, "near": 1.9, "far": 9.0}

    row = row_of(
        "op", Case("model", "case", {}), work._replace(limit="product"), 12_000_000, {**limits, "pyllama": 2e-6}
    )
    expected = {"rate": 3.0, "unit": "TFLOP/s", "of_limit": 0.25, "limit_rate": 12.0, "x_torch": None, "peer": None}
    assert row.items() >= expected.items()


def test_contenders_that_err_are_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def raising(*args: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    peers = {"copying": lambda x, weight: x, "raising": raising, "right": RMS_NORM.formula}
    bench: Bench = replace(RMS_NORM, peers=peers | {"absent": framework.Peer("no_such_module:function", raising)})
    row = framework.measure(bench, Case("m", "c", {"rows": 4, "D": 16}), torch.float32, "cpu", Results(None))
    assert list(row["contenders_us"]) == ["torch", "compile", "right"]
    assert framework.missing_peers(bench) == ["absent"]
    said = capsys.readouterr().out
    assert "copying: ValueError: its result is off by" in said
    assert "raising: RuntimeError: no such kernel" in said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_samples_are_among_the_tokens_that_filters_keep(options: Options, dtype: torch.dtype) -> None:
    inputs = SAMPLE.inputs(dtype, B=64, V=400, spread=1, **options._asdict())
    check = framework.check_of(SAMPLE, inputs, dtype)
    check(SAMPLE.pyllama(*inputs))
    check(SAMPLE.formula(*inputs))
    wrong = inputs[0].argmin(-1) if options != OPTIONS["temperature"] else torch.full((64,), 400)
    with pytest.raises(ValueError, match="wrong in 64 of 64 places"):
        check(wrong)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (Options(temperature=0.0), "10001"),  # any of the likeliest
        (Options(temperature=1.0), "11111"),
        (Options(temperature=1.0, top_k=3), "10111"),  # the third and its equals
        (Options(temperature=1.0, top_p=0.7), "10001"),  # the likeliest two have 0.8 together
        (Options(temperature=1.0, top_p=0.81), "10111"),
        (Options(temperature=1.0, min_p=0.2), "10111"),
        (Options(temperature=1.0, top_k=2, top_p=0.99), "10001"),
    ],
)
def test_what_filters_keep(options: Options, expected: str) -> None:
    logits = torch.tensor([0.4, 0.02, 0.09, 0.09, 0.4]).log().expand(5, 5)
    assert "".join(str(int(right)) for right in kept(torch.arange(5), logits, options)) == expected


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    from benchmarks.plot import draw

    rows: list[dict[str, Any]] = [{"op": "limit", "limit": "read", "rate": 9.0}]
    rows.append({"op": "limit", "limit": "product", "rate": 0.1})
    seconds = {"pyllama": 2e-6, "torch": 5e-6, "limit 0": 1e-6}
    for op in ("one", "two", "three"):
        for case in ("small", "large"):
            row = row_of(op, Case("a, b", case, {}), Work(1000, 100, "read"), 1000, seconds)
            rows.append({**row, "dtype": "float32", "implementation": "eager"})
    path = tmp_path / "rows.png"
    draw(rows, "title", path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_tables_leave_out_nested_values() -> None:
    assert table([{"a": 1, "b": {"c": 2}}, {"a": 3, "d": None}]).split() == ["a", "d", "1", "3", "None"]
