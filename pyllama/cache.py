"""The paged key/value cache (Kwon et al., arXiv:2309.06180).

One tensor per layer, [P, 2, G, S, K]: pages, key and value, heads, S = 64 tokens, head size. One head's page
is one contiguous block, which suits bulk copies, TMA, and sharding by head. Latent attention has [P, S, L]: a
token's latent and its rotated key. All layers share the page numbers, so a sequence has one block table.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from pyllama.config import AttentionConfig, MLAConfig, ModelConfig

PAGE_SIZE = 64


def pages_for(tokens: int) -> int:
    """Pages that hold `tokens` tokens."""
    return -(-tokens // PAGE_SIZE)


def page_shape(attention: AttentionConfig) -> tuple[int, ...]:
    """Shape of one page of a layer's cache: [2, G, S, K], or [S, rank + rope] of latent attention."""
    if isinstance(attention, MLAConfig):
        return (PAGE_SIZE, attention.kv_rank + attention.rope.dim)
    return (2, attention.num_kv_heads, PAGE_SIZE, attention.head_dim)


def bytes_per_page(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that one page takes over all layers."""
    shapes = (page_shape(layer.attention) for layer in config.layers)
    return sum(torch.Size(shape).numel() for shape in shapes) * dtype.itemsize


def free_memory(device: torch.device) -> float:
    """Bytes of the device's memory that can still be taken; infinity where the system does not say, and on `meta`."""
    if device.type == "meta":
        return float("inf")
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own cache
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = Path("/proc/meminfo")
    match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    return int(match[1]) * 1024 if match else float("inf")


class PagedCache:
    """Keys and values of many sequences, in pages handed out one by one.

    Pages are not cleared: what a sequence has not written holds anything, and no op reads it.
    """

    def __init__(self, config: ModelConfig, num_pages: int, device: torch.device | str, dtype: torch.dtype) -> None:
        needed = num_pages * bytes_per_page(config, dtype)
        too_large = (
            f"a cache of {num_pages * PAGE_SIZE} tokens needs {needed / 2**30:.2f} GiB on {device}, not all free; "
            "use fewer sequences, shorter prompts or a smaller max_new_tokens"
        )
        if needed > free_memory(torch.device(device)):  # Linux would promise it, and end the process on use
            raise MemoryError(too_large)
        try:
            self.layers = [
                torch.empty((num_pages, *page_shape(layer.attention)), device=device, dtype=dtype)
                for layer in config.layers
            ]
        except RuntimeError as error:
            # On a CPU torch raises a plain RuntimeError, "... can't allocate memory ...".
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            raise MemoryError(too_large) from error
        self.num_pages = num_pages
        self._fresh = 0  # the first page that was never taken, nor those after it
        self._returned: list[int] = []

    @property
    def free_pages(self) -> int:
        return self.num_pages - self._fresh + len(self._returned)

    def allocate(self, pages: int) -> list[int]:
        """Takes `pages` page numbers out of the free ones; MemoryError when there are not that many."""
        if pages > self.free_pages:
            raise MemoryError(f"{pages} cache pages asked for, {self.free_pages} of {self.num_pages} are free")
        again = [self._returned.pop() for _ in range(min(pages, len(self._returned)))]
        fresh = range(self._fresh, self._fresh + pages - len(again))
        self._fresh = fresh.stop
        return [*again, *fresh]

    def free(self, pages: list[int]) -> None:
        """Gives pages back; each must have been allocated."""
        self._returned.extend(reversed(pages))
