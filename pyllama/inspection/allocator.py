"""How much memory tensors take of a device that are made and let go one after another.

Of a GPU, torch's allocator takes segments, cuts blocks from them and keeps both (c10/core/AllocatorConfig.h,
CUDACachingAllocator.cpp); of the main memory, every tensor takes what it is large.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

MIB = 2**20
BLOCK = 512  # bytes, of which every block is a multiple
SMALL, SMALL_SEGMENT = MIB, 2 * MIB  # blocks up to this size are cut from segments of that size,
MEDIUM, MEDIUM_SEGMENT = 10 * MIB, 20 * MIB  # those below this one from segments of that size,
ROUND_LARGE = 2 * MIB  # and larger ones from segments of their own, multiples of this


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@dataclass(eq=False)
class Block:
    """A part of a segment; the blocks beside it are parts of the same one."""

    size: int
    small: bool
    before: Block | None = None
    after: Block | None = None


class Allocator(Protocol):
    taken: int  # bytes of the device, at most so far

    def take(self, size: int) -> Block: ...

    def give_back(self, block: Block) -> None: ...


class MainMemory:
    """Each tensor takes its own bytes until it is let go."""

    def __init__(self) -> None:
        self.taken = self._now = 0

    def take(self, size: int) -> Block:
        self._now += size
        self.taken = max(self.taken, self._now)
        return Block(size, small=False)

    def give_back(self, block: Block) -> None:
        self._now -= block.size


class CachingAllocator:
    """torch's, with one stream and its default settings: the smallest free block that is large enough, and its rest."""

    def __init__(self) -> None:
        self.taken = 0
        self._free: dict[bool, list[Block]] = {True: [], False: []}  # of segments for small blocks, and of others

    def take(self, size: int) -> Block:
        size = round_up(max(size, 1), BLOCK)
        small = size <= SMALL
        free = self._free[small]
        fitting = [block for block in free if block.size >= size]
        if fitting:
            block = min(fitting, key=lambda block: block.size)
            free.remove(block)
        else:
            segment = SMALL_SEGMENT if small else MEDIUM_SEGMENT if size < MEDIUM else round_up(size, ROUND_LARGE)
            self.taken += segment
            block = Block(segment, small)
        rest = block.size - size
        if rest >= BLOCK if small else rest > SMALL:
            after = Block(rest, small, block, block.after)
            if block.after is not None:
                block.after.before = after
            block.size, block.after = size, after
            free.append(after)
        return block

    def give_back(self, block: Block) -> None:
        free = self._free[block.small]
        free.append(block)
        for first, second in ((block, block.after), (block.before, block)):
            if first in free and second in free:  # they become one
                free.remove(second)
                first.size, first.after = first.size + second.size, second.after
                if second.after is not None:
                    second.after.before = first


ALLOCATORS: dict[str, type[MainMemory] | type[CachingAllocator]] = {"cpu": MainMemory, "cuda": CachingAllocator}


def taken_by(sizes: Iterable[int], device: str) -> int:
    """By tensors of these bytes that stay."""
    allocator = ALLOCATORS[device]()
    for size in sizes:
        allocator.take(size)
    return allocator.taken
