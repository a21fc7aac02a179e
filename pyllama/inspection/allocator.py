"""How much memory tensors take of a device that are made and let go one after another.

Of a GPU, torch's allocator takes segments, cuts blocks from them and keeps both (c10/core/AllocatorConfig.h,
CUDACachingAllocator.cpp); of the main memory, every tensor takes what it is large.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

MIB = 2**20
BLOCK = 512  # bytes, of which every block is a multiple
SMALL, SMALL_SEGMENT = MIB, 2 * MIB  # blocks up to this size are cut from segments of that size,
MEDIUM, MEDIUM_SEGMENT = 10 * MIB, 20 * MIB  # those below this one from segments of that size,
ROUND_LARGE = 2 * MIB  # and larger ones from segments of their own, multiples of this

Self = TypeVar("Self", bound="Allocator")


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@dataclass
class Total:
    """Bytes of a device, of which allocators may take together."""

    now: int = 0
    most: int = 0  # so far

    def add(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)


@dataclass(eq=False)
class Block:
    """A part of a segment; the blocks beside it are parts of the same one."""

    size: int
    small: bool
    before: Block | None = None
    after: Block | None = None


class FreeBlocks:
    """By size, of which there are few, while there may be very many blocks."""

    def __init__(self, blocks: Iterable[Block] = ()) -> None:
        self._by_size: dict[int, dict[Block, None]] = {}
        self._sizes: list[int] = []  # in order
        for block in blocks:
            self.add(block)

    def __iter__(self) -> Iterator[Block]:
        for blocks in self._by_size.values():
            yield from blocks

    def __contains__(self, block: Block) -> bool:
        return block in self._by_size.get(block.size, ())

    def add(self, block: Block) -> None:
        if block.size not in self._by_size:
            self._by_size[block.size] = {}
            insort(self._sizes, block.size)
        self._by_size[block.size][block] = None

    def remove(self, block: Block) -> None:
        del self._by_size[block.size][block]
        if not self._by_size[block.size]:
            del self._by_size[block.size]
            del self._sizes[bisect_left(self._sizes, block.size)]

    def smallest(self, size: int) -> Block | None:
        """That has this size at least."""
        place = bisect_left(self._sizes, size)
        return None if place == len(self._sizes) else next(iter(self._by_size[self._sizes[place]]))


class Allocator(Protocol):
    total: Total

    def take(self, size: int) -> Block: ...

    def give_back(self, block: Block) -> None: ...

    def release_free(self) -> None:
        """Gives the device what nothing lies in."""
        ...

    def copy(self: Self) -> Self:
        """One of its own from here on, in which all that is taken now stays."""
        ...


class MainMemory:
    """Each tensor takes its own bytes until it is let go."""

    def __init__(self, total: Total | None = None) -> None:
        self.total = total or Total()

    def take(self, size: int) -> Block:
        self.total.add(size)
        return Block(size, small=False)

    def give_back(self, block: Block) -> None:
        self.total.add(-block.size)

    def release_free(self) -> None:
        """Nothing is kept."""

    def copy(self) -> MainMemory:
        return MainMemory(replace(self.total))


class CachingAllocator:
    """torch's, with one stream and its default settings: the smallest free block that is large enough, and its rest.

    total: which it shares, as a pool of a graph does, whose free blocks are nobody else's.
    """

    def __init__(self, total: Total | None = None) -> None:
        self.total = total or Total()
        self._free = {True: FreeBlocks(), False: FreeBlocks()}  # of segments for small blocks, and of others

    def take(self, size: int) -> Block:
        size = round_up(max(size, 1), BLOCK)
        small = size <= SMALL
        free = self._free[small]
        block = free.smallest(size)
        if block is not None:
            free.remove(block)
        else:
            segment = SMALL_SEGMENT if small else MEDIUM_SEGMENT if size < MEDIUM else round_up(size, ROUND_LARGE)
            self.total.add(segment)
            block = Block(segment, small)
        rest = block.size - size
        if rest >= BLOCK if small else rest > SMALL:
            after = Block(rest, small, block, block.after)
            if block.after is not None:
                block.after.before = after
            block.size, block.after = size, after
            free.add(after)
        return block

    def give_back(self, block: Block) -> None:
        free = self._free[block.small]
        if block.after is not None and block.after in free:
            block = self._joined(block, block.after)
        if block.before is not None and block.before in free:
            block = self._joined(block.before, block)
        free.add(block)

    def _joined(self, first: Block, second: Block) -> Block:
        """Of two neighbours, which are then not among the free blocks."""
        for block in (first, second):
            if block in self._free[block.small]:
                self._free[block.small].remove(block)
        first.size, first.after = first.size + second.size, second.after
        if second.after is not None:
            second.after.before = first
        return first

    def release_free(self) -> None:
        """`torch.cuda.empty_cache`: segments that are one free block go."""
        for free in self._free.values():
            for block in list(free):
                if block.before is None and block.after is None:
                    free.remove(block)
                    self.total.add(-block.size)

    def copy(self) -> CachingAllocator:
        found = CachingAllocator(replace(self.total))
        for small, free in self._free.items():
            # What lies beside free blocks is taken, and stays.
            found._free[small] = FreeBlocks(
                Block(block.size, small, block.before and Block(0, small), block.after and Block(0, small))
                for block in free
            )
        return found


ALLOCATORS: dict[str, type[MainMemory] | type[CachingAllocator]] = {"cpu": MainMemory, "cuda": CachingAllocator}
