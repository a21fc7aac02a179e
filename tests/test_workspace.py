"""What `pyllama fit` counts beside weights and cache on a GPU: torch's allocator, cuBLAS, what kernels take inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_fit import WORKSPACE_CASES

from pyllama.architectures import read_config
from pyllama.bench.shapes import SHAPES
from pyllama.inspection import workspace
from pyllama.inspection.allocator import BLOCK, MIB, CachingAllocator
from pyllama.inspection.workspace import CUBLAS_WORKSPACE, INSIDE, Recorded, Use, cublas_workspace, of_all_layers
from pyllama.loader import empty_model
from pyllama.sampling import Sampler

CSRC = Path(__file__).parents[1] / "csrc"
BFLOAT16 = torch.bfloat16


def test_the_allocator_by_hand() -> None:
    """Segments of 2 and 20 MiB, of which blocks are cut, and of their own multiples of 2 MiB for larger ones."""
    allocator = CachingAllocator()
    allocator.take(1)
    assert allocator.total.most == 2 * MIB
    medium = allocator.take(5 * MIB)
    assert allocator.total.most == 22 * MIB
    others = [allocator.take(size * MIB) for size in (9, 5)]  # 1 MiB is left
    assert allocator.total.most == 22 * MIB
    allocator.take(MIB)  # beside the first byte
    assert allocator.total.most == 22 * MIB
    allocator.take(MIB)  # where there is less left
    assert allocator.total.most == 24 * MIB
    for block in (medium, others[1]):
        allocator.give_back(block)
    allocator.take(6 * MIB + 1)  # two blocks of 5 and 6 MiB are free, apart: a new segment
    assert allocator.total.most == 44 * MIB
    allocator.give_back(others[0])  # and now one of 20
    assert allocator.take(19 * MIB).size == 20 * MIB  # 1 MiB is not cut off
    assert allocator.total.most == 44 * MIB
    assert allocator.take(12 * MIB + 1).size == 12 * MIB + BLOCK  # the rest of the other, of 14
    assert allocator.take(25 * MIB).size == 26 * MIB
    assert allocator.total.most == 44 * MIB + 26 * MIB


def test_small_blocks_are_joined_again() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.take(700) for _ in range(2048)]
    assert (allocator.total.most, {block.size for block in blocks}) == (2 * MIB, {1024})
    for block in blocks[::2] + blocks[1::2]:
        allocator.give_back(block)
    for _ in range(2):
        allocator.take(MIB)
    assert allocator.total.most == 2 * MIB


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_allocator_is_that_of_torch_on_a_gpu() -> None:
    generator = torch.Generator().manual_seed(0)
    torch.cuda.empty_cache()
    before, allocator = torch.cuda.memory_reserved(), CachingAllocator()
    held: list[Any] = []
    for _ in range(1000):
        size = int(2 ** (25 * torch.rand((), generator=generator).item()))
        held.append((torch.empty(size, dtype=torch.uint8, device="cuda"), allocator.take(size)))
        if len(held) > 20:
            tensor, block = held.pop(int(torch.randint(len(held), (), generator=generator)))
            del tensor
            allocator.give_back(block)
        assert torch.cuda.memory_reserved() - before == allocator.total.most


def test_free_segments_go_back() -> None:
    allocator = CachingAllocator()
    small, medium, large = (allocator.take(size) for size in (1, 5 * MIB, 30 * MIB))
    kept = allocator.take(5 * MIB)  # in the medium one's segment
    for block in (small, medium, large):
        allocator.give_back(block)
    assert (allocator.total.now, allocator.total.most) == (52 * MIB, 52 * MIB)
    allocator.release_free()
    assert (allocator.total.now, allocator.total.most) == (20 * MIB, 52 * MIB)
    pool = CachingAllocator(allocator.total)  # does not take from the other what is free there
    pool.take(5 * MIB)
    assert allocator.total.now == 40 * MIB
    pool.take(30 * MIB)
    assert (allocator.total.now, allocator.total.most) == (70 * MIB, 70 * MIB)
    allocator.give_back(kept)
    allocator.release_free()
    assert allocator.total.now == 50 * MIB


def test_a_copy_has_what_is_free_and_leaves_the_rest_alone() -> None:
    allocator = CachingAllocator()
    first, _ = allocator.take(5 * MIB), allocator.take(5 * MIB)
    copy = allocator.copy()
    copy.take(10 * MIB - 512)
    assert (copy.total.now, allocator.total.now) == (20 * MIB, 20 * MIB)
    copy.release_free()
    assert copy.total.now == 20 * MIB
    allocator.give_back(first)
    assert allocator.take(5 * MIB) is first
    copy.take(5 * MIB)
    assert (copy.total.now, allocator.total.now) == (40 * MIB, 20 * MIB)


def test_a_capture_begins_where_the_prompts_gave_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it takes comes to what is left of their passes, not to all that they took."""
    use = Use(read_config(SHAPES["llama-3.1-8b"])[0], BFLOAT16, "cuda")
    cells = (1, 2049), (1024, 2)
    found = [use._generating(*cell) for cell in cells]
    with monkeypatch.context() as patch:
        patch.setattr(CachingAllocator, "release_free", lambda self: None)
        kept = [use._generating(*cell) for cell in cells]
    assert all(more - less > 20 * MIB for more, less in zip(kept, found, strict=True))
    monkeypatch.setattr(workspace, "CachingAllocator", lambda total: CachingAllocator())  # as if nothing were captured
    assert [use._generating(*cell) for cell in cells] == found


@pytest.mark.parametrize(
    ("name", "batch", "multiplies"), [("dense", 16, False), ("dense", 17, True), ("latent", 1, True)]
)
def test_cublas_has_a_workspace_where_torch_multiplies(name: str, batch: int, multiplies: bool) -> None:
    use = Use(read_config(WORKSPACE_CASES[name])[0], BFLOAT16, "cuda")
    with torch.inference_mode():
        sequences = workspace._Sequences(use._model, [range(9)] * batch, [1] * batch, 1, batch, loads=False)
        allocator = CachingAllocator()
        with Recorded(allocator, True, CUBLAS_WORKSPACE) as recorded:
            sequences.extend(torch.empty(batch, dtype=torch.int64, device="meta"))
    assert (recorded.workspace is not None) == multiplies
    assert (allocator.total.most >= CUBLAS_WORKSPACE) == multiplies


def test_cublas_takes_less_on_older_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cublas_workspace(None) == cublas_workspace(torch.device("cpu")) == 32 * MIB
    for capability, size in {
        (8, 0): 8 * MIB + 2**17,
        (8, 9): 8 * MIB + 2**17,
        (9, 0): 32 * MIB,
        (12, 0): 32 * MIB,
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert cublas_workspace(torch.device("cuda")) == size


def test_tiles_are_those_of_the_kernels() -> None:
    def meta(*shape: int, dtype: torch.dtype = BFLOAT16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def paged(K: int, longest: int, **options: Any) -> int:
        return INSIDE["pyllama::paged_attention"](
            meta(9, 8, K, **options), meta(4, 2, 8, 64, K, **options), None, None, None, longest, window=7
        )

    assert paged(128, 9) == 320 * 128 * 130 * 4
    assert paged(192, 9) == 320 * 64 * 194 * 4
    assert paged(128, 1) == 320 * 16 * 130 * 4
    assert paged(128, 9, dtype=torch.float32) == 0
    assert INSIDE["pyllama::attention"](meta(9, 8, 192), meta(9, 8, 192), meta(9, 8, 128)) == 320 * 64 * 130 * 4
    assert INSIDE["pyllama::decode_attention_"](meta(9, 1280), meta(4, 2, 1, 64, 128)) == 320 * 16 * 130 * 4
    assert INSIDE["pyllama::mla_paged_attention"](meta(9, 8, 576), meta(4, 64, 576)) == 320 * 64 * 514 * 4
    kernels = (CSRC / "common" / "attention_kernels.h").read_text()
    assert "attention_warps = 4" in kernels
    assert "MI = K <= 128 ? 2 : 1;" in kernels
    assert "rows = attention_warps * MI * 16" in kernels
    assert "K = K_, V = V_, rows = 16," in kernels
    assert (
        "rows = 64, keys = 32, threads = 256, K = max_entry, V = max_rank"
        in (CSRC / "mla_paged_attention.cu").read_text()
    )


@pytest.mark.parametrize(("device", "places"), [("cuda", 10), ("cpu", 9)])
def test_a_graph_has_places_that_nobody_uses(device: str, places: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def sampler(params: Any, prompts: Any, *rest: Any) -> Sampler:
        made.append(len(prompts))
        return Sampler(params, prompts, *rest)

    monkeypatch.setattr(workspace, "Sampler", sampler)
    Use(read_config(WORKSPACE_CASES["dense"])[0], BFLOAT16, device).generating(9, 30)
    assert made == [places]


@pytest.mark.parametrize("name", WORKSPACE_CASES)
def test_layers_of_a_kind_count_each(name: str) -> None:
    """In the order of the whole model's parameters."""
    config = read_config(WORKSPACE_CASES[name])[0]
    model = empty_model(config, 10**9)
    each = empty_model(workspace.one_of_each(config), 10**9)
    found = of_all_layers(config, {name: weight.shape for name, weight in each.named_parameters()})
    assert list(found.items()) == [(name, weight.shape) for name, weight in model.named_parameters()]
    assert len(each.layers) < len(model.layers)
