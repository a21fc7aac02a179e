"""advance_ against the same in plain Python, step by step over page ends."""

from collections.abc import Iterator

import pytest
import torch
from comparing import int32, refused

from pyllama.ops.advance import advance_


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    table = torch.tensor([[3, 4], [5, 0]], dtype=torch.int32)
    yield int32(0, 0), int32(7, 3), int32(0, 0), table, 4


@pytest.mark.parametrize("B", [0, 1, 5, 300])
@pytest.mark.parametrize("S", [1, 3, 64])
def test_steps(S: int, B: int, device: str) -> None:
    max_pages = 4
    table = torch.randperm(B * max_pages).view(B, max_pages).to(torch.int32)
    lengths = torch.randint(1, max_pages * S + 1, (B,)).tolist()
    state = [torch.full((B,), 2**31 - 1, dtype=torch.int32, device=device), int32(*lengths, device=device)]
    slots = torch.full((B,), 2**31 - 1, dtype=torch.int32, device=device)
    for step in range(S + 2):
        advance_(*state, slots, table.to(device), S)
        positions = [length + step for length in lengths]
        assert state[0].tolist() == positions
        assert state[1].tolist() == [position + 1 for position in positions]
        expected = [
            int(table[b, position // S]) * S + position % S if position < max_pages * S else -1
            for b, position in enumerate(positions)
        ]
        assert slots.tolist() == expected


@pytest.mark.parametrize(("max_pages", "S"), [(0, 4), (1, 1), (3, 4)])
def test_unused_places_stay_as_they_are(max_pages: int, S: int, device: str) -> None:
    """Among sequences that move on; page 0 is somebody's."""
    lengths = [0, 5, 0, 0, 1] * 40
    table = torch.randint(0, 9, (len(lengths), max_pages), dtype=torch.int32, device=device)
    positions, slots = (torch.full((len(lengths),), 2**31 - 1, dtype=torch.int32, device=device) for _ in range(2))
    seq_lens = int32(*lengths, device=device)
    for step in range(1, 4):
        advance_(positions, seq_lens, slots, table, S)
        assert seq_lens.tolist() == [length and length + step for length in lengths]
        assert positions.tolist() == [length and length + step - 1 for length in lengths]
        stored = [0 < length <= max_pages * S - step for length in lengths]
        assert [slot >= 0 for slot in slots.tolist()] == stored


def test_arguments(device: str) -> None:
    one, table = int32(1, 2).to(device), torch.zeros(2, 3, dtype=torch.int32, device=device)
    with refused("advance_: page_size is 0"):
        advance_(one.clone(), one.clone(), one.clone(), table, 0)
    with refused(r"advance_: block_table of shape \[1, 3\] has B = 1, but positions has B = 2"):
        advance_(one.clone(), one.clone(), one.clone(), table[:1], 4)
    with refused("advance_: seq_lens must have .*int32"):
        advance_(one.clone(), one.long(), one.clone(), table, 4)
